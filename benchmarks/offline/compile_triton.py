"""Compile every Triton kernel without a GPU; write registers, spills and shared memory.

python -m benchmarks.offline.compile_triton            # sm_80 sm_90 sm_100 -> JSON
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.offline import cases
from benchmarks.offline.compiling import NAMES, figures
from benchmarks.offline.limits import SHARED_LIMIT

RESULTS = Path(__file__).parents[1] / "results" / "offline" / "triton.json"
ROW_KERNELS = ("add_norm", "norm_backward", "activation", "rotate")
DTYPES = (torch.bfloat16, torch.float32)


def rows(sm: int) -> Iterator[dict[str, Any]]:
    """Figures of every kernel on one architecture."""
    for dtype, (seq_len, d_model), grad in itertools.product(DTYPES, cases.TILES, (False, True)):
        if cases.fits(seq_len, d_model, dtype, sm, grad=grad):
            # Where the backward is not resident, the forward is so in inference alone.
            training = cases.fits(seq_len, d_model, dtype, sm, grad=True)
            call = functools.partial(cases.block, seq_len, d_model, dtype, grad=grad, training=training)
            for found in figures(sm, call):
                yield {"case": f"block {seq_len}x{d_model} {NAMES[dtype]}"} | found
    for dtype, head_dim in itertools.product(DTYPES, cases.HEAD_DIMS):
        for found in figures(sm, lambda: cases.attention(head_dim, dtype)):  # noqa: B023
            yield {"case": f"attention head_dim {head_dim} {NAMES[dtype]}"} | found
    for d_model in cases.WIDTHS:
        for found in figures(sm, lambda: cases.layer(d_model, torch.bfloat16)):  # noqa: B023
            if found["kernel"] in ROW_KERNELS:
                yield {"case": f"layer d_model {d_model} bf16"} | found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--sm", type=int, nargs="+", choices=list(SHARED_LIMIT), default=list(SHARED_LIMIT))
    args = parser.parse_args()
    found = []
    for row in itertools.chain.from_iterable(map(rows, args.sm)):
        found.append(row)
        print(json.dumps(row), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"triton": triton.__version__, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
