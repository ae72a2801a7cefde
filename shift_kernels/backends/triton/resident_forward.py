"""Forward of the looped block with the residual tile on chip through all T loops.

One program owns ``rows`` tokens (whole sequences). For t = 1..T, for each layer:

    for each kv head, for each query head h of it:   q, k, v = xn Wq_h, xn Wk, xn Wv
                                                     x += softmax(q k^T) v Wo_h
    for each chunk c of d_ff:                        x += act(xn W1_c) W2_c

Registers: x [rows, d_pad] fp32, one head's or one chunk's intermediates. Shared memory: what tl.dot stages.
L2: the packed weights, read by every program in every loop. Device memory: e once, h_T once, and in
training one state a layer and loop. Grid: one program for each tile of sequences.

Packed weights W [n_layers, weight_rows, d_pad]: rows of q heads, k heads, v heads, out_proj transposed
(heads), linear1 (with swiglu gate, then values), linear2 transposed. Zero-padded, so kernels mask no weight.
B [n_layers, weight_rows]: a bias for each row. V [n_layers + 1, 10, d_pad]: vectors along d_model, see below.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shift_kernels.backends.triton.activation import activate

# Slots of V, in rows of d_pad. A norm's bias is one behind its weight. loop_norm: NORM1 of "layer" n_layers.
OUT_BIAS = tl.constexpr(0)
MLP_BIAS = tl.constexpr(1)
NORM1 = tl.constexpr(2)
NORM1_POST = tl.constexpr(4)
NORM2 = tl.constexpr(6)
NORM2_POST = tl.constexpr(8)
SLOTS = tl.constexpr(10)


@triton.jit
def normalise(x, S: tl.constexpr):
    """x [rows, d_pad] f32 -> (x - mean) / deviation (rmsnorm: x / rms) with zero pads, and 1 / deviation."""
    cols = tl.arange(0, S.d_pad)
    if S.norm == "layernorm":
        mean = tl.sum(x, 1) / S.d_model
        x = tl.where(cols[None, :] < S.d_model, x - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / S.d_model + S.eps)
    return x * inverse[:, None], inverse


@triton.jit
def norm(x, V, slot, S: tl.constexpr):
    """The norm whose weight stands in this slot of V. x [rows, d_pad] f32."""
    if S.norm != "none":
        cols = tl.arange(0, S.d_pad)
        unit, _ = normalise(x, S)
        weight = tl.load(V + slot * S.d_pad + cols)
        bias = tl.load(V + (slot + 1) * S.d_pad + cols)
        x = unit * weight[None, :] + bias[None, :]
    return x


@triton.jit
def weight_tile(W, row, n: tl.constexpr, S: tl.constexpr):
    """Rows row .. row + n of a layer's packed weights: [n, d_pad]."""
    rows = row + tl.arange(0, n)
    return tl.load(W + rows[:, None] * S.d_pad + tl.arange(0, S.d_pad)[None, :])


@triton.jit
def project(x, W, B, row, n: tl.constexpr, S: tl.constexpr):
    """x [rows, d_pad] times the transpose of n packed rows, plus their biases: [rows, n] f32."""
    w = weight_tile(W, row, n, S)
    return tl.dot(x, tl.trans(w), input_precision=S.precision) + tl.load(B + row + tl.arange(0, n))[None, :]


@triton.jit
def rotation(dtype: tl.constexpr, S: tl.constexpr):
    """The signed permutation (a, b) -> (-b, a) of the halves of a head: [head_pad, head_pad]."""
    i = tl.arange(0, S.head_pad)[:, None]
    j = tl.arange(0, S.head_pad)[None, :]
    plus = ((j == i + S.half) & (i < S.half)).to(tl.float32)
    minus = ((i == j + S.half) & (j < S.half)).to(tl.float32)
    return (plus - minus).to(dtype)


