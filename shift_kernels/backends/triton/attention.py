"""Flash attention, forward and backward: softmax(q k^T / sqrt(head_dim)) v without the score matrix.

Fuses scores, mask, softmax and the weighted sum; one pass over the keys with a running maximum:
    s_ij = q_i . k_j / sqrt(head_dim)             for j < length, and j <= i where causal
    o_i  = sum_j exp(s_ij - L_i) v_j              L_i = log sum_j exp(s_ij), kept for the backward
    dp_ij = do_i . v_j,  delta_i = do_i . o_i,    ds_ij = p_ij (dp_ij - delta_i)
    dq_i = sum_j ds_ij k_j / sqrt(head_dim)
    dk_j = sum_i ds_ij q_i / sqrt(head_dim),      dv_j = sum_i p_ij do_i
Memory: kept for the backward are o, in fp32 (delta from a rounded o would be off by that rounding times all
    of do, which ds, where softmax is nearly one-hot, must not be), and L (4 bytes a row and head). On chip a
    program holds the tile it owns and its fp32 accumulators [rows, head_dim] in registers; tiles of the other
    side pass through shared memory, (block_m + 2 stages block_n) head_dim itemsize bytes.
Grid: one program for each (batch, head, block of rows), flat, so that no axis meets CUDA's limit of 65,535.
    dq has its own kernel (a program owns queries, and writes delta); dk and dv another (a program owns keys
    and walks all query heads of its group): no atomics, so the same inputs give the same bits.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shift_kernels.backends.device import matmul_precision, on_device_of
from shift_kernels.call import AttentionProblem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128


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


@dataclasses.dataclass(frozen=True)
class Tile:
    """Compile-time facts of one kernel: sizes, and the tile of queries (m) and keys (n)."""

    head_dim: int
    causal: bool
    block_m: int
    block_n: int
    precision: str

    @property
    def block_d(self) -> int:
        """head_dim, padded."""
        return _padded(self.head_dim)

    @property
    def factor(self) -> float:
        """Factor on q k^T: 1 / sqrt(head_dim)."""
        return self.head_dim**-0.5

    @property
    def scale(self) -> float:
        """The same in base 2: the hardware has exp2, not exp."""
        return self.factor * math.log2(math.e)


@triton.jit
def _of(base, strides, b, h):
    """One head's [seq_len, head_dim] matrix of a [batch, heads, seq_len, head_dim] tensor."""
    return base + b * strides[0] + h * strides[1]


@triton.jit
def _at(base, strides, rows, S: tl.constexpr):
    """Addresses of rows of a head's matrix: [rows, block_d]."""
    cols = tl.arange(0, S.block_d)
    return base + rows[:, None].to(tl.int64) * strides[2] + cols[None, :].to(tl.int64) * strides[3]


