"""Warp instructions of a resident kernel for a token and a loop: what its issue slots are spent on.

Counted in SASS: each innermost loop's instructions times its trips, plus the rest of the loop over t. The
prologue, once a launch, is left out. A floor of the time, not the time: no instruction waits for anything.
"""

from __future__ import annotations

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
    loops = []
    for i, (address, text) in enumerate(code):
        if any("TRYWAIT" in before for _, before in code[max(i - 2, 0) : i]):
            continue  # waits for the tensor cores, in a block of its own behind the code, and goes back
        branch = re.search(r"\bBRA(?:\.U !?UP\d,)? (?:`\(\S+\)|)(0x[0-9a-f]+)", text)  # .U: from sm_100 on
        if branch and int(branch[1], 16) < address:
            loops.append((int(branch[1], 16), address))
    if not loops:
        return None
    outer = max(loops, key=lambda loop: sum(loop[0] <= a and b <= loop[1] for a, b in loops))
    inside = [loop for loop in loops if outer[0] <= loop[0] and loop[1] <= outer[1] and loop != outer]
    inner = sorted(a for a in inside if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in inside))
    if len(inner) != len(trips):
        return None

    def size(loop: tuple[int, int]) -> int:
        return sum(loop[0] <= address <= loop[1] for address, _ in code)

    return size(outer) + sum((n - 1) * size(loop) for loop, n in zip(inner, trips, strict=True))
