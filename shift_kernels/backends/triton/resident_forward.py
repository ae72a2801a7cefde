"""Forward of the looped block with the residual tile on chip through all T loops.

One program owns ``rows`` tokens (whole sequences). For t = 1..T, for each layer:

    for each kv head, for each query head h of it:   q, k, v = xn Wq_h, xn Wk, xn Wv
                                                     x += softmax(q k^T) v Wo_h
    for each chunk c of d_ff:                        x += act(xn W1_c) W2_c

Registers: x [rows, d_pad] fp32, one head's or one chunk's intermediates. Shared memory: what tl.dot stages.
L2: the packed weights, read by every program in every loop. Device memory: e once, h_T once, and in
training one state a layer and loop. Grid: one program for each tile of sequences.

Packed weights: see Layout in resident_plan.py and Packed in packing.py. Zero-padded: kernels mask no weight.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import triton
import triton.language as tl

from shift_kernels.backends.triton.activation import activate
from shift_kernels.backends.triton.packing import N_SLOTS, SLOTS, Packed

# Slots of Packed.v. A norm's bias is one behind its weight.
OUT_BIAS = tl.constexpr(SLOTS.index("self_attn.out_proj.bias"))
MLP_BIAS = tl.constexpr(SLOTS.index("linear2.bias"))
NORM1 = tl.constexpr(SLOTS.index("norm1.weight"))
NORM2 = tl.constexpr(SLOTS.index("norm2.weight"))
LOOP_NORM = tl.constexpr(SLOTS.index("loop_norm.weight"))


class Rows(NamedTuple):
    """A program's rows, as start + i among all (int32 offsets take the fewest registers).

    inside: whether inside the batch; seq: sequence, -1 for pads; pos: position in it; each [rows], like i.
    """

    start: tl.tensor
    i: tl.tensor
    inside: tl.tensor
    seq: tl.tensor
    pos: tl.tensor
    seq_len: tl.tensor


class States(NamedTuple):
    """Tensors that a forward reads and writes; what a call has not is None.

    Args:
        e: [batch, seq_len, d_model].
        loops: each sample's T [batch].
        lens: lengths [batch].
        h: like e, or with keep_all [n_loops, ...].
        saved: [n_loops * saves, batch, seq_len, d_model].
        used: with halting loops used [batch].
    """

    e: object
    loops: object
    lens: object
    h: object
    saved: object
    used: object


@dataclasses.dataclass(frozen=True)
class Mode:
    """keep_all: h_t of every loop is returned; halt: a sample stops when it settles."""

    keep_all: bool
    halt: bool


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
def norm(x, w, slot, S: tl.constexpr):
    """The norm whose weight stands in this slot. x [rows, d_pad] f32."""
    if S.norm != "none":
        cols = tl.arange(0, S.d_pad)
        weight = tl.load(w.v + slot * S.d_pad + cols)
        bias = tl.load(w.v + (slot + 1) * S.d_pad + cols)
        x = unit(x, w, S) * weight[None, :] + bias[None, :]
    return x


@triton.jit
def unit(x, w, S: tl.constexpr):
    """What :func:`normalise` gives, by a product and a sum for narrow operands, which hide the rounding.

    The tile x - mean is then never there beside x: at 64 x 256 registers do not hold both.
    """
    if w.w.dtype.element_ty == tl.float32 or S.norm != "layernorm":
        y, _ = normalise(x, S)
    else:
        mean = tl.sum(x, 1) / S.d_model
        centred = x - mean[:, None]
        if S.d_pad != S.d_model:
            centred = tl.where((tl.arange(0, S.d_pad) < S.d_model)[None, :], centred, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / S.d_model + S.eps)
        y = x * inverse[:, None] - (mean * inverse)[:, None]
    return y


@triton.jit
def of_layer(w, layer, S: tl.constexpr):
    """One layer's packed weights."""
    first = layer * S.weight_rows
    return Packed(w.w + first * S.d_pad, w.b + first, w.v + layer * N_SLOTS * S.d_pad, w.rotary)