@triton.jit
def _load(base, strides, rows, n_rows, MASK_ROWS: tl.constexpr, S: tl.constexpr):
    """Rows of a head's matrix: [rows, block_d]; what lies beyond n_rows or head_dim is 0 and never read."""
    at, cols = _at(base, strides, rows, S), tl.arange(0, S.block_d)
    # One return: the compiler goes on behind a return inside an if, as the interpreter does not.
    if MASK_ROWS:
        x = tl.load(at, mask=(rows[:, None] < n_rows) & (cols[None, :] < S.head_dim), other=0.0)
    elif S.block_d != S.head_dim:
        x = tl.load(at, mask=cols[None, :] < S.head_dim, other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _store(base, strides, x, rows, seq_len, length, S: tl.constexpr):
    """All rows of the matrix are written, those of the pads as 0."""
    x = tl.where(rows[:, None] < length, x, 0.0).to(base.dtype.element_ty)
    mask = (rows[:, None] < seq_len) & (tl.arange(0, S.block_d)[None, :] < S.head_dim)
    tl.store(_at(base, strides, rows, S), x, mask=mask)


@triton.jit
def _length(LENS, b, seq_len):
    """How many of a sample's positions are tokens."""
    length = seq_len
    if LENS is not None:
        length = tl.minimum(tl.maximum(tl.load(LENS + b), 0), seq_len).to(tl.int32)
    return length


@triton.jit
def _queries(seq_len, n_heads, S: tl.constexpr):
    """Sample, head and first row of a program that owns queries. The last rows see most keys: they start."""
    n_blocks = tl.cdiv(seq_len, S.block_m)
    bh = (tl.program_id(0) // n_blocks).to(tl.int64)
    return bh // n_heads, bh % n_heads, (n_blocks - 1 - tl.program_id(0) % n_blocks) * S.block_m


@triton.jit
def _keys_seen(m0, length, S: tl.constexpr):
    """Up to where no block of the keys that queries from m0 on see needs a mask, and where those keys end."""
    end = tl.minimum(length, m0 + S.block_m) if S.causal else length
    end = tl.where(m0 < length, end, 0)
    full = (tl.minimum(end, m0) if S.causal else end) // S.block_n * S.block_n
    return full, end


@triton.jit
def _scores(q, k, rows, keys, length, MASK: tl.constexpr, S: tl.constexpr):
    """Scores of queries (first) and keys (second) in base 2, -inf where masked: [block_m, block_n] f32."""
    s = tl.dot(q, tl.trans(k), input_precision=S.precision) * S.scale
    if MASK:
        seen = keys[None, :] < length
        if S.causal:
            seen = seen & (keys[None, :] <= rows[:, None])
        s = tl.where(seen, s, float("-inf"))
    return s


@triton.jit
def _forward(Q, K, V, O, EXACT, L, LENS, strides, seq_len, n_heads, group, S: tl.constexpr):
    """o and L of one program's queries. EXACT: None, or where o goes in fp32, too, contiguous."""
    b, h, m0 = _queries(seq_len, n_heads, S)
    rows = m0 + tl.arange(0, S.block_m)
    length = _length(LENS, b, seq_len)
    q = _load(_of(Q, strides[0], b, h), strides[0], rows, length, True, S)  # [block_m, block_d]
    k_base, v_base = _of(K, strides[1], b, h // group), _of(V, strides[2], b, h // group)
    acc = tl.zeros(q.shape, tl.float32)
    top = tl.full(rows.shape, float("-inf"), tl.float32)
    total = tl.zeros(rows.shape, tl.float32)
    full, end = _keys_seen(m0, length, S)
    for part in tl.static_range(2):  # first the blocks that need no mask, then the others
        for n0 in range(0 if part == 0 else full, full if part == 0 else end, S.block_n):
            keys = n0 + tl.arange(0, S.block_n)
            k = _load(k_base, strides[1], keys, length, part == 1, S)
            s = _scores(q, k, rows, keys, length, part == 1, S)
            # A maximum may miss a NaN. Its own term, and so the total, does not.
            new_top = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # all scores so far have overflowed
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(p, 1)
            v = _load(v_base, strides[2], keys, length, part == 1, S)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=S.precision)
            top = new_top
    token = rows < length  # pads see nothing; a token that sees only scores of -inf gets NaN
    total = tl.where(token, total, 1.0)
    o = acc / total[:, None]
    lse = tl.where(token, top, 0.0) + tl.log2(total)
    row_base = (b * n_heads + h) * seq_len
    _store(_of(O, strides[3], b, h), strides[3], o, rows, seq_len, length, S)
    if EXACT is not None:
        _store(_of(EXACT, strides[4], b, h), strides[4], o, rows, seq_len, length, S)
    tl.store(L + row_base + rows, lse, mask=rows < seq_len)


class Read(NamedTuple):
    """What both kernels of the backward read; delta is written by the first."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    do: Tensor
    lse: Tensor
    delta: Tensor
    lens: Tensor | None


@triton.jit
def _backward_dq(io, DQ, strides, seq_len, n_heads, group, S: tl.constexpr):
    """dq and delta of one program's queries."""
    b, h, m0 = _queries(seq_len, n_heads, S)
    rows = m0 + tl.arange(0, S.block_m)
    length = _length(io.lens, b, seq_len)
    q = _load(_of(io.q, strides[0], b, h), strides[0], rows, length, True, S)
    o = _load(_of(io.o, strides[3], b, h), strides[3], rows, length, True, S)
    do = _load(_of(io.do, strides[4], b, h), strides[4], rows, length, True, S)
    k_base, v_base = _of(io.k, strides[1], b, h // group), _of(io.v, strides[2], b, h // group)
    row_base = (b * n_heads + h) * seq_len
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(io.delta + row_base + rows, delta, mask=rows < seq_len)
    lse = tl.load(io.lse + row_base + rows, mask=rows < length, other=0.0)
    dq = tl.zeros(q.shape, tl.float32)
    full, end = _keys_seen(m0, length, S)
    for part in tl.static_range(2):
        for n0 in range(0 if part == 0 else full, full if part == 0 else end, S.block_n):
            keys = n0 + tl.arange(0, S.block_n)
            k = _load(k_base, strides[1], keys, length, part == 1, S)
            v = _load(v_base, strides[2], keys, length, part == 1, S)
            p = tl.exp2(_scores(q, k, rows, keys, length, part == 1, S) - lse[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision=S.precision)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=S.precision)
    _store(_of(DQ, strides[5], b, h), strides[5], dq * S.factor, rows, seq_len, length, S)


@triton.jit
def _backward_dkv(io, DK, DV, strides, seq_len, n_heads, group, S: tl.constexpr):
    """dk and dv of one program's keys: the sum over all query heads of their group."""
    n_blocks = tl.cdiv(seq_len, S.block_n)
    n_kv_heads = n_heads // group
    bh = (tl.program_id(0) // n_blocks).to(tl.int64)
    b, kv_head = bh // n_kv_heads, bh % n_kv_heads
    n0 = (tl.program_id(0) % n_blocks) * S.block_n
    keys = n0 + tl.arange(0, S.block_n)
    length = _length(io.lens, b, seq_len)
    k = _load(_of(io.k, strides[1], b, kv_head), strides[1], keys, length, True, S)
    v = _load(_of(io.v, strides[2], b, kv_head), strides[2], keys, length, True, S)
    dk = tl.zeros(k.shape, tl.float32)
    dv = tl.zeros(k.shape, tl.float32)
    start = n0 // S.block_m * S.block_m if S.causal else 0
    start = tl.where(n0 < length, start, length)
    for head in range(group):
        h = kv_head * group + head
        q_base, do_base = _of(io.q, strides[0], b, h), _of(io.do, strides[3], b, h)
        row_base = (b * n_heads + h) * seq_len
        for m0 in range(start, length, S.block_m):
            rows = m0 + tl.arange(0, S.block_m)
            q = _load(q_base, strides[0], rows, length, True, S)
            do = _load(do_base, strides[3], rows, length, True, S)
            lse = tl.load(io.lse + row_base + rows, mask=rows < length, other=0.0)
            delta = tl.load(io.delta + row_base + rows, mask=rows < length, other=0.0)
            # Transposed, [block_n, block_m]: p and ds are then left operands, as they lie in registers.
            s = tl.dot(k, tl.trans(q), input_precision=S.precision) * S.scale
            seen = (keys[:, None] < length) & (rows[None, :] < length)
            if S.causal:
                seen = seen & (keys[:, None] <= rows[None, :])
            p = tl.exp2(tl.where(seen, s - lse[None, :], float("-inf")))
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=S.precision)
            dp = tl.dot(v, tl.trans(do), input_precision=S.precision)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=S.precision)
    _store(_of(DK, strides[4], b, kv_head), strides[4], dk * S.factor, keys, seq_len, length, S)
    _store(_of(DV, strides[5], b, kv_head), strides[5], dv, keys, seq_len, length, S)


def unserved(problem: AttentionProblem) -> str | None:
    """Why these kernels do not serve such an attention, or None."""
    if problem.dtype not in DTYPES:
        return f"dtype {problem.dtype} (float32, float16 and bfloat16 are served)"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head_dim {problem.head_dim} (up to {MAX_HEAD_DIM} is served)"
    if problem.options:
        return f"{problem.options[0]}= is not served"
    if problem.k_len not in (None, problem.seq_len):
        return f"{problem.k_len} keys of {problem.seq_len} queries (as many are served)"
    return None


def needs_exact(q: Tensor) -> bool:
    """Whether o in q's dtype is too coarse for the backward."""
    return q.itemsize < 4


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    seq_lens: Tensor | None,
    out: Tensor | None = None,
    exact: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o like q, and L in base 2, float32 [batch, n_heads, seq_len].

    Args:
        q: [batch, n_heads, seq_len, head_dim], any strides.
        k, v: [batch, n_kv_heads, seq_len, head_dim], any strides.
        causal: position i sees positions <= i.
        seq_lens: int [batch] on q's device; what lies beyond is never read.
        out: where o goes, any strides; default a new contiguous tensor.
        exact: where o goes in float32, too, any strides: for the backward, where :func:`needs_exact`.
    """
    batch, n_heads, seq_len, _ = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(batch, n_heads, seq_len, dtype=torch.float32, device=q.device)
    c = configs(seq_len, q.shape[-1], q.itemsize)[0]
    strides = _strides(q, k, v, o, o if exact is None else exact)
    with on_device_of(q):
        _forward[(triton.cdiv(seq_len, c.own) * batch * n_heads,)](
            q, k, v, o, exact, lse, seq_lens, strides, seq_len, n_heads, n_heads // k.shape[1],
            _tile(q, causal, c.own, c.walk), num_warps=c.warps, num_stages=c.stages,
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
    """dq, dk, dv for :func:`attention_forward`, o as it was kept; ``out``: where they go, any strides."""
    batch, n_heads, seq_len, head_dim = q.shape
    dq, dk, dv = out or (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    sizes = seq_len, n_heads, n_heads // k.shape[1]
    _, c, d = configs(seq_len, head_dim, q.itemsize)
    io = Read(q, k, v, o, grad_o, lse, delta, seq_lens)
    with on_device_of(q):
        _backward_dq[(triton.cdiv(seq_len, c.own) * batch * n_heads,)](
            io, dq, _strides(q, k, v, o, grad_o, dq), *sizes,
            _tile(q, causal, c.own, c.walk), num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
        _backward_dkv[(triton.cdiv(seq_len, d.own) * batch * k.shape[1],)](
            io, dk, dv, _strides(q, k, v, grad_o, dk, dv), *sizes,
            _tile(q, causal, d.walk, d.own), num_warps=d.warps, num_stages=d.stages,
        )  # fmt: skip
    return dq, dk, dv


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(x.stride()) for x in tensors)


def _tile(q: Tensor, causal: bool, block_m: int, block_n: int) -> Tile:
    return Tile(q.shape[-1], causal, block_m, block_n, matmul_precision())
