"""Row kernels of the streamed layer: what stands between two matmuls, in one pass over memory.

Forward   u = x + scale f(z + bias);  y = norm(u)      f: identity, or the sandwich's own norm
Backward  du = carry + norm'(u) dy                      and the norm's weight gradients
Activation g = act(a + bias), gate and value halves for swiglu, and its derivative
Rotation  (x_i, x_{i + half}) by an angle per position, in place; backwards with the sign turned
Memory: a program holds whole rows [rows, d_model] in fp32 registers; every tensor is read or written once.
    Norm weight gradients go to a row of a [programs, d_model] fp32 buffer that this program alone adds to:
    summed at the end, so the same inputs give the same bits.
Grid: norms at most PROGRAMS programs that stride over the rows; the others one program a block.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from shift_kernels.backends.triton.activation import activate, activate_backward
from shift_kernels.spec import GATED

PROGRAMS = 512  # partial sums kept for norm gradients: enough to fill a GPU, few enough to add up quickly
_BLOCK = 4096  # numbers a program of a row kernel holds at once


@dataclasses.dataclass(frozen=True)
class RowTile:
    """Compile-time facts of a norm's kernel: width of a row, and padded; rows a program has at a time."""

    d: int
    layernorm: bool

    @property
    def block_d(self) -> int:
        """d to the next power of two."""
        return triton.next_power_of_2(self.d)

    @property
    def rows(self) -> int:
        """As many as fill _BLOCK numbers, 16 at most."""
        return max(1, min(16, _BLOCK // self.block_d))

    @property
    def warps(self) -> int:
        """Of a program."""
        return 4 if self.rows * self.block_d <= _BLOCK else 8


class AddNorm(NamedTuple):
    """u = x + scale f(z + bias), y = norm(u); all [rows, d_model] contiguous; None: not there.

    branch_norm, norm: weight and bias, of f and of y's norm.
    """

    x: Tensor
    z: Tensor | None
    bias: Tensor | None
    branch_norm: tuple[Tensor, Tensor | None] | None
    norm: tuple[Tensor, Tensor | None] | None
    u: Tensor | None
    y: Tensor | None


class NormBackward(NamedTuple):
    """dx = carry + the gradient of norm(src + bias) for dy; adds to dgamma, dbeta [PROGRAMS, d_model] f32."""

    dy: Tensor
    src: Tensor
    bias: Tensor | None
    gamma: Tensor
    carry: Tensor | None
    dx: Tensor
    dgamma: Tensor
    dbeta: Tensor | None


@triton.jit
def _normalise(x, cols, eps, T: tl.constexpr):
    """x - mean (layernorm) and 1 / root mean square, rows of width d padded to a power of two."""
    if T.layernorm:
        x = tl.where(cols < T.d, x - (tl.sum(x, 1) / T.d)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / T.d + eps)
    return x * rstd[:, None], rstd


@triton.jit
def _scaled(x, norm, cols, T: tl.constexpr):
    """x times a norm's weight, plus its bias."""
    x *= tl.load(norm[0] + cols, mask=cols < T.d, other=0.0).to(tl.float32)
    if norm[1] is not None:
        x += tl.load(norm[1] + cols, mask=cols < T.d, other=0.0).to(tl.float32)
    return x


@triton.jit
def _add_norm(io, n_rows, scale, eps, T: tl.constexpr, BRANCH_NORM: tl.constexpr, NORM: tl.constexpr):
    # Whether there is a norm is a constant of its own: a compiled kernel cannot compare a tuple with None.
    rows = (tl.program_id(0) * T.rows + tl.arange(0, T.rows))[:, None].to(tl.int64)
    cols = tl.arange(0, T.block_d)[None, :]
    at, mask = rows * T.d + cols, (rows < n_rows) & (cols < T.d)
    u = tl.load(io.x + at, mask=mask, other=0.0).to(tl.float32)
    if io.z is not None:
        z = tl.load(io.z + at, mask=mask, other=0.0).to(tl.float32)
        if io.bias is not None:
            z += tl.load(io.bias + cols, mask=cols < T.d, other=0.0).to(tl.float32)
        if BRANCH_NORM:
            z, _ = _normalise(z, cols, eps, T)
            z = _scaled(z, io.branch_norm, cols, T)
        u += scale * z
    if io.u is not None:
        # Normalise what is stored, so that the backward, which reads it, sees the same numbers.
        u = u.to(io.u.dtype.element_ty)
        tl.store(io.u + at, u, mask=mask)
        u = u.to(tl.float32)
    if io.y is not None:
        if NORM:
            u, _ = _normalise(u, cols, eps, T)
            u = _scaled(u, io.norm, cols, T)
        tl.store(io.y + at, u.to(io.y.dtype.element_ty), mask=mask)


def add_norm(io: AddNorm, scale: float, kind: str, eps: float) -> None:
    """Fill u and y; kind: of both norms."""
    n_rows, d = io.x.shape
    tile = RowTile(d, kind == "layernorm")
    _add_norm[(triton.cdiv(n_rows, tile.rows),)](
        io, n_rows, scale, eps, tile, io.branch_norm is not None, io.norm is not None, num_warps=tile.warps
    )


@triton.jit
def _norm_backward(io, n_rows, dy_scale, eps, T: tl.constexpr):
    cols = tl.arange(0, T.block_d)[None, :]
    gamma = tl.load(io.gamma + cols, mask=cols < T.d, other=0.0).to(tl.float32)
    dg = tl.zeros(cols.shape, tl.float32)
    db = tl.zeros(cols.shape, tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, T.rows), tl.num_programs(0)):
        rows = (block * T.rows + tl.arange(0, T.rows))[:, None].to(tl.int64)
        at, mask = rows * T.d + cols, (rows < n_rows) & (cols < T.d)
        x = tl.load(io.src + at, mask=mask, other=0.0).to(tl.float32)
        if io.bias is not None:
            x += tl.load(io.bias + cols, mask=cols < T.d, other=0.0).to(tl.float32)
        dy = tl.load(io.dy + at, mask=mask, other=0.0).to(tl.float32) * dy_scale
        x, rstd = _normalise(x, cols, eps, T)
        dg += tl.sum(dy * x, 0)[None, :]
        db += tl.sum(dy, 0)[None, :]
        dy *= gamma
        dx = dy - x * (tl.sum(dy * x, 1) / T.d)[:, None]
        if T.layernorm:
            dx -= (tl.sum(dy, 1) / T.d)[:, None]
        dx *= rstd[:, None]
        if io.carry is not None:
            dx += tl.load(io.carry + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(io.dx + at, dx.to(io.dx.dtype.element_ty), mask=mask)
    mine = tl.program_id(0) * T.d + cols
    tl.store(io.dgamma + mine, tl.load(io.dgamma + mine, mask=cols < T.d, other=0.0) + dg, mask=cols < T.d)
    if io.dbeta is not None:
        tl.store(io.dbeta + mine, tl.load(io.dbeta + mine, mask=cols < T.d, other=0.0) + db, mask=cols < T.d)


def norm_backward(io: NormBackward, kind: str, eps: float, dy_scale: float = 1.0) -> None:
    """For dy_scale dy: fill dx, add to dgamma and dbeta."""
    n_rows, d = io.src.shape
    tile = RowTile(d, kind == "layernorm")
    programs = min(PROGRAMS, triton.cdiv(n_rows, tile.rows))
    _norm_backward[(programs,)](io, n_rows, dy_scale, eps, tile, num_warps=tile.warps)


@triton.jit
def _activation(
    A, BIAS, G, DG, DA, total, F: tl.constexpr, KIND: tl.constexpr, GATE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
    row, col = i // F, i % F
    WIDTH: tl.constexpr = 2 * F if GATE else F
    exact: tl.constexpr = A.dtype.element_ty == tl.float32
    a = tl.load(A + row * WIDTH + col, mask=mask, other=0.0).to(tl.float32)
    if BIAS is not None:
        a += tl.load(BIAS + col, mask=mask, other=0.0).to(tl.float32)
    if GATE:
        up = tl.load(A + row * WIDTH + F + col, mask=mask, other=0.0).to(tl.float32)
        if BIAS is not None:
            up += tl.load(BIAS + F + col, mask=mask, other=0.0).to(tl.float32)
    if DG is None:
        g = activate(a, KIND, exact)
        if GATE:
            g *= up
        tl.store(G + i, g.to(G.dtype.element_ty), mask=mask)
    else:
        dg = tl.load(DG + i, mask=mask, other=0.0).to(tl.float32)
        g, da = activate_backward(a, dg * up if GATE else dg, KIND, exact)
        tl.store(DA + row * WIDTH + col, da.to(DA.dtype.element_ty), mask=mask)
        if GATE:
            tl.store(DA + row * WIDTH + F + col, (dg * g).to(DA.dtype.element_ty), mask=mask)


def activation(a: Tensor, bias: Tensor | None, kind: str, g: Tensor) -> None:
    """g = act(a + bias): a [rows, d_ff] (twice that for swiglu: gate, then values), g [rows, d_ff]."""
    _activation[(triton.cdiv(g.numel(), 1024),)](
        a, bias, g, None, None, g.numel(), F=g.shape[1], KIND=kind, GATE=kind in GATED, BLOCK=1024
    )


def activation_backward(a: Tensor, bias: Tensor | None, kind: str, dg: Tensor, da: Tensor) -> None:
    """da, like a, for the gradient dg of :func:`activation`'s result."""
    _activation[(triton.cdiv(dg.numel(), 1024),)](
        a, bias, None, dg, da, dg.numel(), F=dg.shape[1], KIND=kind, GATE=kind in GATED, BLOCK=1024
    )


@triton.jit
def _rotate(
    X,
    COS,
    SIN,
    total,
    seq_len,
    row_stride,
    sign,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
    pair, head, row = i % HALF, i // HALF % HEADS, i // (HALF * HEADS)
    angle = (row % seq_len) * HALF + pair
    cos = tl.load(COS + angle, mask=mask, other=0.0)
    sin = tl.load(SIN + angle, mask=mask, other=0.0) * sign
    at = X + row * row_stride + head * (2 * HALF) + pair
    a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (a * cos - b * sin).to(X.dtype.element_ty), mask=mask)
    tl.store(at + HALF, (b * cos + a * sin).to(X.dtype.element_ty), mask=mask)


def rotate(qkv: Tensor, table: Tensor, heads: int, head_dim: int, seq_len: int, *, inverse: bool) -> None:
    """Rotate the first ``heads`` heads of every row of qkv [rows, qkv_dim] in place, by its position."""
    total = qkv.shape[0] * heads * (head_dim // 2)
    _rotate[(triton.cdiv(total, 1024),)](
        qkv, table[0], table[1], total, seq_len, qkv.stride(0), -1.0 if inverse else 1.0,
        HEADS=heads, HALF=head_dim // 2, BLOCK=1024,
    )  # fmt: skip
