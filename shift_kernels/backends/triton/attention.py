"""Flash attention, forward and backward: softmax(q k^T / sqrt(head_dim)) v without the score matrix.

Fuses scores, mask, softmax and the weighted sum; one pass over the keys with a running maximum:
    s_ij = q_i . k_j / sqrt(head_dim)             for j < length, and j <= i where causal
    o_i  = sum_j exp(s_ij - L_i) v_j              L_i = log sum_j exp(s_ij), kept for the backward
    dp_ij = do_i . v_j,  delta_i = do_i . o_i,    ds_ij = p_ij (dp_ij - delta_i)
    dq_i = sum_j ds_ij k_j / sqrt(head_dim)
    dk_j = sum_i ds_ij q_i / sqrt(head_dim),      dv_j = sum_i p_ij do_i
Memory: kept for the backward are o and L (4 bytes a row and head). On chip a program holds the tile it
    owns and its fp32 accumulators [rows, head_dim] in registers; tiles of the other side pass through
    shared memory, (block_m + 2 stages block_n) head_dim itemsize bytes.
Grid: one program for each (batch, head, block of rows), flat, so that no axis meets CUDA's limit of 65,535.
    dq has its own kernel (a program owns queries, and writes delta); dk and dv another (a program owns keys
    and walks all query heads of its group): no atomics, so the same inputs give the same bits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shift_kernels.call import AttentionProblem
from shift_kernels.errors import input_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128
LOG2E = tl.constexpr(1.4426950408889634)  # the hardware has exp2, not exp


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel: rows a program owns, rows it walks at a time, warps, pipeline stages."""

    own: int
    walk: int
    warps: int
    stages: int


def configs(seq_len: int, head_dim: int, itemsize: int) -> tuple[Config, Config, Config]:
    """Tiles of the forward, dq, and dk/dv kernels; every one fits sm_80's 163 KB of shared memory."""
    d = _padded(head_dim)
    longest = _padded(seq_len)
    if itemsize == 4:  # no tensor core for exact fp32: small tiles and many threads, or registers overflow
        shapes = [(32, 32, 8, 1), (32, 32, 8, 1) if d <= 64 else (16, 16, 8, 1), (32, 32, 8, 1)]
    elif d <= 64:
        shapes = [(128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2)]
    else:
        shapes = [(128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)]
    forward, dq, dkv = (
        Config(min(own, longest), min(walk, longest), warps if longest >= own else 4, stages)
        for own, walk, warps, stages in shapes
    )
    return forward, dq, dkv


def _padded(n: int) -> int:
    return max(16, triton.next_power_of_2(n))  # tl.dot wants powers of two, at least 16


