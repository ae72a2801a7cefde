"""What a switch costs: a user of torch.compile, who compiles for every number of loops, and here.

    python -m benchmarks.savings.recompile --out benchmarks/results/savings/recompile.json

The block of the demo and one of the same sizes in plain PyTorch, ``for _ in range(n_loops)`` under
torch.compile with a cache folder of its own, take training steps with the T's in turn. The first step with a
T stalls for what is compiled; later ones tell what a step costs. Each side has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shift.report.document import Table
from shift.report.words import duration
from shift.run.files import json_bytes, replace_atomically
from shift.run.summary import environment
from shift_kernels import BlockSpec, LoopedBlock

LOOPS = (1, 2, 4, 8)
BATCH, SEQ_LEN = 64, 32
SPEC = BlockSpec(d_model=64, n_heads=4, injection="add")
REPEATS = 20
SIDES = ("torch.compile", "eager", "ours")


class Plain(nn.Module):
    """A looped block as one writes it without us."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LoopedBlock(SPEC).to_torch()

    def forward(self, e: Tensor, n_loops: int) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(e.shape[1])
        h = torch.zeros_like(e)
        for _ in range(n_loops):
            h = self.layer(h + e, src_mask=mask, is_causal=True)
        return h


def measure(side: str) -> list[dict[str, Any]]:
    """A row a T, in the order in which they come: seconds of its first step and of a later one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        model: nn.Module = LoopedBlock(SPEC) if side == "ours" else Plain()
        run: Callable[..., Tensor] = torch.compile(model) if side == "torch.compile" else model
        optimizer = torch.optim.AdamW(model.parameters())
        e = torch.randn(BATCH, SEQ_LEN, SPEC.d_model)

        def step(n_loops: int) -> float:
            begin = time.perf_counter()
            optimizer.zero_grad()
            run(e, n_loops).square().mean().backward()
            optimizer.step()
            return time.perf_counter() - begin

        rows = []
        for n_loops in LOOPS:
            first = step(n_loops)
            later = statistics.median(step(n_loops) for _ in range(REPEATS))
            rows.append({"side": side, "n_loops": n_loops, "first_s": first, "later_s": later})
        return rows


def stalls(path: Path) -> Table:
    """A row a T: the stall of its first step over a later one, and what a later one takes."""
    found = json.loads(path.read_text())
    by = {(row["side"], row["n_loops"]): row for row in found["rows"]}
    rows = [
        [str(n)]
        + [duration(max(0.0, by[side, n]["first_s"] - by[side, n]["later_s"])) for side in SIDES]
        + [f"{1e3 * by[side, n]['later_s']:.1f}" for side in SIDES]
        for n in LOOPS
    ]
    stall, step = ([f"{words}, {side}" for side in SIDES] for words in ("stall", "later steps, ms"))
    return Table(["T", *stall, *step], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    context = multiprocessing.get_context("spawn")
    rows = []
    for side in SIDES:
        with context.Pool(1) as pool:
            rows += pool.apply(measure, (side,))
        print(*rows[-len(LOOPS) :], sep="\n", flush=True)
    replace_atomically(args.out, json_bytes(environment(torch.device("cpu")) | {"rows": rows}))


if __name__ == "__main__":
    main()
