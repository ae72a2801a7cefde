"""Choose warps and hidden columns of the resident kernels by compiling them: fewest bytes spilled.

    python -m benchmarks.offline.tune_triton               # fills shift_kernels/backends/triton/tuned.json

The planner's own choice stays unless it spills a tenth more than the best. An entry that a device has
measured (``benchmarks/gpu/tune.py``) is left alone. No GPU is needed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from typing import Any
from unittest import mock

import torch
import triton

from benchmarks.offline import cases
from benchmarks.offline.compiling import figures
from benchmarks.offline.limits import SHARED_LIMIT
from shift_kernels.backends.triton import resident_plan, tuned

WARPS, CHUNKS = (4, 8), (16, 32, 64)  # 16 warps leave 128 registers a thread: every tile spilled more
WORTH = 1.1  # spills of the safe choice over the best, below which it stays


def spilled(
    config: tuned.Config, seq_len: int, d_model: int, dtype: torch.dtype, sm: int, *, grad: bool
) -> int:
    """Bytes a thread stores to and loads from spills; very many where it does not fit at all."""
    with mock.patch.object(tuned, "config", return_value=config):
        try:
            training = cases.fits(seq_len, d_model, dtype, sm, grad=True)
            call = functools.partial(cases.block, seq_len, d_model, dtype, grad=grad, training=training)
            (found,) = figures(sm, call)
        except triton.runtime.errors.OutOfResources:
            return 2**31
    empty = dtype.itemsize == 2 and not found["matmuls"]  # what Triton makes of too much tensor memory
    if empty or found["shared"] > found["shared_limit"] or found["tensor_memory"] > 512:
        return 2**31
    return found["spill_stores"] + found["spill_loads"]


def best(seq_len: int, d_model: int, dtype: torch.dtype, sm: int, *, grad: bool) -> dict[str, Any]:
    """The configuration that spills least, and what it spills."""
    rows, d_pad = resident_plan.power_of_two(seq_len), resident_plan.power_of_two(d_model)
    safe = tuned.safe(rows, d_pad, dtype.itemsize, grad=grad)
    others = (tuned.Config(*pair) for pair in itertools.product(WARPS, CHUNKS))
    candidates = list(dict.fromkeys((safe, *others)))
    spills = [spilled(c, seq_len, d_model, dtype, sm, grad=grad) for c in candidates]
    chosen = 0 if spills[0] <= WORTH * min(spills) else spills.index(min(spills))
    return candidates[chosen]._asdict() | {"chosen_by": "compiling", "spilled_bytes": spills[chosen]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sm", type=int, nargs="+", choices=list(SHARED_LIMIT), default=list(SHARED_LIMIT))
    args = parser.parse_args()
    for sm, dtype, (seq_len, d_model), grad in itertools.product(
        args.sm, (torch.bfloat16, torch.float32), cases.TILES, (False, True)
    ):
        if not cases.fits(seq_len, d_model, dtype, sm, grad=grad):
            continue
        rows, d_pad = resident_plan.power_of_two(seq_len), resident_plan.power_of_two(d_model)
        shape = tuned.shape_class(rows, d_pad, dtype.itemsize, grad=grad)
        table = json.loads(tuned.TABLE.read_text())
        family = table.setdefault(tuned.family(sm // 10), {})
        if family.get(shape, {}).get("chosen_by", "compiling") == "compiling":
            family[shape] = best(seq_len, d_model, dtype, sm, grad=grad)
            print(sm, shape, family[shape], flush=True)
            tuned.TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
