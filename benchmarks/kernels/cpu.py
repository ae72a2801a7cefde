"""The cpu backend against eager PyTorch: ``python -m benchmarks.kernels.cpu``. Prints one Markdown table.

Forward and backward of one looped block, float32; the two take turns in one process, so that a busy machine
hurts both; medians and quartiles of 15 rounds after 2 of warm-up.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch

from shift_kernels import BlockSpec, LoopedBlock, backends

CASES = [  # d_model, seq_len, batch, n_loops, n_heads
    (64, 16, 64, 1, 4),
    (64, 16, 64, 4, 4),
    (64, 64, 32, 12, 4),
    (128, 64, 16, 12, 4),
    (256, 64, 16, 12, 8),
]
WARM_UP, ROUNDS = 2, 15


def step(block: LoopedBlock, e: torch.Tensor, n_loops: int, backend: str) -> Callable[[], object]:
    """A forward and backward pass."""
    inputs, grad = [e, *block.parameters()], torch.ones_like(e)
    return lambda: torch.autograd.grad(block(e, n_loops, backend=backend), inputs, grad)


def times(steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of every round, taking turns."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(WARM_UP + ROUNDS):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            if i >= WARM_UP:
                found[name].append(1e3 * (time.perf_counter() - start))
    return found


def cell(measured: dict[str, list[float]]) -> str:
    """Median (quartiles) of both, and their ratio."""
    texts = []
    for values in measured.values():
        low, middle, high = statistics.quantiles(values, n=4)
        texts.append(f"{middle:.1f} ({low:.1f}-{high:.1f})")
    ratio = statistics.median(measured["torch"]) / statistics.median(measured["cpu"])
    return " / ".join(texts) + f", {ratio:.2f}x"


def main() -> None:
    isa = torch.backends.cpu.get_cpu_capability()
    print(f"{platform.machine()}, {isa}, torch {torch.__version__}, {backends()}")
    print("| d_model, seq_len, batch, T | 1 thread: cpu / torch | 2 threads: cpu / torch |\n|---|---|---|")
    for d_model, seq_len, batch, n_loops, n_heads in CASES:
        torch.manual_seed(0)
        block = LoopedBlock(BlockSpec(d_model, n_heads, causal=False, injection="add"))
        e = torch.randn(batch, seq_len, d_model, requires_grad=True)
        cells = []
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            cells.append(cell(times({name: step(block, e, n_loops, name) for name in ("cpu", "torch")})))
        print(f"| {d_model}, {seq_len}, {batch}, {n_loops} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