@triton.jit
def weight_tile(w, row, n: tl.constexpr, S: tl.constexpr):
    """Rows row .. row + n of a layer's packed weights: [n, d_pad]."""
    rows = row + tl.arange(0, n)
    return tl.load(w.w + rows[:, None] * S.d_pad + tl.arange(0, S.d_pad)[None, :])


@triton.jit
def project(x, w, row, n: tl.constexpr, S: tl.constexpr):
    """x [rows, d_pad] times the transpose of n packed rows, plus their biases: [rows, n] f32."""
    y = tl.dot(x, tl.trans(weight_tile(w, row, n, S)), input_precision=S.precision)
    return y + tl.load(w.b + row + tl.arange(0, n))[None, :]


@triton.jit
def rotation(dtype: tl.constexpr, S: tl.constexpr):
    """The signed permutation (a, b) -> (-b, a) of the halves of a head: [head_pad, head_pad]."""
    i = tl.arange(0, S.head_pad)[:, None]
    j = tl.arange(0, S.head_pad)[None, :]
    plus = ((j == i + S.half) & (i < S.half)).to(tl.float32)
    minus = ((i == j + S.half) & (j < S.half)).to(tl.float32)
    return (plus - minus).to(dtype)


@triton.jit
def angles(w, r, S: tl.constexpr):
    """cos and sin [rows, head_pad] of each row's position."""
    at = w.rotary + r.pos[:, None] * S.head_pad + tl.arange(0, S.head_pad)[None, :]
    return tl.load(at), tl.load(at + r.seq_len * S.head_pad)


@triton.jit
def head(xn, w, row, rotate: tl.constexpr, r, S: tl.constexpr):
    """One head's queries, keys or values [rows, head_pad] in the operand dtype, rotated if asked.

    Rows that are no tokens are 0: with an infinite weight they would be NaN, and so would all that they meet.
    """
    y = project(xn, w, row, S.head_pad, S)
    if rotate:
        cos, sin = angles(w, r, S)
        turned = tl.dot(y.to(xn.dtype), rotation(xn.dtype, S), input_precision=S.precision)
        y = y * cos + turned * sin
    return tl.where((r.seq >= 0)[:, None], y, 0.0).to(xn.dtype)


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
def visible(r, S: tl.constexpr):
    """Which rows are of one sequence, and which row (first) sees which (second): [rows, rows] each."""
    same = (r.seq[:, None] == r.seq[None, :]) & (r.seq[None, :] >= 0)
    allowed = same
    if S.causal:
        allowed = same & (r.pos[:, None] >= r.pos[None, :])
    return same, allowed


@triton.jit
def probabilities(q, k, taint, r, S: tl.constexpr):
    """softmax(q k^T / sqrt(head_dim)) in a row's own sequence: [rows, rows] f32; a row seeing nothing is 0.

    All rows of a sequence of which a row is tainted are NaN. So is a row of which all scores are -inf.
    """
    same, allowed = visible(r, S)
    s = tl.dot(q, tl.trans(k), input_precision=S.precision) * S.score_scale
    s = tl.where(allowed, s, float("-inf"))
    # A maximum may miss a NaN. Its own term, and so the total, does not.
    p = tl.exp2(s - tl.where(r.seq >= 0, tl.max(s, 1), 0.0)[:, None])
    if S.packed:
        p += tl.where(same, taint[None, :], 0.0)
    total = tl.where(r.seq >= 0, tl.sum(p, 1), 1.0)
    p *= (1.0 / total)[:, None]
    if S.packed:
        p = tl.where(allowed, p, 0.0)
    return p


