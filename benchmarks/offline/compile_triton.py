"""Compile every Triton kernel without a GPU; write registers, spills and shared memory.

python -m benchmarks.offline.compile_triton                          # everything -> JSON
python -m benchmarks.offline.compile_triton --sm 90 --only block     # replaces these rows alone
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.offline import cases
from benchmarks.offline.compiling import NAMES, figures
from benchmarks.offline.limits import SHARED_LIMIT

RESULTS = Path(__file__).parents[1] / "results" / "offline" / "triton.json"
COPIES = ("pack", "unpack")
ROW_KERNELS = ("add_norm", "norm_backward", "activation", "rotate")


def dtypes(sm: int) -> tuple[torch.dtype, ...]:
    """What is compiled: float32, which takes the longest, for Hopper alone."""
    return (torch.bfloat16, torch.float32) if sm == 90 else (torch.bfloat16,)


def block_rows(sm: int) -> Iterator[dict[str, Any]]:
    """Figures of the resident kernels on one architecture, and of the product that sums weight gradients."""
    for dtype, (seq_len, d_model), grad in itertools.product(dtypes(sm), cases.TILES, (False, True)):
        if cases.fits(seq_len, d_model, dtype, sm, grad=grad):
            yield from _block(
                f"block {seq_len}x{d_model} {NAMES[dtype]}", (seq_len, d_model, dtype), sm, grad
            )


def wide_rows(sm: int) -> Iterator[dict[str, Any]]:
    """The same of the block that holds most, where it is resident, and of one of wide heads alone."""
    tiles = ((64, 128), (64, 256))
    for (name, options), tile, grad in itertools.product(cases.WIDE.items(), tiles, (False, True)):
        if cases.fits(*tile, torch.bfloat16, sm, grad=grad, **options):
            yield from _block(
                f"{name} {tile[0]}x{tile[1]} bf16", (*tile, torch.bfloat16), sm, grad, **options
            )


def packed_rows(sm: int) -> Iterator[dict[str, Any]]:
    """Tiles that short sequences share, on Hopper: as planned where that takes fewer instructions."""
    for rows, seq_len, d_model, grad in cases.PACKED if sm == 90 else ():
        call = functools.partial(cases.packed, rows, seq_len, d_model, grad)
        yield from _named(f"packed-{rows} {seq_len}x{d_model} bf16", sm, call)


def attention_rows(sm: int) -> Iterator[dict[str, Any]]:
    """Figures of flash attention."""
    for dtype, head_dim in itertools.product(dtypes(sm), cases.HEAD_DIMS):
        call = functools.partial(cases.attention, head_dim, dtype)
        yield from _named(f"attention head_dim {head_dim} {NAMES[dtype]}", sm, call)


def layer_rows(sm: int) -> Iterator[dict[str, Any]]:
    """Figures of the streamed layer's row kernels."""
    for d_model in cases.WIDTHS:
        call = functools.partial(cases.layer, d_model, torch.bfloat16)
        rows = _named(f"layer d_model {d_model} bf16", sm, call)
        yield from (row for row in rows if row["kernel"] in ROW_KERNELS)


def _block(
    case: str, tile: tuple[int, int, torch.dtype], sm: int, grad: bool, **options: Any
) -> Iterator[dict[str, Any]]:
    # Where the backward is not resident, the forward is so in inference alone.
    training = cases.fits(*tile, sm, grad=True, **options)
    return _named(case, sm, functools.partial(cases.block, *tile, grad=grad, training=training, **options))


def _named(case: str, sm: int, call: Callable[[], object]) -> Iterator[dict[str, Any]]:
    return ({"case": case} | row for row in figures(sm, call) if row["kernel"] not in COPIES)


KINDS = {
    "block": block_rows,
    "wide": wide_rows,
    "packed": packed_rows,
    "attention": attention_rows,
    "layer": layer_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--sm", type=int, nargs="+", choices=list(SHARED_LIMIT), default=list(SHARED_LIMIT))
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    args = parser.parse_args()
    kept = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for sm, kind in itertools.product(args.sm, args.only):
        kept = [row for row in kept if row["sm"] != sm or row["case"].split()[0].split("-")[0] != kind]
        for row in KINDS[kind](sm):
            kept.append(row)
            print(json.dumps(row), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"triton": triton.__version__, "rows": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
