"""Compile the Triton kernels that a call would launch, without a GPU, and read what ptxas makes of them.

The call itself runs on CPU tensors; its launches are compiled for the GPU asked for, and not made.
Figures are for the installed Triton's own ptxas. They say what fits on chip; they are no times.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.offline.instructions import per_token_and_loop, tile_of
from benchmarks.offline.limits import SHARED_LIMIT
from shift_kernels.backends.triton import backend as triton_backend
from shift_kernels.backends.triton.resident_plan import Chip

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MATMULS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")


class _NoGpu:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, sm: int) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", sm, 32)
        self.get_current_device = lambda: sm  # Triton keeps what it compiled by device
        self.get_current_stream = lambda device=None: 0


@contextlib.contextmanager
def launches(sm: int) -> Iterator[list[Any]]:
    """Within it, kernels are compiled for ``sm`` instead of launched; yields the list of them, in order."""
    found: list[Any] = []
    run = JITFunction.run

    def only_compile(self, *args, grid, warmup, **options):
        found.append(run(self, *args, grid=grid, warmup=True, **options))

    triton.runtime.driver.set_active(_NoGpu(sm))
    with (
        mock.patch.object(JITFunction, "run", only_compile),
        mock.patch.object(triton_backend, "_chip", return_value=Chip(sm, SHARED_LIMIT[sm])),
    ):
        yield found


def figures(sm: int, call: Callable[[], object]) -> list[dict[str, Any]]:
    """Of each kernel that ``call`` launches: registers a thread, bytes spilled, shared memory, matmuls."""
    with launches(sm) as found, torch.no_grad():
        call()
    return [_figures(kernel, sm) for kernel in dict.fromkeys(found)]


def _figures(kernel: Any, sm: int) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    report = _ptxas(ptx, sm)
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert spill, report
    assert registers, report
    found = {
        "kernel": kernel.metadata.name.removeprefix("_"),
        "sm": sm,
        "warps": kernel.metadata.num_warps,
        "registers": int(registers[1]),
        "spill_stores": int(spill[1]),
        "spill_loads": int(spill[2]),
        "shared": kernel.metadata.shared,
        "shared_limit": SHARED_LIMIT[sm],
        "tensor_memory": getattr(kernel.metadata, "tmem_size", 0) or 0,  # columns, at most 512
        "matmuls": {name: ptx.count(name) for name in MATMULS if name in ptx},
    }
    if found["kernel"].startswith("resident"):
        found |= {"rows": tile_of(kernel).rows, "instructions": per_token_and_loop(kernel)}
    return found


def _ptxas(ptx: str, sm: int) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = tools / ("ptxas-blackwell" if sm >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "kernel.ptx")
        source.write_text(ptx)
        arch = f"sm_{sm}{'a' if sm >= 90 else ''}"
        command = [tool, "-v", f"--gpu-name={arch}", source, "-o", Path(scratch, "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