@triton.jit
def attention(xn, acc, w, r, S: tl.constexpr):
    """acc + self_attention(xn). xn [rows, d_pad] operand dtype, acc [rows, d_pad] f32."""
    acc += tl.load(w.v + OUT_BIAS * S.d_pad + tl.arange(0, S.d_pad))[None, :]
    group: tl.constexpr = S.n_heads // S.n_kv_heads
    for j in range(S.n_kv_heads):
        k = head(xn, w, (S.n_heads + j) * S.head_pad, S.rope, r, S)
        v = head(xn, w, (S.n_heads + S.n_kv_heads + j) * S.head_pad, False, r, S)
        v, taint = apart(v, tl.zeros(r.seq.shape, tl.float32), S)
        for i in range(group):
            h = j * group + i
            q = head(xn, w, h * S.head_pad, S.rope, r, S)
            p = probabilities(q, k, taint, r, S)
            o = tl.dot(p.to(xn.dtype), v, input_precision=S.precision).to(xn.dtype)
            wo = weight_tile(w, S.starts[1] + h * S.head_pad, S.head_pad, S)
            acc = tl.dot(o, wo, acc, input_precision=S.precision)
    return acc


@triton.jit
def without_ff_pads(y, c, S: tl.constexpr):
    """Hidden columns c .. c + ff_chunk, 0 where there is no such column: infinity times a 0 of W1 is NaN."""
    if S.ff_pad != S.d_ff:
        y = tl.where((c + tl.arange(0, S.ff_chunk) < S.d_ff)[None, :], y, 0.0)
    return y


@triton.jit
def mlp(xn, acc, w, S: tl.constexpr):
    """acc + linear2(act(linear1(xn))), ff_chunk hidden columns at a time."""
    kind: tl.constexpr = S.activation
    acc += tl.load(w.v + MLP_BIAS * S.d_pad + tl.arange(0, S.d_pad))[None, :]
    for c in range(0, S.ff_end, S.ff_chunk):
        y = activate(project(xn, w, S.starts[2] + c, S.ff_chunk, S), kind, xn.dtype == tl.float32)
        if S.hidden == 2:
            y *= project(xn, w, S.starts[2] + S.ff_pad + c, S.ff_chunk, S)
        y = without_ff_pads(y, c, S).to(xn.dtype)
        acc = tl.dot(y, weight_tile(w, S.starts[3] + c, S.ff_chunk, S), acc, input_precision=S.precision)
    return acc


@triton.jit
def branch(xn, acc, is_mlp: tl.constexpr, w, r, S: tl.constexpr):
    """acc plus what the MLP or the attention makes of xn."""
    if is_mlp:
        acc = mlp(xn, acc, w, S)
    else:
        acc = attention(xn, acc, w, r, S)
    return acc


@triton.jit
def branch_sum(x, is_mlp: tl.constexpr, w, r, S: tl.constexpr):
    """x + scale * branch, before a post norm. x [rows, d_pad] f32."""
    slot: tl.constexpr = NORM2 if is_mlp else NORM1
    xn = x
    if S.placement != "post":
        xn = norm(x, w, slot, S)
    xn = xn.to(w.w.dtype.element_ty)
    if S.direct:
        acc = branch(xn, x, is_mlp, w, r, S)
    else:
        acc = branch(xn, tl.zeros_like(x), is_mlp, w, r, S)
        if S.placement == "sandwich":
            acc = norm(acc, w, slot + 2, S)
        acc = x + S.scale * acc
    return acc


@triton.jit
def half_layer(x, is_mlp: tl.constexpr, w, r, S: tl.constexpr):
    """The attention half or the MLP half of a layer."""
    x = branch_sum(x, is_mlp, w, r, S)
    if S.placement == "post":
        x = norm(x, w, NORM2 if is_mlp else NORM1, S)
    return x


@triton.jit
def place(LENS, seq_len, batch, first, n: tl.constexpr, S: tl.constexpr):
    """Which sequence and position n rows of this program are, from its row ``first`` on."""
    pid = tl.program_id(0)
    i = first + tl.arange(0, n)
    if S.packed:
        pos = i % seq_len
        sequences = S.rows // seq_len
        sample = pid * sequences + i // seq_len
        inside = (i < sequences * seq_len) & (sample < batch)
    else:
        pos = tl.minimum(i, seq_len - 1)
        sequences = 1
        sample = pid + tl.zeros_like(i)
        inside = i < seq_len
    valid = inside
    if LENS is not None:
        valid = inside & (pos < tl.load(LENS + sample, mask=inside, other=0))
    start = pid.to(tl.int64) * sequences * seq_len
    return Rows(start, i, inside, tl.where(valid, sample, -1), pos, seq_len)