@triton.jit
def angles(ROTARY, pos, seq_len, S: tl.constexpr):
    """cos and sin [rows, head_pad] of each row's position. ROTARY: [2, seq_len, head_pad]."""
    at = ROTARY + pos[:, None] * S.head_pad + tl.arange(0, S.head_pad)[None, :]
    return tl.load(at), tl.load(at + seq_len * S.head_pad)


@triton.jit
def head(xn, W, B, row, rotate: tl.constexpr, ROTARY, seq, pos, seq_len, S: tl.constexpr):
    """One head's queries, keys or values [rows, head_pad] in the operand dtype, rotated if asked.

    Rows that are no tokens are 0: with an infinite weight they would be NaN, and so would all that they meet.
    """
    y = project(xn, W, B, row, S.head_pad, S)
    if rotate:
        cos, sin = angles(ROTARY, pos, seq_len, S)
        turned = tl.dot(y.to(xn.dtype), rotation(xn.dtype, S), input_precision=S.precision)
        y = y * cos + turned * sin
    return tl.where((seq >= 0)[:, None], y, 0.0).to(xn.dtype)


@triton.jit
def apart(x, taint, S: tl.constexpr):
    """An operand that is summed over rows, fit for a tile of several sequences: 0 times infinity is
    NaN, which must not reach a neighbour. Returns x with 0 for what is not finite, and taint [rows] f32 plus
    NaN where there was any (see :func:`probabilities`).
    """
    if S.packed:
        wide = x.to(tl.float32)
        taint += tl.sum(wide * 0.0, 1)
        x = tl.where(tl.abs(wide) < float("inf"), wide, 0.0).to(x.dtype)
    return x, taint


@triton.jit
def visible(seq, pos, S: tl.constexpr):
    """Which rows are of one sequence, and which row (first) sees which (second): [rows, rows] each.

    seq [rows]: the sequence a row belongs to, -1 for pads. pos [rows]: position inside it.
    """
    same = (seq[:, None] == seq[None, :]) & (seq[None, :] >= 0)
    allowed = same
    if S.causal:
        allowed = same & (pos[:, None] >= pos[None, :])
    return same, allowed


@triton.jit
def probabilities(q, k, taint, seq, pos, S: tl.constexpr):
    """softmax(q k^T / sqrt(head_dim)) in a row's own sequence: [rows, rows] f32; a row seeing nothing is 0.

    All rows of a sequence of which a row is tainted are NaN. So is a row of which all scores are -inf.
    """
    same, allowed = visible(seq, pos, S)
    s = tl.dot(q, tl.trans(k), input_precision=S.precision) * S.score_scale
    s = tl.where(allowed, s, float("-inf"))
    # A maximum may miss a NaN. Its own term, and so the total, does not.
    p = tl.exp2(s - tl.where(seq >= 0, tl.max(s, 1), 0.0)[:, None])
    if S.packed:
        p += tl.where(same, taint[None, :], 0.0)
    total = tl.where(seq >= 0, tl.sum(p, 1), 1.0)
    p *= (1.0 / total)[:, None]
    if S.packed:
        p = tl.where(allowed, p, 0.0)
    return p


@triton.jit
def attention(xn, acc, W, B, V, ROTARY, seq, pos, seq_len, S: tl.constexpr):
    """acc + self_attention(xn). xn [rows, d_pad] operand dtype, acc [rows, d_pad] f32."""
    acc += tl.load(V + OUT_BIAS * S.d_pad + tl.arange(0, S.d_pad))[None, :]
    group: tl.constexpr = S.n_heads // S.n_kv_heads
    for j in range(S.n_kv_heads):
        k = head(xn, W, B, (S.n_heads + j) * S.head_pad, S.rope, ROTARY, seq, pos, seq_len, S)
        v = head(xn, W, B, (S.n_heads + S.n_kv_heads + j) * S.head_pad, False, ROTARY, seq, pos, seq_len, S)
        v, taint = apart(v, tl.zeros(seq.shape, tl.float32), S)
        for i in range(group):
            h = j * group + i
            q = head(xn, W, B, h * S.head_pad, S.rope, ROTARY, seq, pos, seq_len, S)
            p = probabilities(q, k, taint, seq, pos, S)
            o = tl.dot(p.to(xn.dtype), v, input_precision=S.precision).to(xn.dtype)
            wo = weight_tile(W, (S.n_heads + 2 * S.n_kv_heads + h) * S.head_pad, S.head_pad, S)
            acc = tl.dot(o, wo, acc, input_precision=S.precision)
    return acc


