"""Registers, spills, memory and instructions of every CUDA kernel; what the planner gives the timed blocks.

python -m benchmarks.offline.compile_cuda            # builds what is not built yet -> JSON; no GPU
python -m benchmarks.offline.compile_cuda --shapes   # also the kernels for one shape, minutes

ptxas reports while it compiles (build_native.py keeps what it said beside each object), cuobjdump (Triton
brings one) shows the machine code, the planner is asked through the library.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import build_native
from benchmarks.gpu.cases import BLOCKS, Block
from benchmarks.offline.instructions import Repeated, listing, nested
from benchmarks.offline.limits import SHARED_LIMIT
from shift_kernels import BlockSpec, compiled
from shift_kernels.backends import cuda as cuda_backend
from shift_kernels.backends import cuda_shapes

RESULTS = Path(__file__).parents[1] / "results" / "offline" / "cuda.json"
SHAPE_SOURCE = build_native.ROOT / "csrc" / "cuda" / "shape.cu"
N_SMS = {80: 108, 90: 132}  # A100; H100 and H200 (SXM)
_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<sm>\d+)a?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill l.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)(?P<callees>(?:(?!Compiling entry).)*)",
    re.DOTALL,
)


def build() -> Path:
    """The library for the default architectures, compiled again only where something has changed."""
    library = build_native.SCRATCH / "offline" / "_native_cuda.so"
    build_native.build_cuda_library(library, archs=build_native.CUDA_ARCHS.split())
    return library


def kernels() -> list[dict[str, Any]]:
    """What ptxas said of every kernel on every architecture, of the last build."""
    rows = []
    for log in logs():
        code = instructions(log.with_suffix(".o"))
        found = list(_REPORT.finditer(log.read_text()))
        command = ["c++filt", *(match["name"] for match in found)]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        for match, name in zip(found, names, strict=True):
            rows.append({"object": log.stem} | _kernel(match, name) | code[int(match["sm"]), match["name"]])
    return rows


SHAPES = tuple(c for c in BLOCKS if c.seq_len <= 128 and (c.d_model <= 256 or c.kind == "trm"))
"""Cases whose kernels are compiled for their shape alone, for Hopper."""


def shape_kernels(library: Any) -> Iterator[dict[str, Any]]:
    """Of the kernels for one shape, forward and backward; each is compiled anew."""
    scratch = build_native.SCRATCH / "offline"
    scratch.mkdir(parents=True, exist_ok=True)
    for case, backward in itertools.product(SHAPES, (False, True)):
        spec, limits = BlockSpec(**case.options), cuda_backend.Limits(SHARED_LIMIT[90], N_SMS[90], sm90a=True)
        prepared = cuda_backend.prepared(
            library,
            spec,
            (case.batch, case.seq_len),
            (torch.bfloat16, torch.bfloat16),
            limits,
            "sm_90",
            own_loops=False,
            halting=False,
            backward=backward,
        )
        listed = scratch / f"{case.name}.txt"
        row = {"case": case.name} | shape_kernel(prepared.shape, listed)
        call = cuda_backend.sizes(
            spec, case.batch, case.seq_len, torch.bfloat16, torch.bfloat16, limits, library
        )
        call.own_kernel = True
        expected = loops(case, library.plan(call, backward=backward))
        if expected and not backward:
            warp = nested(listing(listed.with_suffix(".o").read_bytes()), expected)
            row["instructions_a_token"] = warp and round(warp / WARP_ROWS)
        yield row


WARP_ROWS = 16  # that a warp has of x in registers


def loops(case: Block, plan: Any) -> tuple[Repeated, ...] | None:
    """The loops within a forward's loop over t where x is in registers (arch/sm90a_registers.cuh)."""
    if plan.residual != "registers":
        return None
    spec = BlockSpec(**case.options)
    queries = plan.kv_heads * spec.n_heads // spec.n_kv_heads
    keys = 16 if case.seq_len <= 16 else 32  # InRegisters::KEYS
    rows = range(0, case.seq_len, WARP_ROWS)
    seen = [min(row + WARP_ROWS, case.seq_len) if spec.causal else case.seq_len for row in rows]
    steps = sum(-(-n // keys) for n in seen) / len(seen)
    columns = (queries + 2 * plan.kv_heads) * spec.head_dim
    projection = Repeated(-(-columns // 64))
    chunk = _loop(projection), _loop(Repeated(queries, (Repeated(steps),)))
    chunks = _loop(Repeated(spec.n_kv_heads // plan.kv_heads, (*chunk[0], *chunk[1])))
    return (*chunks, *_loop(Repeated(-(-plan.ff_pad // 64))))


def _loop(repeated: Repeated) -> tuple[Repeated, ...]:
    """A loop that is run once is none."""
    return (repeated,) if repeated.trips > 1 else repeated.inside


def shape_kernel(shape: cuda_shapes.Shape, listed: Path) -> dict[str, Any]:
    """Compiles one beside the file that will list its shape."""
    listed.write_text(",".join(map(str, shape.words)))
    target, before = listed.with_suffix(".o"), os.times()
    command = [*(build_native.nvcc() or ["nvcc"]), *build_native.CUDA_FLAGS, f"-arch={shape.arch}"]
    command += [*cuda_shapes.defined(shape, listed), "-c", "-o", str(target), str(SHAPE_SOURCE)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    after = os.times()
    words = said.stdout + said.stderr
    (match,) = _REPORT.finditer(words)
    (code,) = instructions(target).values()
    name = subprocess.run(["c++filt", match["name"]], capture_output=True, text=True, check=True).stdout
    spent = after.children_user - before.children_user
    return (
        _kernel(match, name)
        | code
        | {"waits_for_wgmma": "serialized" in words, "compile_cpu_s": round(spent, 1)}
    )


def logs() -> list[Path]:
    """What nvcc said of each object of the last build."""
    objects = build_native.cuda_objects(build_native.CUDA_ARCHS.split())
    return [build_native.SCRATCH / "cuda" / f"{name}.log" for name in objects]


def cuobjdump() -> Path | None:
    """The tool, from $PATH or the triton package, or None."""
    found = shutil.which("cuobjdump")
    if found is None and (triton := importlib.util.find_spec("triton")) and triton.origin:
        found = shutil.which(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return Path(found) if found else None


# Of the machine code, by the beginning or the end of an instruction's name.
COUNTED: dict[str, Callable[[str], bool]] = {
    "instructions": lambda name: True,
    "device_fences": lambda name: name.startswith("MEMBAR") and "GPU" in name,
    "l1_invalidations": lambda name: name == "CCTL.IVALL",
    "local_or_generic_loads": lambda name: name.split(".")[0] in ("LD", "LDL"),
    "calls": lambda name: name.startswith("CALL"),
}


def instructions(target: Path) -> dict[tuple[int, str], dict[str, int]]:
    """How many of each kind every function of an object has, by architecture and mangled name."""
    tool = cuobjdump()
    assert tool is not None, "needs cuobjdump"
    # It looks for its disassembler on the path.
    environment = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(tool), "-sass", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found, sm = {}, 0
    for function in re.split(r"\n(?=\s+Function : )", done.stdout):
        heading = re.match(r"\s+Function : (\w+)", function)
        if heading:
            names = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", function))
            found[sm, heading[1]] = {
                kind: sum(n for name, n in names.items() if counts(name)) for kind, counts in COUNTED.items()
            }
        # The architecture of the functions behind it.
        for arch in re.finditer(r"^arch = sm_(\d+)", function, re.MULTILINE):
            sm = int(arch[1])
    return found


def _kernel(match: re.Match[str], name: str) -> dict[str, Any]:
    """Spills are the kernel's own and those of the functions that it calls, once each."""
    shared = re.search(r"(\d+) bytes smem", match["rest"])
    stack = re.search(r"(\d+) bytes cumulative stack", match["rest"])
    spills = [match.group("stores", "loads")]
    spills += re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", match["callees"])
    return {
        "kernel": _short(name),
        "sm": int(match["sm"]),
        "registers": int(match["registers"]),
        "spill_stores": sum(int(stores) for stores, _ in spills),
        "spill_loads": sum(int(loads) for _, loads in spills),
        "stack": int(stack[1] if stack else match["stack"]),
        "static_shared": int(shared[1]) if shared else 0,
    }


def _short(demangled: str) -> str:
    """``kernel<bf16>``: no namespaces, and without the shape that it is for."""
    found = re.match(r"(?:void )?(?:\w+::)*(\w+)<(.*)>\(", demangled)
    assert found, demangled
    arguments = re.sub(r"\w+::", "", found[2]).split(", ")
    return f"{found[1]}<{', '.join(a for a in arguments if 'Shape' not in a)}>"


def plans(library: Any) -> Iterator[dict[str, Any]]:
    """The planner's answer for every timed block, either way; and for the kernel of its shape, if another."""
    for sm, case, backward in itertools.product(N_SMS, BLOCKS, (False, True)):
        call = cuda_backend.sizes(
            BlockSpec(**case.options),
            case.batch,
            case.seq_len,
            torch.bfloat16,
            torch.bfloat16,
            cuda_backend.Limits(SHARED_LIMIT[sm], N_SMS[sm], sm90a=sm == 90),
            library,
        )
        row = {"case": case.name, "direction": "backward" if backward else "forward", "sm": sm}
        found: list[dict[str, Any]] = []
        for own_kernel in (False, True):
            call.own_kernel = own_kernel
            plan = library.plan(call, backward=backward)
            reason = library.reason(plan)
            numbers = {name: getattr(plan, name) for name in plan.FIELDS[1:]}
            found.append(numbers if reason is None else {"refused": reason})
        yield row | {"kernel": "any shape"} | found[0]
        if found[1] != found[0]:
            yield row | {"kernel": "one shape"} | found[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--shapes", action="store_true", help="also compile the kernels for one shape")
    args = parser.parse_args()
    library, status = compiled.load("_native_cuda", build())
    assert library is not None, status
    found = {"built": status, "kernels": kernels(), "plans": list(plans(library))}
    known = json.loads(RESULTS.read_text()).get("shapes", []) if RESULTS.exists() else []
    found["shapes"] = list(shape_kernels(library)) if args.shapes else known
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
