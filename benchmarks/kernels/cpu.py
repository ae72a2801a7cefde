"""The cpu backend against the same block in plain PyTorch, eager and compiled.

    python -m benchmarks.kernels.cpu [--out benchmarks/results/cpu]      # cpu.json, cpu.md, cpu.png

Forward and backward of one causal pre-norm block with injection, float32. All take turns in one process, so
that a busy machine hurts them alike; each size and number of threads has a process of its own, because
torch.compile decides by them. Beside the times: the share of this core's float32 peak, measured in the same
process as the best of many large matrix products.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.baseline import PlainBlock
from shift_kernels import BlockSpec, LoopedBlock, info

WARM_UP, ROUNDS = 3, 15
THREADS = (1, 2)


@dataclasses.dataclass(frozen=True)
class Size:
    """A looped block of heads of 16 (32 from d_model 256 on) and an MLP of 4 d_model."""

    d_model: int
    seq_len: int
    batch: int
    n_loops: int

    @property
    def name(self) -> str:
        return f"d{self.d_model} n{self.seq_len} b{self.batch} T{self.n_loops}"

    @property
    def flops(self) -> int:
        """Matmul FLOPs of forward and backward, attention over all pairs."""
        per_token = 24 * self.d_model**2 + 4 * self.seq_len * self.d_model
        return 3 * self.batch * self.seq_len * self.n_loops * per_token


BASE = Size(64, 32, 32, 8)
SIZES = {  # what is varied -> sizes
    "d_model": [Size(d, 32, 32, 8) for d in (32, 64, 96, 128, 192, 256, 320)],
    "seq_len": [Size(64, n, 32, 8) for n in (8, 16, 17, 32, 33, 64, 128)],
    "T": [Size(64, 32, 32, t) for t in (1, 2, 4, 8, 12)],
    "batch": [Size(64, 32, b, 8) for b in (1, 4, 8, 32, 128)],
}


def step(module: torch.nn.Module, parameters: list, e: torch.Tensor, n_loops: int) -> Callable[[], object]:
    """A forward and backward pass."""
    grad = torch.ones_like(e)
    return lambda: torch.autograd.grad(module(e, n_loops), [e, *parameters], grad)


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def peak_gflops() -> float:
    """Best of many products that fit the caches."""
    a, b = torch.randn(768, 768), torch.randn(768, 768)
    return 2 * 768**3 / min(milliseconds(lambda: a @ b) for _ in range(30)) / 1e6


def measure(size: Size, threads: int) -> dict:
    """Median, quartiles and all rounds of each runner, ms."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    n_heads = size.d_model // (32 if size.d_model >= 256 else 16)
    block = LoopedBlock(BlockSpec(size.d_model, n_heads, injection="add"))
    e = torch.randn(size.batch, size.seq_len, size.d_model, requires_grad=True)
    modules = {"cpu": block, "eager": PlainBlock(block), "compile": PlainBlock(block).compile()}
    weights = list(block.parameters())
    steps = {name: step(module, weights, e, size.n_loops) for name, module in modules.items()}
    with torch.no_grad():  # the three compute the same thing
        expected = modules["eager"](e, size.n_loops)
        for name in ("cpu", "compile"):
            torch.testing.assert_close(modules[name](e, size.n_loops), expected, rtol=1e-3, atol=1e-3)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(WARM_UP + ROUNDS):
        for name, run in steps.items():
            took = milliseconds(run)
            if i >= WARM_UP:
                times[name].append(took)
    return dataclasses.asdict(size) | dict(
        name=size.name,
        threads=threads,
        ms=times,
        gflops=size.flops / statistics.median(times["cpu"]) / 1e6,
        peak_gflops=peak_gflops(),
    )


def table(rows: list[dict]) -> str:
    """Markdown: medians (quartiles), ours over the better of the others, share of the peak."""
    lines = ["| block | threads | cpu ms | eager ms | compile ms | over the better | of the peak |"]
    lines.append("|" + "---|" * 7)
    for r in rows:
        cells = []
        for values in r["ms"].values():
            low, middle, high = statistics.quantiles(values, n=4)
            cells.append(f"{middle:.1f} ({low:.1f}-{high:.1f})")
        cells += [f"{speedup(r):.2f}x", f"{r['gflops'] / r['peak_gflops']:.0%}"]
        lines.append(f"| {r['name']} | {r['threads']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speedup(row: dict) -> float:
    """Median of the better of eager and compile, over ours."""
    medians = {name: statistics.median(values) for name, values in row["ms"].items()}
    return min(medians["eager"], medians["compile"]) / medians["cpu"]


def plot(rows: list[dict], path: Path) -> None:
    """Our speed-up by d_model, seq_len, T and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_key = {(r["name"], r["threads"]): speedup(r) for r in rows}
    figure, axes = plt.subplots(1, len(SIZES), figsize=(13, 3), sharey=True, layout="constrained")
    for axis, (varied, sizes) in zip(axes, SIZES.items(), strict=True):
        field = "n_loops" if varied == "T" else varied
        for threads in THREADS:
            found = [
                (getattr(s, field), by_key[s.name, threads]) for s in sizes if (s.name, threads) in by_key
            ]
            axis.plot(*zip(*found, strict=True), marker="o", label=f"{threads} thread{'s' * (threads > 1)}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        ticks = [getattr(s, field) for s in sizes]
        axis.set_xticks(ticks, map(str, ticks), fontsize=7)
        axis.minorticks_off()
        axis.set_xlabel(varied)
    axes[0].set_ylabel("times faster than the better\nof eager and torch.compile")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    figure.suptitle(f"cpu backend, forward + backward, float32; else {BASE.name}", fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    parser.add_argument("--one", nargs=5, type=int, metavar=("D_MODEL", "SEQ_LEN", "BATCH", "T", "THREADS"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(Size(*args.one[:4]), args.one[4])))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for size in dict.fromkeys(size for sizes in SIZES.values() for size in sizes):
        for threads in THREADS:
            numbers = map(str, (*dataclasses.astuple(size), threads))
            command = [sys.executable, "-m", "benchmarks.kernels.cpu", "--one", *numbers]
            rows.append(
                json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            )
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    machine = {"processor": platform.processor() or platform.machine(), "report": info.report()}
    settings = {"warm_up": WARM_UP, "rounds": ROUNDS}
    (args.out / "cpu.json").write_text(json.dumps(machine | settings | {"rows": rows}, indent=1) + "\n")
    (args.out / "cpu.md").write_text(f"```\n{info.report()}\n```\n\n{table(rows)}\n")
    plot(rows, args.out / "cpu.png")


if __name__ == "__main__":
    main()