@triton.jit
def without_ff_pads(y, c, S: tl.constexpr):
    """Hidden columns c .. c + ff_chunk, 0 where there is no such column: infinity times a 0 of W1 is NaN."""
    if S.ff_pad != S.d_ff:
        y = tl.where((c + tl.arange(0, S.ff_chunk) < S.d_ff)[None, :], y, 0.0)
    return y


@triton.jit
def mlp(xn, acc, W, B, V, S: tl.constexpr):
    """acc + linear2(act(linear1(xn))), ff_chunk hidden columns at a time."""
    first: tl.constexpr = 2 * (S.n_heads + S.n_kv_heads) * S.head_pad
    last: tl.constexpr = S.weight_rows - S.ff_pad
    kind: tl.constexpr = S.activation
    acc += tl.load(V + MLP_BIAS * S.d_pad + tl.arange(0, S.d_pad))[None, :]
    for c in range(0, S.ff_pad, S.ff_chunk):
        y = activate(project(xn, W, B, first + c, S.ff_chunk, S), kind)
        if S.activation == "swiglu":
            y *= project(xn, W, B, first + S.ff_pad + c, S.ff_chunk, S)
        y = without_ff_pads(y, c, S).to(xn.dtype)
        acc = tl.dot(y, weight_tile(W, last + c, S.ff_chunk, S), acc, input_precision=S.precision)
    return acc


@triton.jit
def branch_sum(x, is_mlp: tl.constexpr, W, B, V, ROTARY, seq, pos, seq_len, S: tl.constexpr):
    """x + scale * branch, before a post norm. x [rows, d_pad] f32."""
    slot: tl.constexpr = NORM2 if is_mlp else NORM1
    xn = x
    if S.placement != "post":
        xn = norm(x, V, slot, S)
    xn = xn.to(W.dtype.element_ty)
    acc = x
    if not S.direct:
        acc = tl.zeros_like(x)
    if is_mlp:
        acc = mlp(xn, acc, W, B, V, S)
    else:
        acc = attention(xn, acc, W, B, V, ROTARY, seq, pos, seq_len, S)
    if not S.direct:
        if S.placement == "sandwich":
            acc = norm(acc, V, slot + 2, S)
        acc = x + S.scale * acc
    return acc


@triton.jit
def sublayer(x, is_mlp: tl.constexpr, W, B, V, ROTARY, seq, pos, seq_len, S: tl.constexpr):
    """The attention half or the MLP half of a layer."""
    x = branch_sum(x, is_mlp, W, B, V, ROTARY, seq, pos, seq_len, S)
    if S.placement == "post":
        x = norm(x, V, NORM2 if is_mlp else NORM1, S)
    return x


@triton.jit
def place(pid, LENS, seq_len, batch, ragged: tl.constexpr, S: tl.constexpr):
    """Which sequence and position each row of this program is: row [rows] i64, inside, seq, pos [rows]."""
    r = tl.arange(0, S.rows)
    pos = r % seq_len
    sequences = 1
    if S.packed:
        sequences = S.rows // seq_len
    sample = pid * sequences + r // seq_len
    inside = (r < sequences * seq_len) & (sample < batch)
    valid = inside
    if ragged:
        valid = inside & (pos < tl.load(LENS + sample, mask=inside, other=0))
    row = pid.to(tl.int64) * sequences * seq_len + r
    return row, inside, tl.where(valid, sample, -1), pos