@triton.jit
def _load(base, rows, row_stride, cols, col_stride, n_rows, MASK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows of a [seq_len, HEAD_DIM] matrix; what lies beyond n_rows or HEAD_DIM is 0 and never read."""
    at = base + rows[:, None].to(tl.int64) * row_stride + cols[None, :].to(tl.int64) * col_stride
    # One return: the compiler goes on behind a return inside an if, as the interpreter does not.
    if MASK_ROWS:
        x = tl.load(at, mask=(rows[:, None] < n_rows) & (cols[None, :] < HEAD_DIM), other=0.0)
    elif cols.shape[0] != HEAD_DIM:
        x = tl.load(at, mask=cols[None, :] < HEAD_DIM, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _store(base, x, rows, row_stride, cols, col_stride, seq_len, length, HEAD_DIM: tl.constexpr):
    """All rows of the matrix are written, those of the pads as 0."""
    at = base + rows[:, None].to(tl.int64) * row_stride + cols[None, :].to(tl.int64) * col_stride
    x = tl.where(rows[:, None] < length, x, 0.0)
    tl.store(at, x.to(base.dtype.element_ty), mask=(rows[:, None] < seq_len) & (cols[None, :] < HEAD_DIM))


@triton.jit
def _length(lens, b, seq_len):
    length = seq_len
    if lens is not None:
        length = tl.minimum(tl.maximum(tl.load(lens + b), 0), seq_len).to(tl.int32)
    return length


@triton.jit
def _forward(
    Q, K, V, O, L, lens, seq_len, n_heads, group, scale,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, ob, oh, on, od,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(seq_len, BLOCK_M)
    bh = (tl.program_id(0) // n_blocks).to(tl.int64)
    b, h = bh // n_heads, bh % n_heads
    # The last rows see the most keys: start them first.
    m0 = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_M
    rows, cols = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    length = _length(lens, b, seq_len)
    k_base = K + b * kb + (h // group) * kh
    v_base = V + b * vb + (h // group) * vh
    q = _load(Q + b * qb + h * qh, rows, qn, cols, qd, length, True, HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    end = tl.minimum(length, m0 + BLOCK_M) if CAUSAL else length
    end = tl.where(m0 < length, end, 0)
    full = (tl.minimum(end, m0) if CAUSAL else end) // BLOCK_N * BLOCK_N
    for part in tl.static_range(2):  # first the blocks that need no mask, then the others
        for n0 in range(0 if part == 0 else full, full if part == 0 else end, BLOCK_N):
            keys = n0 + tl.arange(0, BLOCK_N)
            k = _load(k_base, keys, kn, cols, kd, length, part == 1, HEAD_DIM)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            if part == 1:
                seen = keys[None, :] < length
                if CAUSAL:
                    seen = seen & (keys[None, :] <= rows[:, None])
                s = tl.where(seen, s, float("-inf"))
            # A maximum may miss a NaN. Its own term, and so the total, does not.
            new_top = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # all scores so far have overflowed
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(p, 1)
            v = _load(v_base, keys, vn, cols, vd, length, part == 1, HEAD_DIM)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            top = new_top
    token = rows < length  # pads see nothing; a token that does has only scores of -inf, and gets NaN
    o = acc / tl.where(token, total, 1.0)[:, None]
    _store(O + b * ob + h * oh, o, rows, on, cols, od, seq_len, length, HEAD_DIM)
    lse = tl.where(token, top, 0.0) + tl.log2(tl.where(token, total, 1.0))
    tl.store(L + bh * seq_len + rows, lse, mask=rows < seq_len)


@triton.jit
def _backward_dq(
    Q, K, V, O, DO, L, DELTA, DQ, lens, seq_len, n_heads, group, scale,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, ob, oh, on, od,
    gb, gh, gn, gd, dqb, dqh, dqn, dqd,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(seq_len, BLOCK_M)
    bh = (tl.program_id(0) // n_blocks).to(tl.int64)
    b, h = bh // n_heads, bh % n_heads
    m0 = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_M
    rows, cols = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    length = _length(lens, b, seq_len)
    k_base = K + b * kb + (h // group) * kh
    v_base = V + b * vb + (h // group) * vh
    q = _load(Q + b * qb + h * qh, rows, qn, cols, qd, length, True, HEAD_DIM)
    do = _load(DO + b * gb + h * gh, rows, gn, cols, gd, length, True, HEAD_DIM)
    o = _load(O + b * ob + h * oh, rows, on, cols, od, length, True, HEAD_DIM)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + bh * seq_len + rows, delta, mask=rows < seq_len)
    lse = tl.load(L + bh * seq_len + rows, mask=rows < length, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = tl.minimum(length, m0 + BLOCK_M) if CAUSAL else length
    end = tl.where(m0 < length, end, 0)
    full = (tl.minimum(end, m0) if CAUSAL else end) // BLOCK_N * BLOCK_N
    for part in tl.static_range(2):
        for n0 in range(0 if part == 0 else full, full if part == 0 else end, BLOCK_N):
            keys = n0 + tl.arange(0, BLOCK_N)
            k = _load(k_base, keys, kn, cols, kd, length, part == 1, HEAD_DIM)
            v = _load(v_base, keys, vn, cols, vd, length, part == 1, HEAD_DIM)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            if part == 1:
                seen = keys[None, :] < length
                if CAUSAL:
                    seen = seen & (keys[None, :] <= rows[:, None])
                s = tl.where(seen, s, float("-inf"))
            p = tl.exp2(s - lse[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    _store(DQ + b * dqb + h * dqh, dq * scale, rows, dqn, cols, dqd, seq_len, length, HEAD_DIM)


@triton.jit
def _backward_dkv(
    Q, K, V, DO, L, DELTA, DK, DV, lens, seq_len, n_heads, group, scale,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, vd, gb, gh, gn, gd,
    dkb, dkh, dkn, dkd, dvb, dvh, dvn, dvd,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(seq_len, BLOCK_N)
    n_kv_heads = n_heads // group
    bh = (tl.program_id(0) // n_blocks).to(tl.int64)
    b, kv_head = bh // n_kv_heads, bh % n_kv_heads
    n0 = (tl.program_id(0) % n_blocks) * BLOCK_N
    keys, cols = n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    length = _length(lens, b, seq_len)
    k = _load(K + b * kb + kv_head * kh, keys, kn, cols, kd, length, True, HEAD_DIM)
    v = _load(V + b * vb + kv_head * vh, keys, vn, cols, vd, length, True, HEAD_DIM)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    start = n0 // BLOCK_M * BLOCK_M if CAUSAL else 0
    start = tl.where(n0 < length, start, length)
    for head in range(group):
        h = kv_head * group + head
        q_base = Q + b * qb + h * qh
        do_base = DO + b * gb + h * gh
        row_base = (b * n_heads + h) * seq_len
        for m0 in range(start, length, BLOCK_M):
            rows = m0 + tl.arange(0, BLOCK_M)
            q = _load(q_base, rows, qn, cols, qd, length, True, HEAD_DIM)
            do = _load(do_base, rows, gn, cols, gd, length, True, HEAD_DIM)
            lse = tl.load(L + row_base + rows, mask=rows < length, other=0.0)
            delta = tl.load(DELTA + row_base + rows, mask=rows < length, other=0.0)
            # Transposed, [BLOCK_N, BLOCK_M]: p and ds are then left operands, as they lie in registers.
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
            seen = (keys[:, None] < length) & (rows[None, :] < length)
            if CAUSAL:
                seen = seen & (keys[:, None] <= rows[None, :])
            p = tl.exp2(tl.where(seen, s - lse[None, :], float("-inf")))
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    _store(DK + b * dkb + kv_head * dkh, dk * scale, keys, dkn, cols, dkd, seq_len, length, HEAD_DIM)
    _store(DV + b * dvb + kv_head * dvh, dv, keys, dvn, cols, dvd, seq_len, length, HEAD_DIM)


def unserved(problem: AttentionProblem) -> str | None:
    """Why these kernels do not serve such an attention, or None."""
    if problem.dtype not in DTYPES:
        return f"dtype {problem.dtype} (float32, float16 and bfloat16 are served)"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head_dim {problem.head_dim} (up to {MAX_HEAD_DIM} is served)"
    return None


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, seq_lens: Tensor | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o like q, and L in base 2, float32 [batch, n_heads, seq_len].

    Args:
        q: [batch, n_heads, seq_len, head_dim], any strides.
        k, v: [batch, n_kv_heads, seq_len, head_dim], any strides.
        causal: position i sees positions <= i.
        seq_lens: int [batch] on q's device; what lies beyond is never read.
        out: where o goes, any strides; default a new contiguous tensor.
    """
    batch, n_heads, seq_len, head_dim = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(batch, n_heads, seq_len, dtype=torch.float32, device=q.device)
    c = configs(seq_len, head_dim, q.itemsize)[0]
    _forward[(triton.cdiv(seq_len, c.own) * batch * n_heads,)](
        q, k, v, o, lse, seq_lens, seq_len, n_heads, n_heads // k.shape[1], head_dim**-0.5,
        *q.stride(), *k.stride(), *v.stride(), *o.stride(),
        **_constants(head_dim, causal), BLOCK_M=c.own, BLOCK_N=c.walk, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return o, lse


def attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    seq_lens: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv for :func:`attention_forward`; ``out`` says where they go (any strides)."""
    batch, n_heads, seq_len, head_dim = q.shape
    dq, dk, dv = out or (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    group = n_heads // k.shape[1]
    _, c, d = configs(seq_len, head_dim, q.itemsize)
    constants = _constants(head_dim, causal)
    _backward_dq[(triton.cdiv(seq_len, c.own) * batch * n_heads,)](
        q, k, v, o, grad_o, lse, delta, dq, seq_lens, seq_len, n_heads, group, head_dim**-0.5,
        *q.stride(), *k.stride(), *v.stride(), *o.stride(), *grad_o.stride(), *dq.stride(),
        **constants, BLOCK_M=c.own, BLOCK_N=c.walk, num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    _backward_dkv[(triton.cdiv(seq_len, d.own) * batch * k.shape[1],)](
        q, k, v, grad_o, lse, delta, dk, dv, seq_lens, seq_len, n_heads, group, head_dim**-0.5,
        *q.stride(), *k.stride(), *v.stride(), *grad_o.stride(), *dk.stride(), *dv.stride(),
        **constants, BLOCK_M=d.walk, BLOCK_N=d.own, num_warps=d.warps, num_stages=d.stages,
    )  # fmt: skip
    return dq, dk, dv


def _constants(head_dim: int, causal: bool) -> dict[str, Any]:
    exact = torch.get_float32_matmul_precision() == "highest"
    return dict(
        HEAD_DIM=head_dim, CAUSAL=causal, BLOCK_D=_padded(head_dim), PRECISION="ieee" if exact else "tf32"
    )


_LIB = torch.library.Library("shift_kernels", "FRAGMENT")
_LIB.define(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, Tensor? seq_lens) -> (Tensor o, Tensor lse)"
)
_LIB.define(
    "attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, bool causal, "
    "Tensor? seq_lens) -> (Tensor, Tensor, Tensor)"
)
torch.library.impl(_LIB, "attention", "CompositeExplicitAutograd")(attention_forward)
torch.library.impl(_LIB, "attention_backward", "CompositeExplicitAutograd")(attention_backward)


@torch.library.register_fake("shift_kernels::attention", lib=_LIB)
def _forward_fake(q, k, v, causal, seq_lens):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("shift_kernels::attention_backward", lib=_LIB)
def _backward_fake(grad_o, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.causal, seq_lens = inputs
    ctx.save_for_backward(q, k, v, *output, seq_lens)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, grad_o, grad_lse):
    q, k, v, o, lse, seq_lens = ctx.saved_tensors
    grads = torch.ops.shift_kernels.attention_backward(grad_o, q, k, v, o, lse, ctx.causal, seq_lens)
    return *grads, None, None


torch.library.register_autograd("shift_kernels::attention", _autograd, setup_context=_setup_context, lib=_LIB)


def _no_second_derivative(ctx, *grads):
    raise input_error(
        "shift_kernels.attention",
        "q, k, v",
        "differentiated twice",
        "one derivative",
        "Use torch.nn.functional.scaled_dot_product_attention with the MATH backend.",
    )


torch.library.register_autograd(
    "shift_kernels::attention_backward", _no_second_derivative, setup_context=lambda *_, **__: None, lib=_LIB
)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, seq_lens: Tensor | None) -> Tensor:
    """As :func:`shift_kernels.attention`, whose checks came before."""
    if seq_lens is not None:
        seq_lens = seq_lens.to(q.device)
    return torch.ops.shift_kernels.attention(q, k, v, causal, seq_lens)[0]
