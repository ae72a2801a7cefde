"""Choose the hidden columns of the resident kernels by compiling them: fewest warp instructions.

    python -m benchmarks.offline.tune_triton               # fills shift_kernels/backends/triton/tuned.json
    python -m benchmarks.offline.tune_triton --sm 90 --tiles 64x64 64x128 64x256
    python -m benchmarks.offline.tune_triton --missing     # goes on where it was stopped

What is spilled counts twice: as the instructions that it is, and again, since its load may wait. A
configuration that spills more than SPILLS is taken only where all do. Warps are given by the rows
(``tuned.warps``): more than one warp for each 16 rows would compute every chained product twice, which lowers
spills and no time. An entry that a device has measured (``benchmarks/gpu/tune.py``) is left alone. No GPU is
needed.

Stages of Triton's pipeline are not tried: a second one hides latency, which no count of instructions shows.
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

CHUNKS = (32, 64)
"""Hidden columns at a time. Once a kernel spills, more of them are not tried: they would be held, too."""
SPILLS = 1024  # bytes of spill stores a thread
DTYPE = torch.bfloat16


def compiled(
    config: tuned.Config, seq_len: int, d_model: int, sm: int, *, grad: bool
) -> dict[str, Any] | None:
    """Figures of a resident kernel; None where it does not fit at all."""
    resident_plan.plan.cache_clear()
    with mock.patch.object(tuned, "config", return_value=config):
        if not cases.fits(seq_len, d_model, DTYPE, sm, grad=grad):
            return None
        training = cases.fits(seq_len, d_model, DTYPE, sm, grad=True)
        call = functools.partial(cases.block, seq_len, d_model, DTYPE, grad=grad, training=training)
        try:
            found = next(row for row in figures(sm, call) if row["kernel"].startswith("resident"))
        except triton.runtime.errors.OutOfResources:
            return None
    empty = not found["matmuls"]  # what Triton makes of too much tensor memory
    if empty or found["shared"] > found["shared_limit"] or found["tensor_memory"] > 512:
        return None
    return found


def best(seq_len: int, d_model: int, sm: int, *, grad: bool) -> dict[str, Any] | None:
    """The configuration of fewest instructions, and what it takes and spills; None where none fits."""
    warps = tuned.warps(resident_plan.power_of_two(seq_len), DTYPE.itemsize)
    fitting: dict[tuned.Config, dict[str, Any]] = {}
    for chunk in CHUNKS:
        config = tuned.Config(warps, chunk)
        found = compiled(config, seq_len, d_model, sm, grad=grad)
        if found is None:
            break
        fitting[config] = found
        if found["spill_stores"]:
            break
    if not fitting:
        return None

    def cost(config: tuned.Config) -> tuple[bool, float]:
        row = fitting[config]
        waits = row["spill_stores"] / 2  # a store and a load of four bytes each
        return row["spill_stores"] > SPILLS, (row["instructions"] or float("inf")) + waits

    chosen = min(fitting, key=cost)
    kept = {name: fitting[chosen][name] for name in ("instructions", "spill_stores")}
    return chosen._asdict() | {"chosen_by": "compiling"} | kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = {f"{seq_len}x{d_model}": (seq_len, d_model) for seq_len, d_model in cases.TILES}
    parser.add_argument("--sm", type=int, nargs="+", choices=list(SHARED_LIMIT), default=list(SHARED_LIMIT))
    parser.add_argument("--tiles", nargs="+", choices=list(names), default=list(names))
    parser.add_argument("--missing", action="store_true", help="only what has no entry")
    args = parser.parse_args()
    for sm, name, grad in itertools.product(args.sm, args.tiles, (False, True)):
        seq_len, d_model = names[name]
        rows, d_pad = resident_plan.power_of_two(seq_len), resident_plan.power_of_two(d_model)
        shape = tuned.shape_class(rows, d_pad, DTYPE.itemsize, grad=grad)
        table = json.loads(tuned.TABLE.read_text())
        entries = table.setdefault(tuned.architecture(sm), {})
        measured = entries.get(shape, {}).get("chosen_by", "compiling") != "compiling"
        if measured or (args.missing and shape in entries):
            continue
        found = best(seq_len, d_model, sm, grad=grad)
        print(sm, shape, found or "does not fit", flush=True)
        entries.pop(shape, None)
        if found is not None:
            entries[shape] = found
        tuned.TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
