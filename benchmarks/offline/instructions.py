"""Warp instructions of a resident kernel for a token and a loop: what its issue slots are spent on.

Counted in SASS: each innermost loop's instructions times its trips, plus the rest of the loop over t. The
prologue, once a launch, is left out. A floor of the time, not the time: no instruction waits for anything.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

from shift_kernels.backends.triton.resident_plan import Tile

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def per_token_and_loop(kernel: Any) -> int | None:
    """Of a compiled resident forward or backward; None where its loops are not those of one plain layer."""
    tile = tile_of(kernel)
    trips = [tile.n_kv_heads, *([tile.ff_end // tile.ff_chunk] if tile.d_ff else [])]
    if kernel.metadata.name == "resident_backward":  # which walks the MLP first, and rows before and after
        steps = tile.rows // tile.step
        trips = [n for branch in reversed(trips) for n in (steps, branch, steps)]
    count = weighted(listing(kernel.asm["cubin"]), [n for n in trips if n > 1])
    return count and round(count * kernel.metadata.num_warps / tile.rows)


def tile_of(kernel: Any) -> Tile:
    """The tile that a resident kernel was compiled for."""
    return next(value for value in kernel.src.constants.values() if isinstance(value, Tile))


def listing(cubin: bytes) -> list[tuple[int, str]]:
    """Address and text of each instruction."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "kernel.cubin")
        path.write_bytes(cubin)
        sass = subprocess.run(
            [TOOLS / "cuobjdump", "-sass", path], capture_output=True, text=True, check=True
        )
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.+?) ?;", sass.stdout)
    return [(int(address, 16), text) for address, text in found]


def weighted(code: list[tuple[int, str]], trips: list[int]) -> int | None:
    """Instructions of the outermost loop, its innermost ones ``trips`` times each, by address."""
    loops = loops_of(code)
    if not loops:
        return None
    outer = max(loops, key=lambda loop: sum(loop[0] <= a and b <= loop[1] for a, b in loops))
    inside = [loop for loop in loops if _within(loop, outer) and loop != outer]
    inner = sorted(a for a in inside if not any(b != a and _within(b, a) for b in inside))
    if len(inner) != len(trips):
        return None
    return _size(code, outer) + sum((n - 1) * _size(code, loop) for loop, n in zip(inner, trips, strict=True))


@dataclasses.dataclass(frozen=True)
class Repeated:
    """How often a loop is run whenever it is come to, on average; and the loops in it, in their order."""

    trips: float
    inside: tuple[Repeated, ...] = ()


def nested(code: list[tuple[int, str]], expected: tuple[Repeated, ...]) -> float | None:
    """Instructions of the smallest loop with all products of matrices, the loops in it as ``expected``.

    None where it has other loops. One without a product counts once.
    """
    products = [address for address, text in code if re.search(r"\bH?G?MMA\b", text)]
    loops = [loop for loop in set(loops_of(code)) if any(loop[0] <= a <= loop[1] for a in products)]
    whole = [loop for loop in loops if loop[0] <= products[0] and products[-1] <= loop[1]]
    if not whole:
        return None

    def count(loop: tuple[int, int], expected: tuple[Repeated, ...]) -> float | None:
        inside = [a for a in loops if a != loop and _within(a, loop)]
        outermost = sorted(a for a in inside if not any(b != a and _within(a, b) for b in inside))
        total: float = _size(code, loop)
        if len(outermost) != len(expected):
            return None
        for a, repeated in zip(outermost, expected, strict=True):
            once = count(a, repeated.inside)
            if once is None:
                return None
            total += repeated.trips * once - _size(code, a)
        return total

    return count(min(whole, key=lambda loop: loop[1] - loop[0]), expected)


def loops_of(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last address of each loop."""
    loops = []
    for i, (address, text) in enumerate(code):
        if any("TRYWAIT" in before for _, before in code[max(i - 2, 0) : i]):
            continue  # waits for tensor cores or memory, in a block of its own behind the code, and goes back
        branch = re.search(r"\bBRA(?:\.U !?UP\d,)? (?:`\(\S+\)|)(0x[0-9a-f]+)", text)  # .U: from sm_100 on
        if branch and int(branch[1], 16) < address:
            loops.append((int(branch[1], 16), address))
    return loops


def _within(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return other[0] <= loop[0] and loop[1] <= other[1]


def _size(code: list[tuple[int, str]], loop: tuple[int, int]) -> int:
    return sum(loop[0] <= address <= loop[1] for address, _ in code)
