"""Compile the resident Triton kernels without a GPU and read registers, spills and shared memory.

    python -m benchmarks.offline.compile_triton            # all tiles, sm_80 sm_90 sm_100 -> JSON

Figures are for the installed Triton's own ptxas. They say what fits on chip; they are no times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shift_kernels import BlockSpec
from shift_kernels.triton import resident_plan
from shift_kernels.triton.resident_backward import resident_backward
from shift_kernels.triton.resident_forward import resident_forward

RESULTS = Path(__file__).parents[1] / "results" / "offline" / "triton_resident.json"
TILES = ((32, 64), (64, 64), (64, 128), (128, 64), (128, 128), (64, 256))  # seq_len, d_model
HEAD_DIM = 32
# Shared memory that a block may use, bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def signature(kernel, tile: resident_plan.Tile, dtype: torch.dtype, flags: dict[str, bool]):
    """Types, constants and alignments of a kernel's arguments, as the launcher would find them."""
    operand = {"W", "E", "H", "SAVED", "GRAD_H", *(name.upper() for name in resident_plan.OPERANDS)}
    whole = {"LOOPS", "LENS", "USED"}
    types, constants, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name == "S" or name in flags:
            types[name] = "constexpr"
            constants[(i,)] = tile if name == "S" else flags[name]
        elif name.isupper():
            types[name] = f"*{NAMES[dtype] if name in operand else 'i64' if name in whole else 'fp32'}"
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32" if name == "threshold" else "i32"
    return types, constants, aligned


def figures(
    kernel, tile: resident_plan.Tile, dtype: torch.dtype, flags: dict[str, bool], sm: int, num_warps: int
) -> dict[str, Any]:
    """Compile one kernel; registers a thread, bytes spilled, bytes of shared memory, matmul instructions."""
    types, constants, aligned = signature(kernel, tile, dtype, flags)
    compiled = triton.compile(
        ASTSource(kernel, types, constants, aligned),
        target=GPUTarget("cuda", sm, 32),
        options=dict(num_warps=num_warps, num_stages=1),
    )
    ptx = compiled.asm["ptx"]
    report = _ptxas(ptx, sm)
    spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert spill, report
    assert registers, report
    return {
        "sm": sm,
        "rows": tile.rows,
        "d_pad": tile.d_pad,
        "dtype": NAMES[dtype],
        "ff_chunk": tile.ff_chunk,
        "warps": num_warps,
        "registers": int(registers[1]),
        "spill_stores": int(spill[1]),
        "spill_loads": int(spill[2]),
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[sm],
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0,  # columns, at most 512
        "instructions": {i: ptx.count(i) for i in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if i in ptx},
    }


def _ptxas(ptx: str, sm: int) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = tools / ("ptxas-blackwell" if sm >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "kernel.ptx")
        source.write_text(ptx)
        arch = f"sm_{sm}{'a' if sm >= 90 else ''}"
        command = [tool, "-v", f"--gpu-name={arch}", source, "-o", Path(scratch, "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def forward(seq_len: int, d_model: int, dtype: torch.dtype, sm: int, **spec) -> dict[str, Any]:
    """Figures of the forward kernel for one tile, as in training."""
    tile = _tile(seq_len, d_model, dtype, grad=False, **spec)
    flags = dict(own_loops=False, ragged=False, keep_all=False, save=True, halt=False)
    warps = resident_plan.warps(tile, dtype.itemsize, grad=False)
    return {"kernel": "forward"} | figures(resident_forward, tile, dtype, flags, sm, warps)


def backward(seq_len: int, d_model: int, dtype: torch.dtype, sm: int, **spec) -> dict[str, Any]:
    """Figures of the backward kernel for one tile."""
    tile = _tile(seq_len, d_model, dtype, grad=True, **spec)
    flags = dict(own_loops=False, ragged=False, keep_all=False)
    warps = resident_plan.warps(tile, dtype.itemsize, grad=True)
    return {"kernel": "backward"} | figures(resident_backward, tile, dtype, flags, sm, warps)


def _spec(d_model: int, **options) -> BlockSpec:
    return BlockSpec(d_model=d_model, n_heads=max(1, d_model // HEAD_DIM), **options)


def _tile(seq_len: int, d_model: int, dtype: torch.dtype, *, grad: bool, **spec) -> resident_plan.Tile:
    return resident_plan.tile(
        _spec(d_model, **spec),
        seq_len,
        batch=1,
        itemsize=dtype.itemsize,
        pack=False,
        precision="ieee",
        grad=grad,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90, 100])
    args = parser.parse_args()
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for sm, (seq_len, d_model) in itertools.product(args.sm, TILES):
            for kernel in (forward, backward):
                grad = kernel is backward
                if (
                    resident_plan.too_large(_spec(d_model), seq_len, dtype, grad=grad, capability=sm // 10)
                    is None
                ):
                    rows.append(kernel(seq_len, d_model, dtype, sm))
                    print(json.dumps(rows[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
