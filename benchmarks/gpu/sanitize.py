"""compute-sanitizer over few small cases of smoke.py: accesses, races and barriers of every kernel."""

from __future__ import annotations

import dataclasses
import shutil

from benchmarks.gpu import smoke
from benchmarks.gpu.work import SKIPPED, Case, Finding, Group, rehearsing

TOOL = "compute-sanitizer"
LIMIT_S = 240.0
SHAPES = ("d64 n32 bf16", "grouped, swiglu, rope bf16", "attention hd16 n32 bf16")
TOOLS = {"memcheck": ("triton", "cuda"), "racecheck": ("cuda",), "synccheck": ("cuda",)}
"""By tool, whose kernels it watches: Triton's barriers are its compiler's."""


def groups() -> list[Group]:
    """A group a tool; one case a process."""
    return [_group(tool, backends) for tool, backends in TOOLS.items()]


def _group(tool: str, backends: tuple[str, ...]) -> Group:
    shapes = None if rehearsing() else SHAPES
    cases = [c for c in smoke.cases("sanitize", shapes) if c.arguments["backend"] in backends]
    if rehearsing():
        cases = cases[-1:]
    missing = shutil.which(TOOL) is None
    named = [
        dataclasses.replace(
            case,
            name=f"{tool} / {case.name}",
            limit_s=LIMIT_S,
            arguments=case.arguments | {"missing": missing},
        )
        for case in cases
    ]
    # The allocator's cache would hide what lies outside a tensor.
    wrapper: tuple[str, ...] = (
        "env",
        "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
        TOOL,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
    )
    if tool == "memcheck":  # torch probes pointers and peers, and takes an error for an answer
        wrapper += ("--report-api-errors", "no")
    return Group([[case] for case in named], workers=2, wrapper=() if missing else wrapper)


def run(case: Case) -> Finding:
    """As smoke's, under the tool."""
    arguments = dict(case.arguments)
    if arguments.pop("missing"):
        return Finding(SKIPPED, f"no {TOOL} on PATH")
    return smoke.check(**arguments)