@triton.jit
def tile_of(X, r, S: tl.constexpr):
    """Addresses of this program's tile in a [batch * seq_len, d_model] tensor."""
    return X + r.start * S.d_model + (r.i[:, None] * S.d_model + tl.arange(0, S.d_pad)[None, :])


@triton.jit
def own_loops(LOOPS, n_loops):
    """T of this program's sample, or of all."""
    most = n_loops
    if LOOPS is not None:
        most = tl.minimum(tl.load(LOOPS + tl.program_id(0)), n_loops).to(tl.int32)
    return most


@triton.jit
def settled(x, h, valid, threshold):
    """Whether a sample changed by less than ``threshold`` of its norm. With a NaN it did not."""
    moved = tl.where(valid, x - h, 0.0)
    before = tl.where(valid, h, 0.0)
    change = tl.sqrt(tl.sum(tl.sum(moved * moved, 1), 0))
    return change < threshold * tl.sqrt(tl.sum(tl.sum(before * before, 1), 0))


@triton.jit
def save(saved, state, x, stride, r, stored, S: tl.constexpr):
    """Keep a state for the backward, if there will be one."""
    if saved is not None:
        tl.store(tile_of(saved + state * stride, r, S), x, mask=stored)


@triton.jit
def loop_body(x, w, t, saved, stride, r, stored, S: tl.constexpr):
    """One loop. stride: of a state of the whole batch."""
    for layer in range(S.n_layers):
        own = of_layer(w, layer, S)
        state = t * S.saves + layer * S.halves
        save(saved, state, x, stride, r, stored, S)
        x = half_layer(x, False, own, r, S)
        if S.d_ff > 0:
            save(saved, state + 1, x, stride, r, stored, S)
            x = half_layer(x, True, own, r, S)
    if S.loop_norm:
        save(saved, t * S.saves + S.saves - 1, x, stride, r, stored, S)
        x = norm(x, w, LOOP_NORM, S)
    return x


@triton.jit(do_not_specialize=["n_loops", "seq_len", "batch", "threshold"])  # a new T compiles nothing
def resident_forward(
    io,  # States
    w,  # Packed
    n_loops,
    seq_len,
    batch,
    threshold,
    S: tl.constexpr,  # Tile
    M: tl.constexpr,  # Mode
):
    r = place(io.lens, seq_len, batch, 0, S.rows, S)
    column = tl.arange(0, S.d_pad)[None, :] < S.d_model
    valid = (r.seq >= 0)[:, None] & column
    stored = r.inside[:, None] & column
    stride = batch.to(tl.int64) * seq_len * S.d_model
    if S.inject:
        h = tl.zeros(valid.shape, tl.float32)
    else:
        h = tl.load(tile_of(io.e, r, S), mask=valid, other=0.0).to(tl.float32)
    most = own_loops(io.loops, n_loops)
    t = 0
    running = most > 0
    while running:
        x = h
        if S.inject:
            x += tl.load(tile_of(io.e, r, S), mask=valid, other=0.0).to(tl.float32)
        # Pads start every loop from 0, so that without a norm they cannot grow to infinity over the loops.
        x = loop_body(tl.where(valid, x, 0.0), w, t, io.saved, stride, r, stored, S)
        if M.keep_all:
            tl.store(tile_of(io.h + t * stride, r, S), tl.where(valid, x, 0.0), mask=stored)
        t += 1
        running = t < most
        if M.halt:
            running = running & (settled(x, h, valid, threshold) == 0)
        h = x
    if M.halt:
        tl.store(io.used + tl.program_id(0), t)
    h = tl.where(valid, h, 0.0)
    if M.keep_all:
        for rest in range(t, n_loops):
            tl.store(tile_of(io.h + rest * stride, r, S), h, mask=stored)
    else:
        tl.store(tile_of(io.h, r, S), h, mask=stored)
