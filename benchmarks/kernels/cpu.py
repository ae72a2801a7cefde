"""The cpu backend against the same block in plain PyTorch, eager and compiled.

    python -m benchmarks.kernels.cpu [--out benchmarks/results/cpu]      # cpu.json, cpu.md, cpu.png

Forward and backward of one causal pre-norm block with injection, in float32 and in bfloat16. All take turns
in one process, so that a busy machine hurts them alike; each size, dtype and number of threads has a process
of its own, because torch.compile decides by them. Beside the times: the share of what the cores can do at
most, multiply-adds of registers (peak.cpp), measured right after.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from build_native import compiler
from shift_kernels import info
from shift_kernels.bench.baseline import PlainBlock
from shift_kernels.bench.cases import LIBRARY, block_of
from shift_kernels.bench.timing import interleave, speedup, spread

WARM_UP, ROUNDS = 2, 9
THREADS = (1, 2)
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Size:
    """Of :func:`shift_kernels.bench.cases.block_of`, and of what goes through it."""

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
WIDTHS = [Size(d, 32, 32, 8) for d in (64, 96, 128, 192, 256, 320)]
SIZES = {  # what is varied -> sizes
    "d_model": WIDTHS,
    "seq_len": [Size(64, n, 32, 8) for n in (17, 24, 32, 33, 64, 128)],
    "T": [Size(64, 32, 32, t) for t in (1, 4, 8, 12)],
    "batch": [Size(64, 32, b, 8) for b in (2, 8, 32, 128)],
}
ALL = list(dict.fromkeys(size for sizes in SIZES.values() for size in sizes))
# Every size with one thread in float32; the widths with everything.
RUNS = [(s, t, d) for d in DTYPES for t in THREADS for s in (ALL if (t, d) == (1, "float32") else WIDTHS)]


def step(module: torch.nn.Module, parameters: list, e: torch.Tensor, n_loops: int) -> Callable[[], object]:
    """A forward and backward pass."""
    grad = torch.ones_like(e)
    return lambda: torch.autograd.grad(module(e, n_loops), [e, *parameters], grad)


def peak_gflops(dtype: str, threads: int) -> float:
    """Of peak.cpp on that many cores; 0 without a compiler, or where there are no such instructions."""
    cxx = compiler()
    if cxx is None:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/peak"
        flags = ["-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-Wno-psabi"]
        subprocess.run([*cxx, *flags, str(Path(__file__).with_name("peak.cpp")), "-o", program], check=True)
        rates = subprocess.run([program], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return threads * float(rates[DTYPES.index(dtype)])


def measure(size: Size, threads: int, dtype: str) -> dict:
    """Median, quartiles and all rounds of each runner, ms."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    block = block_of(size.d_model).to(kind)
    e = torch.randn(size.batch, size.seq_len, size.d_model, dtype=kind, requires_grad=True)
    modules = {"cpu": block, "eager": PlainBlock(block), "compile": PlainBlock(block).compile()}
    weights = list(block.parameters())
    steps = {name: step(module, weights, e, size.n_loops) for name, module in modules.items()}
    with torch.no_grad():  # the three compute the same thing
        expected = modules["eager"](e, size.n_loops)
        tolerance = 1e-3 if dtype == "float32" else 0.1 * float(expected.abs().max())
        for name in ("cpu", "compile"):
            found = modules[name](e, size.n_loops)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    times = interleave(steps, ROUNDS, WARM_UP)
    return dataclasses.asdict(size) | dict(
        name=size.name,
        threads=threads,
        dtype=dtype,
        ms=times,
        gflops=size.flops / statistics.median(times["cpu"]) / 1e6,
        peak_gflops=peak_gflops(dtype, threads),
    )


def table(rows: list[dict]) -> str:
    """Markdown: medians (quartiles), ours over the better of the others, share of the peak."""
    lines = ["| block | dtype | threads | cpu ms | eager ms | compile ms | over the better | of the peak |"]
    lines.append("|" + "---|" * 8)
    for r in rows:
        cells = [spread(values, 1) for values in r["ms"].values()]
        cells.append(f"{speedup(r['ms'], 'cpu', LIBRARY):.2f}x")
        cells.append(f"{r['gflops'] / r['peak_gflops']:.0%}" if r["peak_gflops"] else "-")
        lines.append(f"| {r['name']} | {r['dtype']} | {r['threads']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Our speed-up by d_model, seq_len, T and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_key = {(r["name"], r["threads"], r["dtype"]): speedup(r["ms"], "cpu", LIBRARY) for r in rows}
    figure, axes = plt.subplots(1, len(SIZES), figsize=(13, 3), sharey=True, layout="constrained")
    for axis, (varied, sizes) in zip(axes, SIZES.items(), strict=True):
        field = "n_loops" if varied == "T" else varied
        for dtype in DTYPES:
            for threads in THREADS:
                found = [
                    (getattr(s, field), by_key[s.name, threads, dtype])
                    for s in sizes
                    if (s.name, threads, dtype) in by_key
                ]
                if len(found) > 1:
                    label = f"{dtype}, {threads} thread{'s' * (threads > 1)}"
                    axis.plot(*zip(*found, strict=True), marker="o", label=label)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        values = sorted(getattr(s, field) for s in sizes)
        # The label of 33 would lie on that of 32.
        ticks = [x for before, x in zip([0, *values], values, strict=False) if x > 1.1 * before]
        axis.set_xticks(ticks, map(str, ticks), fontsize=7)
        axis.minorticks_off()
        axis.set_xlabel(varied)
    axes[0].set_ylabel("times faster than the better\nof eager and torch.compile")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"cpu backend, forward + backward; else {BASE.name}", fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    one = ("D_MODEL", "SEQ_LEN", "BATCH", "T", "THREADS", "DTYPE")
    parser.add_argument("--one", nargs=6, metavar=one, help="measure this and print it as JSON")
    args = parser.parse_args()
    if args.one:
        *size, threads = map(int, args.one[:5])
        print(json.dumps(measure(Size(*size), threads, args.one[5])))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for size, threads, dtype in RUNS:
        numbers = map(str, (*dataclasses.astuple(size), threads))
        command = [sys.executable, "-m", "benchmarks.kernels.cpu", "--one", *numbers, dtype]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    machine = {"processor": platform.processor() or platform.machine(), "report": info.report()}
    settings = {"warm_up": WARM_UP, "rounds": ROUNDS}
    (args.out / "cpu.json").write_text(json.dumps(machine | settings | {"rows": rows}, indent=1) + "\n")
    (args.out / "cpu.md").write_text(f"```\n{info.report()}\n```\n\n{table(rows)}\n")
    plot(rows, args.out / "cpu.png")


if __name__ == "__main__":
    main()
