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

import triton
import triton.language as tl
from torch import Tensor

from shift_kernels.backends.triton.activation import activate, activate_backward
from shift_kernels.spec import GATED

PROGRAMS = 512  # partial sums kept for norm gradients: enough to fill a GPU, few enough to add up quickly
_BLOCK = 4096  # numbers a program of a row kernel holds at once


@triton.jit
def _normalise(x, cols, D: tl.constexpr, eps, LAYERNORM: tl.constexpr):
    """x - mean (layernorm) and 1 / root mean square, rows of width D padded to a power of two."""
    if LAYERNORM:
        x = tl.where(cols < D, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
    return x * rstd[:, None], rstd


@triton.jit
def _add_norm(
    X, Z, BIAS, G0, B0, G, B, U, Y, n_rows, scale, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, LAYERNORM: tl.constexpr,
    BRANCH_NORM: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    cols = tl.arange(0, BLOCK_D)[None, :]
    at, mask = rows * D + cols, (rows < n_rows) & (cols < D)
    u = tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    if Z is not None:
        z = tl.load(Z + at, mask=mask, other=0.0).to(tl.float32)
        if BIAS is not None:
            z += tl.load(BIAS + cols, mask=cols < D, other=0.0).to(tl.float32)
        if BRANCH_NORM:
            z, _ = _normalise(z, cols, D, eps, LAYERNORM)
            z *= tl.load(G0 + cols, mask=cols < D, other=0.0).to(tl.float32)
            if B0 is not None:
                z += tl.load(B0 + cols, mask=cols < D, other=0.0).to(tl.float32)
        u += scale * z
    if U is not None:
        # Normalise what is stored, so that the backward, which reads it, sees the same numbers.
        u = u.to(U.dtype.element_ty)
        tl.store(U + at, u, mask=mask)
        u = u.to(tl.float32)
    if Y is not None:
        if NORM:
            u, _ = _normalise(u, cols, D, eps, LAYERNORM)
            u *= tl.load(G + cols, mask=cols < D, other=0.0).to(tl.float32)
            if B is not None:
                u += tl.load(B + cols, mask=cols < D, other=0.0).to(tl.float32)
        tl.store(Y + at, u.to(Y.dtype.element_ty), mask=mask)


def add_norm(
    x: Tensor,
    z: Tensor | None,
    bias: Tensor | None,
    scale: float,
    branch_norm: tuple[Tensor, Tensor | None] | None,
    norm: tuple[Tensor, Tensor | None] | None,
    kind: str,
    eps: float,
    u: Tensor | None,
    y: Tensor | None,
) -> None:
    """u = x + scale f(z + bias), y = norm(u); all [rows, d_model] contiguous; u or y may be None."""
    n_rows, d = x.shape
    block_d = triton.next_power_of_2(d)
    rows = max(1, min(16, _BLOCK // block_d))
    _add_norm[(triton.cdiv(n_rows, rows),)](
        x, z, bias, *(branch_norm or (None, None)), *(norm or (None, None)), u, y, n_rows, scale, eps,
        D=d, BLOCK_D=block_d, ROWS=rows, NORM=norm is not None, LAYERNORM=kind == "layernorm",
        BRANCH_NORM=branch_norm is not None, num_warps=4 if rows * block_d <= _BLOCK else 8,
    )  # fmt: skip


@triton.jit
def _norm_backward(
    DY, SRC, BIAS, G, CARRY, DX, DG, DB, n_rows, dy_scale, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, LAYERNORM: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_D)[None, :]
    gamma = tl.load(G + cols, mask=cols < D, other=0.0).to(tl.float32)
    dg = tl.zeros([1, BLOCK_D], tl.float32)
    db = tl.zeros([1, BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = (block * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
        at, mask = rows * D + cols, (rows < n_rows) & (cols < D)
        x = tl.load(SRC + at, mask=mask, other=0.0).to(tl.float32)
        if BIAS is not None:
            x += tl.load(BIAS + cols, mask=cols < D, other=0.0).to(tl.float32)
        dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32) * dy_scale
        x, rstd = _normalise(x, cols, D, eps, LAYERNORM)
        dg += tl.sum(dy * x, 0)[None, :]
        db += tl.sum(dy, 0)[None, :]
        dy *= gamma
        dx = dy - x * (tl.sum(dy * x, 1) / D)[:, None]
        if LAYERNORM:
            dx -= (tl.sum(dy, 1) / D)[:, None]
        dx *= rstd[:, None]
        if CARRY is not None:
            dx += tl.load(CARRY + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)
    mine = tl.program_id(0) * D + cols
    tl.store(DG + mine, tl.load(DG + mine, mask=cols < D, other=0.0) + dg, mask=cols < D)
    if DB is not None:
        tl.store(DB + mine, tl.load(DB + mine, mask=cols < D, other=0.0) + db, mask=cols < D)


def norm_backward(
    dy: Tensor,
    src: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    kind: str,
    eps: float,
    carry: Tensor | None,
    dx: Tensor,
    dgamma: Tensor,
    dbeta: Tensor | None,
    dy_scale: float = 1.0,
) -> None:
    """dx = carry + the gradient of norm(src + bias) for dy_scale dy; adds to dgamma, dbeta.

    dgamma, dbeta: [PROGRAMS, d_model] float32 partial sums.
    """
    n_rows, d = src.shape
    block_d = triton.next_power_of_2(d)
    rows = max(1, min(16, _BLOCK // block_d))
    _norm_backward[(min(PROGRAMS, triton.cdiv(n_rows, rows)),)](
        dy, src, bias, gamma, carry, dx, dgamma, dbeta, n_rows, dy_scale, eps,
        D=d, BLOCK_D=block_d, ROWS=rows, LAYERNORM=kind == "layernorm",
        num_warps=4 if rows * block_d <= _BLOCK else 8,
    )  # fmt: skip


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
