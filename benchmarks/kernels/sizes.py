"""The cpu backend on one sequence of every size, against plain PyTorch, for one instruction set.

    python -m benchmarks.kernels.sizes --isa best|avx2 [--out benchmarks/results/cpu]   # sizes_<isa>.*

Forward and backward of a causal pre-norm block with injection, one thread, by processor time. Both sides take
turns in one process and both are held to the instruction set: PyTorch's own kernels, MKL and oneDNN by their
variables. (On AMD's processors MKL takes the same kernels in any case.) Without AVX-512 PyTorch has no fast
products in bfloat16, so that AVX2 is measured in float32 alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks.kernels.cpu import Size, step
from shift_kernels import info
from shift_kernels.backends.cpu import _NATIVE as NATIVE
from shift_kernels.backends.cpu import CPU
from shift_kernels.bench.baseline import PlainBlock
from shift_kernels.bench.cases import block_of
from shift_kernels.bench.timing import interleave, speedup, spread
from shift_kernels.call import Problem

WIDTHS = (32, 64, 128, 256, 512, 1024)
LENGTHS = (1, 16, 64, 256, 1024, 4096)
LOOPS = (1, 2)
"""T; sequences over :data:`LONG` have the larger one alone."""
LONG = 256
LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 3, 25, 0.6
"""Rounds of a size: as many as take so long."""
LIMITS = {
    "best": {},
    "avx2": {
        "SHIFT_KERNELS_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}
DTYPES = {"best": ("float32", "bfloat16"), "avx2": ("float32",)}


def measure(size: Size, dtype: str) -> dict:
    """All rounds of both, ms of processor time, and what ``auto`` takes."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    block = block_of(size.d_model).to(kind)
    e = torch.randn(size.batch, size.seq_len, size.d_model, dtype=kind, requires_grad=True)
    modules = {"cpu": functools.partial(block, backend="cpu"), "eager": PlainBlock(block)}
    weights = list(block.parameters())
    steps = {name: step(module, weights, e, size.n_loops) for name, module in modules.items()}
    start = time.perf_counter()
    interleave(steps, 1, warm_up=0)
    rounds = int(SECONDS / (time.perf_counter() - start))
    times = interleave(steps, min(max(rounds, LEAST_ROUNDS), MOST_ROUNDS), warm_up=0, clock=time.process_time)
    problem = Problem(block.spec, 1, size.seq_len, kind, kind, e.device, grad=True, n_loops=size.n_loops)
    no = CPU.why_not(problem)
    return dataclasses.asdict(size) | {"dtype": dtype, "ms": times, "auto": "torch" if no else "cpu"}


def table(rows: list[dict]) -> str:
    """Markdown: medians (quartiles), and eager's time over ours."""
    lines = ["| block | dtype | cpu ms | eager ms | over eager |", "|---|---|---|---|---|"]
    for r in rows:
        name = f"d{r['d_model']} n{r['seq_len']} T{r['n_loops']}"
        cells = [spread(values) for values in r["ms"].values()]
        over = speedup(r["ms"], "cpu", ["eager"])
        auto = "" if r["auto"] == "cpu" else f" ({r['auto']} by auto)"
        lines.append(f"| {name} | {r['dtype']} | {' | '.join(cells)} | {over:.2f}x{auto} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--isa", choices=LIMITS, default="best")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    args = parser.parse_args()
    limits = LIMITS[args.isa]
    if any(os.environ.get(name) != value for name, value in limits.items()):  # read when the libraries load
        command = [sys.executable, "-m", "benchmarks.kernels.sizes", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **limits})
    if args.isa != "best":
        assert NATIVE.best_isa() == args.isa, NATIVE.best_isa()
        assert torch.backends.cpu.get_cpu_capability() == args.isa.upper()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for dtype in DTYPES[args.isa]:
        for d_model in WIDTHS:
            for seq_len in LENGTHS:
                for n_loops in LOOPS if seq_len <= LONG else LOOPS[-1:]:
                    rows.append(measure(Size(d_model, seq_len, 1, n_loops), dtype))
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
    path = args.out / f"sizes_{args.isa}.json"
    path.write_text(json.dumps({"report": info.report(), "rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"```\n{info.report()}\n```\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
