"""Gradients of all packed weights at once: the operands that a backward wrote, multiplied over their rows.

    dW[r, :] = sum over loops x tokens of wide[:, r] narrow_p[:, :]        p: the part that row r is of
    db[r]    = sum over loops x tokens of wide[:, r]

wide holds, a column for each packed row, the gradients of q, k, v; o; the gradients before the activation;
the hidden columns. narrow_p is what each was multiplied with: the input of in_proj, the gradient of
out_proj's result, the input of linear1, the gradient of linear2's result.
Memory: partial sums [splits, n_layers, weight_rows, d_pad] fp32; sums over rows never leave fp32.
Grid: one program a tile of dW and a split of the rows. Each adds to its own partial sums: no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from shift_kernels.backends import weight_gradients
from shift_kernels.backends.triton.packing import Packed
from shift_kernels.backends.triton.resident_plan import BUSY, Layout

MOST_SIDE = 128  # of a program's tile of dW
FEWEST_ROWS = 256  # that a split is worth


class Operands(NamedTuple):
    """wide [n_layers, rows, weight_rows], narrow [parts, n_layers, rows, d_pad]; rows: loops x tokens."""

    wide: Tensor
    narrow: object


class Sums(NamedTuple):
    """Partial sums of dW and db."""

    w: Tensor
    b: Tensor


@triton.jit(do_not_specialize=["n_rows", "splits"])
def _multiply(
    operands, sums, n_rows, splits, S: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = S.weight_rows // SIDE
    tiles: tl.constexpr = blocks * (S.d_pad // WIDTH)
    tile = tl.program_id(0) % tiles
    layer = tl.program_id(0) // tiles % S.n_layers
    split = tl.program_id(0) // (tiles * S.n_layers)
    first, column = tile % blocks * SIDE, tile // blocks * WIDTH
    part = 0
    parts: tl.constexpr = S.parts
    for p in tl.static_range(1, parts):
        part += (first >= S.starts[p]).to(tl.int32)
    per = tl.cdiv(tl.cdiv(n_rows, splits), K) * K
    low = split * per
    high = tl.minimum(low + per, n_rows)
    wide = operands.wide + layer.to(tl.int64) * n_rows * S.weight_rows + first + tl.arange(0, SIDE)[None, :]
    narrow = operands.narrow + (part * S.n_layers + layer).to(tl.int64) * n_rows * S.d_pad
    narrow += column + tl.arange(0, WIDTH)[None, :]
    ones = tl.full([K, 16], 1.0, tl.float32).to(operands.wide.dtype.element_ty)
    at = (split.to(tl.int64) * S.n_layers + layer) * S.weight_rows + first + tl.arange(0, SIDE)
    to = sums.w + at[:, None] * S.d_pad + column + tl.arange(0, WIDTH)[None, :]
    dw = tl.zeros([SIDE, WIDTH], tl.float32)
    db = tl.zeros([SIDE, 16], tl.float32)
    for k in range(low, high, K):
        row = (k + tl.arange(0, K)).to(tl.int64)[:, None]
        a = tl.trans(tl.load(wide + row * S.weight_rows, mask=row < high, other=0.0))
        b = tl.load(narrow + row * S.d_pad, mask=row < high, other=0.0)
        dw = tl.dot(a, b, dw, input_precision=PRECISION)
        # A product with ones sums on the tensor cores, where a sum would take more instructions than dW.
        db = tl.dot(a, ones, db, input_precision=PRECISION)
    db = tl.sum(db, 1) / 16
    if ADD:
        dw += tl.load(to)
    tl.store(to, dw)
    if column == 0:
        if ADD:
            db += tl.load(sums.b + at)
        tl.store(sums.b + at, db)


class OperandSums:
    """The gradients of packed weights, summed over a backward's launches.

    Args:
        like: the packed weights.
        sizes: their layout.
        programs: of the backward, each of which sums norm gradients of its own.
        precision: tl.dot's input_precision.
    """

    def __init__(self, like: Packed, sizes: Layout, programs: int, precision: str) -> None:
        self.like, self.sizes, self.precision = like.w, sizes, precision
        s = sizes
        self.side = next(n for n in (128, 64, 32, 16) if all(row % n == 0 for row in s.starts))
        self.width = min(s.d_pad, MOST_SIDE)
        if self.like.itemsize == 4:  # no tensor core for exact fp32: a larger tile overflows registers
            self.side, self.width = min(self.side, 64), min(self.width, 64)
        self.tiles = s.n_layers * (s.weight_rows // self.side) * (s.d_pad // self.width)
        self.vectors = like.v.new_zeros(programs, *like.v.shape)
        self.sums: Sums | None = None

    def loops_per_launch(self, tokens: int) -> int:
        """How many loops' operands fit OPERAND_BYTES; at least one."""
        s = self.sizes
        per_loop = s.n_layers * tokens * (s.weight_rows + s.parts * s.d_pad) * self.like.itemsize
        return max(1, weight_gradients.OPERAND_BYTES // per_loop)

    def operands(self, rows: int, *, untouched: bool) -> Operands:
        """Room for the kernel to write to; zeros where it may leave a sample's loops ``untouched``."""
        make, s = self.like.new_zeros if untouched else self.like.new_empty, self.sizes
        return Operands(make(s.n_layers, rows, s.weight_rows), make(s.parts, s.n_layers, rows, s.d_pad))

    def add(self, operands: Operands) -> None:
        """Add what a launch wrote."""
        s, rows = self.sizes, operands.wide.shape[1]
        add = self.sums is not None
        if self.sums is None:
            splits = max(1, min(2 * BUSY // self.tiles, rows // FEWEST_ROWS))
            shape = splits, s.n_layers, s.weight_rows
            like = self.vectors
            self.sums = Sums(like.new_empty(*shape, s.d_pad), like.new_empty(shape))
        splits = len(self.sums.w)
        _multiply[(self.tiles * splits,)](
            operands, self.sums, rows, splits, s, self.side, self.width, 128 // self.like.itemsize,
            self.precision, add, num_warps=8 if self.side * self.width > 64 * 64 else 4, num_stages=2,
        )  # fmt: skip

    def packed(self) -> Packed:
        """Partial sums [splits, ...] of w and b, the sum of v; zeros if no launch was made."""
        s, vectors = self.sizes, self.vectors.sum(0)
        if self.sums is None:
            shape = 1, s.n_layers, s.weight_rows
            return Packed(vectors.new_zeros(*shape, s.d_pad), vectors.new_zeros(shape), vectors, vectors)
        return Packed(*self.sums, vectors, vectors)
