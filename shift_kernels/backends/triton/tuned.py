"""Warps and hidden columns at a time of the resident kernels, by GPU architecture and shape class.

``tuned.json`` holds what was found: fewest warp instructions, by compiling for the architecture
(``benchmarks/offline/tune_triton.py``), or least time, on a device (``benchmarks/gpu/tune.py``).
What it does not hold takes :func:`safe`.
Nothing is tuned when a kernel is imported or called.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("tuned.json")


class Config(NamedTuple):
    """Warps a program; hidden columns of the MLP at a time (a power of two); stages of Triton's pipeline."""

    warps: int
    ff_chunk: int
    stages: int = 1


def architecture(sm: int) -> str:
    """Name of a GPU architecture, by its compute capability: 86 for 8.6."""
    return f"sm_{sm}"


def shape_class(rows: int, d_pad: int, itemsize: int, *, grad: bool) -> str:
    """Name of what one configuration serves: kernel, tile, bytes of a matmul operand."""
    return f"{'backward' if grad else 'forward'} {rows}x{d_pad} {8 * itemsize}-bit"


def config(rows: int, d_pad: int, itemsize: int, *, grad: bool, sm: int) -> Config:
    """The configuration of a kernel on an architecture."""
    found = table().get(nearest(sm, table()), {}).get(shape_class(rows, d_pad, itemsize, grad=grad))
    return safe(rows, d_pad, itemsize, grad=grad) if found is None else found


def nearest(sm: int, names: Iterable[str]) -> str:
    """Of the listed architectures the newest that ``sm`` is a minor revision of; ``sm`` where none is."""
    known = [int(name.removeprefix("sm_")) for name in names]
    return architecture(max((k for k in known if k // 10 == sm // 10 and k <= sm), default=sm))


def warps(rows: int, itemsize: int) -> int:
    """Warps of a program of so many rows.

    A product that feeds another has all warps along its rows, 16 rows each: with more warps than that all of
    them would be computed twice. fp32 operands are multiplied by the ordinary units, from registers, which
    are then what is short.
    """
    return 8 if itemsize == 4 else max(1, min(8, rows // 16))


def safe(rows: int, d_pad: int, itemsize: int, *, grad: bool) -> Config:
    """The residual tile must fit a program's registers, beside one branch's work: small chunks."""
    if itemsize == 4:
        return Config(warps(rows, itemsize), 16 if grad else 32)
    return Config(warps(rows, itemsize), 64 if rows * d_pad <= 64 * 64 and not grad else 32)


@functools.cache
def table() -> dict[str, dict[str, Config]]:
    """The found configurations: architecture -> shape class -> configuration."""
    architectures = json.loads(TABLE.read_text())
    return {
        name: {shape: Config(*(entry[field] for field in Config._fields)) for shape, entry in classes.items()}
        for name, classes in architectures.items()
    }
