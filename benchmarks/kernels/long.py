"""The cpu backend on long sequences, against plain PyTorch with its fused attention.

    python -m benchmarks.kernels.long [--out benchmarks/results/cpu]      # long.json, long.md

A causal pre-norm block with injection, one sequence, forward alone and with its backward, on one and two
threads. Both sides take turns in one process, so that a busy machine hurts them alike. Beside the times: how
much longer than at 1,024 tokens ours takes, over how much more arithmetic there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.kernels.cpu import step
from shift_kernels import info
from shift_kernels.bench.baseline import PlainBlock
from shift_kernels.bench.cases import block_of
from shift_kernels.bench.timing import interleave, speedup, spread

ROUNDS, N_LOOPS = 5, 4
WIDTHS = (64, 256)
LENGTHS = (1024, 1025, 2048, 4096)
THREADS = (1, 2)
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Case:
    """One sequence of ``seq_len`` tokens."""

    d_model: int
    seq_len: int
    threads: int
    dtype: str
    backward: bool

    @property
    def flops(self) -> int:
        """Matmul FLOPs; attention over the pairs that a causal mask leaves, with scores computed again in the
        backward."""
        products = 24 * self.d_model**2 * (3 if self.backward else 1)
        attention = 4 * self.d_model * (self.seq_len + 1) // 2 * (7 if self.backward else 2) // 2
        return N_LOOPS * self.seq_len * (products + attention)


def forward(module: torch.nn.Module, e: torch.Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return module(e, N_LOOPS)

    return run


def measure(case: Case) -> dict:
    """All rounds of both, ms."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    block = block_of(case.d_model).to(dtype)
    e = torch.randn(1, case.seq_len, case.d_model, dtype=dtype, requires_grad=True)
    modules = {"cpu": block, "eager": PlainBlock(block)}
    weights = list(block.parameters())
    steps = {
        name: step(module, weights, e, N_LOOPS) if case.backward else forward(module, e)
        for name, module in modules.items()
    }
    times = interleave(steps, ROUNDS, warm_up=1)
    return dataclasses.asdict(case) | {"flops": case.flops, "ms": times}


def table(rows: list[dict]) -> str:
    """Markdown: medians (quartiles), the speed-up, the growth over that of the arithmetic."""
    lines = ["| block | dtype | threads | pass | cpu ms | eager ms | speed-up | growth over arithmetic's |"]
    lines.append("|" + "---|" * 8)
    first: dict[tuple, dict] = {}
    for r in rows:
        base = first.setdefault((r["d_model"], r["threads"], r["dtype"], r["backward"]), r)
        grown = statistics.median(r["ms"]["cpu"]) / statistics.median(base["ms"]["cpu"])
        lines.append(
            f"| d{r['d_model']} n{r['seq_len']} T{N_LOOPS} | {r['dtype']} | {r['threads']} | "
            f"{'forward + backward' if r['backward'] else 'forward'} | "
            + " | ".join(spread(values, 1) for values in r["ms"].values())
            + f" | {speedup(r['ms'], 'cpu', ['eager']):.2f}x | {grown * base['flops'] / r['flops']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for dtype in args.dtypes:
        for d_model in WIDTHS:
            for threads in THREADS:
                for backward in (False, True):
                    for seq_len in LENGTHS:
                        rows.append(measure(Case(d_model, seq_len, threads, dtype, backward)))
                        print(table(rows).splitlines()[-1], flush=True)
    (args.out / "long.json").write_text(json.dumps({"report": info.report(), "rows": rows}, indent=1) + "\n")
    (args.out / "long.md").write_text(f"```\n{info.report()}\n```\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
