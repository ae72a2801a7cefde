"""Choose the hidden columns and stages of the resident kernels by compiling them: fewest warp instructions.

    python -m benchmarks.offline.tune_triton               # fills shift_kernels/backends/triton/tuned.json

A configuration that spills more than SPILLS is taken only where all do: spilled bytes are counted as the
instructions that they are, yet a spill may wait. Warps are given by the rows (``tuned.warps``): more than one
warp for each 16 rows would compute every chained product more than once, which lowers spills and no time. An
entry that a device has measured (``benchmarks/gpu/tune.py``) is left alone. No GPU is needed.
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

CHUNKS, STAGES = (32, 64), (1,)
SPILLS = 1024  # bytes of spill stores a thread


def compiled(
    config: tuned.Config, seq_len: int, d_model: int, dtype: torch.dtype, sm: int, *, grad: bool
) -> dict[str, Any] | None:
    """Figures of a resident kernel; None where it does not fit at all."""
    resident_plan.plan.cache_clear()
    with mock.patch.object(tuned, "config", return_value=config):
        try:
            training = cases.fits(seq_len, d_model, dtype, sm, grad=True)
            call = functools.partial(cases.block, seq_len, d_model, dtype, grad=grad, training=training)
            found = next(row for row in figures(sm, call) if row["kernel"].startswith("resident"))
        except triton.runtime.errors.OutOfResources:
            return None
    empty = dtype.itemsize == 2 and not found["matmuls"]  # what Triton makes of too much tensor memory
    if empty or found["shared"] > found["shared_limit"] or found["tensor_memory"] > 512:
        return None
    return found


def best(seq_len: int, d_model: int, dtype: torch.dtype, sm: int, *, grad: bool) -> dict[str, Any]:
    """The configuration of fewest instructions, and what it takes and spills."""
    rows = resident_plan.power_of_two(seq_len)
    warps = tuned.warps(rows, dtype.itemsize)
    candidates = [tuned.Config(warps, *rest) for rest in itertools.product(CHUNKS, STAGES)]
    found = {c: compiled(c, seq_len, d_model, dtype, sm, grad=grad) for c in candidates}
    fitting = {c: row for c, row in found.items() if row is not None}
    chosen = min(fitting, key=lambda c: (fitting[c]["spill_stores"] > SPILLS, fitting[c]["instructions"]))
    kept = {name: fitting[chosen][name] for name in ("instructions", "spill_stores")}
    return chosen._asdict() | {"chosen_by": "compiling"} | kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sm", type=int, nargs="+", choices=list(SHARED_LIMIT), default=list(SHARED_LIMIT))
    args = parser.parse_args()
    for sm, (seq_len, d_model), grad in itertools.product(args.sm, cases.TILES, (False, True)):
        if not cases.fits(seq_len, d_model, torch.bfloat16, sm, grad=grad):
            continue
        rows, d_pad = resident_plan.power_of_two(seq_len), resident_plan.power_of_two(d_model)
        shape = tuned.shape_class(rows, d_pad, 2, grad=grad)
        table = json.loads(tuned.TABLE.read_text())
        family = table.setdefault(tuned.architecture(sm), {})
        if family.get(shape, {}).get("chosen_by", "compiling") == "compiling":
            family[shape] = best(seq_len, d_model, torch.bfloat16, sm, grad=grad)
            print(sm, shape, family[shape], flush=True)
            tuned.TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