@triton.jit
def tile_of(X, row, S: tl.constexpr):
    """Addresses of this program's tile in a [batch * seq_len, d_model] tensor."""
    return X + row[:, None] * S.d_model + tl.arange(0, S.d_pad)[None, :]


@triton.jit(do_not_specialize=["n_loops", "seq_len", "batch", "threshold"])  # a new T compiles nothing
def resident_forward(
    E,  # [batch, seq_len, d_model]
    W,  # packed weights, see the top of this file
    B,
    V,
    ROTARY,  # [2, seq_len, head_pad] f32
    LOOPS,  # [batch], read with own_loops
    LENS,  # [batch], read with ragged
    H,  # [batch, seq_len, d_model], or with keep_all [n_loops, ...]
    SAVED,  # [n_loops * saves, batch, seq_len, d_model], written with save
    USED,  # [batch], written with halt
    n_loops,
    seq_len,
    batch,
    threshold,
    S: tl.constexpr,
    own_loops: tl.constexpr,
    ragged: tl.constexpr,
    keep_all: tl.constexpr,
    save: tl.constexpr,
    halt: tl.constexpr,
):
    pid = tl.program_id(0)
    row, inside, seq, pos = place(pid, LENS, seq_len, batch, ragged, S)
    column = tl.arange(0, S.d_pad)[None, :] < S.d_model
    valid = (seq >= 0)[:, None] & column
    stored = inside[:, None] & column
    stride = batch.to(tl.int64) * seq_len * S.d_model  # of one state of the whole batch
    if S.inject:
        h = tl.zeros(valid.shape, tl.float32)
    else:
        h = tl.load(tile_of(E, row, S), mask=valid, other=0.0).to(tl.float32)
    most = n_loops
    if own_loops:
        most = tl.minimum(tl.load(LOOPS + pid), n_loops).to(tl.int32)
    t = 0
    running = most > 0
    while running:
        x = h
        if S.inject:
            x += tl.load(tile_of(E, row, S), mask=valid, other=0.0).to(tl.float32)
        # Pads start every loop from 0, so that without a norm they cannot grow to infinity over the loops.
        x = tl.where(valid, x, 0.0)
        for layer in range(S.n_layers):
            w = W + layer * S.weight_rows * S.d_pad
            b = B + layer * S.weight_rows
            v = V + layer * SLOTS * S.d_pad
            if save:
                tl.store(tile_of(SAVED + (t * S.saves + layer) * stride, row, S), x, mask=stored)
            x = sublayer(x, False, w, b, v, ROTARY, seq, pos, seq_len, S)
            if S.d_ff > 0:
                x = sublayer(x, True, w, b, v, ROTARY, seq, pos, seq_len, S)
        if S.loop_norm:
            if save:
                tl.store(tile_of(SAVED + (t * S.saves + S.n_layers) * stride, row, S), x, mask=stored)
            x = norm(x, V + S.n_layers * SLOTS * S.d_pad, NORM1, S)
        if keep_all:
            tl.store(tile_of(H + t * stride, row, S), tl.where(valid, x, 0.0), mask=stored)
        t += 1
        running = t < most
        if halt:
            moved = tl.where(valid, x - h, 0.0)
            before = tl.where(valid, h, 0.0)
            change = tl.sqrt(tl.sum(tl.sum(moved * moved, 1), 0))
            # A NaN compares false: such a sample runs on, as in the reference.
            settled = change < threshold * tl.sqrt(tl.sum(tl.sum(before * before, 1), 0))
            running = running & (settled == 0)
        h = x
    if halt:
        tl.store(USED + pid, t)
    h = tl.where(valid, h, 0.0)
    if keep_all:
        for rest in range(t, n_loops):
            tl.store(tile_of(H + rest * stride, row, S), h, mask=stored)
    else:
        tl.store(tile_of(H, row, S), h, mask=stored)
