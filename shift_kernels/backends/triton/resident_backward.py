"""Backward of the looped block from saved states: walk t = T..1, half layer by half layer.

For each loop from the last, for each layer from the last, mid and x being the saved inputs of its halves:

    dh += norm'(mid, mlp'(dh));   dh += norm'(x, attention'(dh))     one chunk or head at a time

Each half recomputes its own intermediates, none those of the other.

Weight gradients are not accumulated here: each matmul's two operands go to device memory (operands.py). Norm
weights' gradients, and those of the biases along d_model, are summed in a buffer of the program's own. No
atomics: the result is the same bits every time.

Registers: one branch's input gradient [rows, d_pad] fp32 and a head's or chunk's intermediates. dh is in DH
while a branch is walked (L2), which is also how loops can be split into several launches that bound the
memory of the operands.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from shift_kernels.backends.triton.activation import activate_backward
from shift_kernels.backends.triton.operands import Operands
from shift_kernels.backends.triton.packing import N_SLOTS
from shift_kernels.backends.triton.resident_forward import (
    LOOP_NORM,
    MLP_BIAS,
    NORM1,
    NORM2,
    OUT_BIAS,
    angles,
    apart,
    branch,
    branch_sum,
    head,
    norm,
    normalise,
    of_layer,
    own_loops,
    place,
    probabilities,
    project,
    rotation,
    tile_of,
    visible,
    weight_tile,
    without_ff_pads,
)


class Gradients(NamedTuple):
    """Tensors that a backward reads and writes; what a call has not is None.

    Args:
        saved: [n_loops * saves, batch, seq_len, d_model], as the forward kept them.
        h: of what the forward returned: [batch, seq_len, d_model], or with keep_all [n_loops, ...].
        loops: each sample's T [batch].
        lens: lengths [batch].
        dh: f32 [batch, seq_len, d_model]: gradient of h_high, becomes that of h_low.
        de: f32 like dh: gradient of e so far, with injection.
        dn: f32 like dh: room for the gradient of a branch's input.
        v: f32 [programs, n_layers, slots, d_pad]: gradients of Packed.v so far.
        operands: see operands.py, rows are (high - low) x tokens.
    """

    saved: object
    h: object
    loops: object
    lens: object
    dh: object
    de: object
    dn: object
    v: object
    operands: Operands


@triton.jit
def add_sum(x, to, S: tl.constexpr):
    """Add the sum over rows to this program's own [d_pad]."""
    at = to + tl.arange(0, S.d_pad)
    total = tl.load(at) + tl.sum(x, 0)
    tl.debug_barrier()  # the threads that load are not always the ones that store
    tl.store(at, total)


@triton.jit
def norm_input(x, dy, w, slot, S: tl.constexpr):
    """Gradient of a norm's input x, and each row's share dy * unit of its weight's."""
    cols = tl.arange(0, S.d_pad)
    unit, inverse = normalise(x, S)
    share = dy * unit
    dy = dy * tl.load(w.v + slot * S.d_pad + cols)[None, :]
    dx = dy - unit * (tl.sum(dy * unit, 1) / S.d_model)[:, None]
    if S.norm == "layernorm":
        dx = dx - (tl.sum(dy, 1) / S.d_model)[:, None]
        if S.d_pad != S.d_model:
            dx = tl.where(cols[None, :] < S.d_model, dx, 0.0)
    return dx * inverse[:, None], share


@triton.jit
def norm_backward(x, dy, w, slot, DV, S: tl.constexpr):
    """Gradient of a norm's input x; its weight's and bias's are added to this program's DV."""
    if S.norm != "none":
        dx, share = norm_input(x, dy, w, slot, S)
        add_sum(share, DV + slot * S.d_pad, S)
        add_sum(dy, DV + (slot + 1) * S.d_pad, S)
        dy = dx
    return dy


@triton.jit
def keep(X, r, x, first, n: tl.constexpr, width: tl.constexpr):
    """Store columns first .. first + n of a matmul operand, [tokens, width]."""
    at = X + r.start * width + first + (r.i[:, None] * width + tl.arange(0, n)[None, :])
    tl.store(at, x, mask=r.inside[:, None])


@triton.jit
def rotate_backward(dy, dtype: tl.constexpr, w, r, S: tl.constexpr):
    """Gradient of a head before its rotation. dy [rows, head_pad] f32."""
    if S.rope:
        cos, sin = angles(w, r, S)
        turned = tl.dot((dy * sin).to(dtype), tl.trans(rotation(dtype, S)), input_precision=S.precision)
        dy = dy * cos + turned
    return dy


@triton.jit
def scores_backward(p, do, v, r, S: tl.constexpr):
    """Gradient [rows, rows] f32 of q k^T, from that of o and softmax's p."""
    dp = tl.dot(do, tl.trans(v), input_precision=S.precision)
    if S.packed:
        _, allowed = visible(r, S)
        dp = tl.where(allowed, dp, 0.0)
    ds = p * (dp - tl.sum(dp * p, 1)[:, None]) * S.score_factor
    if S.packed:
        ds = tl.where(allowed, ds, 0.0)
    return ds


@triton.jit
def attention_backward(xn, dy, w, r, WIDE, S: tl.constexpr):
    """Gradient [rows, d_pad] f32 of self_attention's input. xn, dy [rows, d_pad] in the operand dtype."""
    group: tl.constexpr = S.n_heads // S.n_kv_heads
    dn = tl.zeros(xn.shape, tl.float32)
    for j in range(S.n_kv_heads):
        at_k = (S.n_heads + j) * S.head_pad
        at_v = (S.n_heads + S.n_kv_heads + j) * S.head_pad
        k = head(xn, w, at_k, S.rope, r, S)
        v = head(xn, w, at_v, False, r, S)
        k, taint_kv = apart(k, tl.zeros(r.seq.shape, tl.float32), S)
        v, taint_kv = apart(v, taint_kv, S)
        dk = tl.zeros(k.shape, tl.float32)
        dv = tl.zeros(k.shape, tl.float32)
        for i in range(group):
            h = j * group + i
            q = head(xn, w, h * S.head_pad, S.rope, r, S)
            q, taint = apart(q, taint_kv, S)
            at_o = S.starts[1] + h * S.head_pad
            do = tl.dot(dy, tl.trans(weight_tile(w, at_o, S.head_pad, S)), input_precision=S.precision)
            do = tl.where((r.seq >= 0)[:, None], do, 0.0).to(xn.dtype)
            do, taint = apart(do, taint, S)
            p = probabilities(q, k, taint, r, S)
            o = tl.dot(p.to(xn.dtype), v, input_precision=S.precision).to(xn.dtype)
            keep(WIDE, r, o, at_o, S.head_pad, S.weight_rows)
            dv = tl.dot(tl.trans(p.to(xn.dtype)), do, dv, input_precision=S.precision)
            ds = scores_backward(p, do, v, r, S).to(xn.dtype)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=S.precision)
            dq = tl.dot(ds, k, input_precision=S.precision)
            dq = rotate_backward(dq, xn.dtype, w, r, S).to(xn.dtype)
            keep(WIDE, r, dq, h * S.head_pad, S.head_pad, S.weight_rows)
            dn = tl.dot(dq, weight_tile(w, h * S.head_pad, S.head_pad, S), dn, input_precision=S.precision)
        dk = rotate_backward(dk, xn.dtype, w, r, S).to(xn.dtype)
        dv = dv.to(xn.dtype)
        keep(WIDE, r, dk, at_k, S.head_pad, S.weight_rows)
        keep(WIDE, r, dv, at_v, S.head_pad, S.weight_rows)
        dn = tl.dot(dk, weight_tile(w, at_k, S.head_pad, S), dn, input_precision=S.precision)
        dn = tl.dot(dv, weight_tile(w, at_v, S.head_pad, S), dn, input_precision=S.precision)
    return dn


@triton.jit
def mlp_backward(xn, dy, w, r, WIDE, S: tl.constexpr):
    """Gradient [rows, d_pad] f32 of the MLP's input. xn, dy [rows, d_pad] in the operand dtype."""
    kind: tl.constexpr = S.activation
    dn = tl.zeros(xn.shape, tl.float32)
    for c in range(0, S.ff_end, S.ff_chunk):
        w2 = weight_tile(w, S.starts[3] + c, S.ff_chunk, S)
        da = tl.dot(dy, tl.trans(w2), input_precision=S.precision)
        gate = project(xn, w, S.starts[2] + c, S.ff_chunk, S)
        if S.hidden == 2:
            up = project(xn, w, S.starts[2] + S.ff_pad + c, S.ff_chunk, S)
            y, dgate = activate_backward(gate, da * up, kind, xn.dtype == tl.float32)
            dup = da * y
            y *= up
        else:
            y, dgate = activate_backward(gate, da, kind, xn.dtype == tl.float32)
        keep(WIDE, r, y.to(xn.dtype), S.starts[3] + c, S.ff_chunk, S.weight_rows)
        dgate = without_ff_pads(dgate, c, S).to(xn.dtype)
        keep(WIDE, r, dgate, S.starts[2] + c, S.ff_chunk, S.weight_rows)
        w1 = weight_tile(w, S.starts[2] + c, S.ff_chunk, S)
        dn = tl.dot(dgate, w1, dn, input_precision=S.precision)
        if S.hidden == 2:
            dup = without_ff_pads(dup, c, S).to(xn.dtype)
            keep(WIDE, r, dup, S.starts[2] + S.ff_pad + c, S.ff_chunk, S.weight_rows)
            w_up = weight_tile(w, S.starts[2] + S.ff_pad + c, S.ff_chunk, S)
            dn = tl.dot(dup, w_up, dn, input_precision=S.precision)
    return dn


@triton.jit
def load_state(X, r, S: tl.constexpr):
    """A state's rows, f32 [rows, d_pad], 0 in the pads."""
    return tl.load(tile_of(X, r, S), mask=is_token(r, S), other=0.0).to(tl.float32)


@triton.jit
def store_state(X, r, x, S: tl.constexpr):
    """Write a state's rows, but not its pads."""
    tl.store(tile_of(X, r, S), x, mask=is_token(r, S))


@triton.jit
def is_token(r, S: tl.constexpr):
    """Mask [rows, d_pad]: what is neither pad nor padding."""
    return (r.seq >= 0)[:, None] & (tl.arange(0, S.d_pad)[None, :] < S.d_model)


@triton.jit
def zeros(n: tl.constexpr, S: tl.constexpr):
    """[n, d_pad] f32."""
    width: tl.constexpr = S.d_pad
    return tl.zeros([n, width], tl.float32)


@triton.jit
def kept(X, r, S: tl.constexpr):
    """What :func:`keep` stored of a narrow operand."""
    at = X + r.start * S.d_pad + (r.i[:, None] * S.d_pad + tl.arange(0, S.d_pad)[None, :])
    return tl.load(at, mask=r.inside[:, None], other=0.0)


@triton.jit
def branch_operands(X, io, DV, is_mlp: tl.constexpr, w, r, batch, narrow, S: tl.constexpr):
    """What a branch read, xn, and the gradient of what it gave, dy: kept in narrow, a few rows at a time."""
    slot: tl.constexpr = NORM2 if is_mlp else NORM1
    total = zeros(S.step, S)
    for first in range(0, S.rows, S.step):
        p = place(io.lens, r.seq_len, batch, first, S.step, S)
        xn = norm(load_state(X, p, S), w, slot, S).to(w.w.dtype.element_ty)
        keep(narrow[0], p, xn, 0, S.d_pad, S.d_pad)
        dy = load_state(io.dh, p, S) * S.scale
        keep(narrow[1], p, dy.to(xn.dtype), 0, S.d_pad, S.d_pad)
        total += dy
    add_sum(total, DV + (MLP_BIAS if is_mlp else OUT_BIAS) * S.d_pad, S)
    tl.debug_barrier()


@triton.jit
def norm_and_residual(X, io, DV, slot: tl.constexpr, w, r, batch, S: tl.constexpr):
    """dh += norm'(x, dn), a few rows at a time."""
    weight = zeros(S.step, S)
    bias = zeros(S.step, S)
    for first in range(0, S.rows, S.step):
        p = place(io.lens, r.seq_len, batch, first, S.step, S)
        dn = load_state(io.dn, p, S)
        if S.norm != "none":
            bias += dn
            dn, share = norm_input(load_state(X, p, S), dn, w, slot, S)
            weight += share
        store_state(io.dh, p, load_state(io.dh, p, S) + dn, S)
    if S.norm != "none":
        add_sum(weight, DV + slot * S.d_pad, S)
        add_sum(bias, DV + (slot + 1) * S.d_pad, S)


@triton.jit
def after_norms(X, io, DV, is_mlp: tl.constexpr, w, r, narrow, S: tl.constexpr):
    """:func:`branch_operands` where a norm comes after the branch, which is recomputed for it."""
    slot: tl.constexpr = NORM2 if is_mlp else NORM1
    x, dh = load_state(X, r, S), load_state(io.dh, r, S)
    if S.placement == "post":
        dh = norm_backward(branch_sum(x, is_mlp, w, r, S), dh, w, slot, DV, S)
        store_state(io.dh, r, dh, S)
        xn = x.to(w.w.dtype.element_ty)
    else:
        xn = norm(x, w, slot, S).to(w.w.dtype.element_ty)
    dy = dh * S.scale
    if S.placement == "sandwich":
        dy = norm_backward(branch(xn, tl.zeros_like(x), is_mlp, w, r, S), dy, w, slot + 2, DV, S)
    add_sum(dy, DV + (MLP_BIAS if is_mlp else OUT_BIAS) * S.d_pad, S)
    keep(narrow[0], r, xn, 0, S.d_pad, S.d_pad)
    keep(narrow[1], r, dy.to(xn.dtype), 0, S.d_pad, S.d_pad)
    tl.debug_barrier()


@triton.jit
def half_layer_backward(X, io, DV, is_mlp: tl.constexpr, w, r, batch, operands, S: tl.constexpr):
    """Turns the gradient of a half layer's output, in io.dh, into that of its input, whose state is X.

    operands: this loop's and layer's; narrow is a tuple: xn, and dy. Between the steps all is in memory (L2),
    so that each has the registers for itself.
    """
    if S.placement == "pre":
        branch_operands(X, io, DV, is_mlp, w, r, batch, operands.narrow, S)
    else:
        after_norms(X, io, DV, is_mlp, w, r, operands.narrow, S)
    xn, dy = kept(operands.narrow[0], r, S), kept(operands.narrow[1], r, S)
    if is_mlp:
        dn = mlp_backward(xn, dy, w, r, operands.wide, S)
    else:
        dn = attention_backward(xn, dy, w, r, operands.wide, S)
    if S.placement == "post":
        store_state(io.dh, r, load_state(io.dh, r, S) + dn, S)
    else:
        store_state(io.dn, r, dn, S)
        tl.debug_barrier()
        norm_and_residual(X, io, DV, NORM2 if is_mlp else NORM1, w, r, batch, S)
    tl.debug_barrier()


@triton.jit
def loop_backward(SAVED, io, w, DV, r, batch, tokens, at, n_rows, S: tl.constexpr):
    """One loop. SAVED: its states. at: its first row among the operands' n_rows."""
    stride = tokens * S.d_model
    if S.loop_norm:
        u = load_state(SAVED + (S.saves - 1) * stride, r, S)
        store_state(io.dh, r, norm_backward(u, load_state(io.dh, r, S), w, LOOP_NORM, DV, S), S)
        tl.debug_barrier()
    for from_last in range(S.n_layers):
        layer = S.n_layers - 1 - from_last
        own, dv = of_layer(w, layer, S), DV + layer * N_SLOTS * S.d_pad
        X, first = SAVED + layer * S.halves * stride, layer * n_rows + at
        n, wide = io.operands.narrow + first * S.d_pad, io.operands.wide + first * S.weight_rows
        part = S.n_layers * n_rows * S.d_pad
        if S.d_ff > 0:
            mlp_operands = Operands(wide, (n + 2 * part, n + 3 * part))
            half_layer_backward(X + stride, io, dv, True, own, r, batch, mlp_operands, S)
        half_layer_backward(X, io, dv, False, own, r, batch, Operands(wide, (n, n + part)), S)


@triton.jit(do_not_specialize=["n_loops", "n_grad_loops", "low", "high", "seq_len", "batch"])
def resident_backward(
    io,  # Gradients
    w,  # Packed
    n_loops,
    n_grad_loops,
    low,  # loops low + 1 .. high are walked
    high,
    seq_len,
    batch,
    S: tl.constexpr,  # Tile
    keep_all: tl.constexpr,
):
    r = place(io.lens, seq_len, batch, 0, S.rows, S)
    tokens = tl.cast(batch, tl.int64) * seq_len
    stride = tokens * S.d_model
    DV = io.v + tl.program_id(0).to(tl.int64) * S.n_layers * N_SLOTS * S.d_pad
    last = own_loops(io.loops, n_loops)
    first = tl.maximum(last - n_grad_loops, 0)  # loops first + 1 .. last carry gradient
    for back in range(high - low):
        t = high - 1 - back  # loop t + 1 turned h_t into h_{t+1}
        if t >= first:
            if keep_all:
                returned = load_state(io.h + t * stride, r, S)
                store_state(io.dh, r, load_state(io.dh, r, S) + returned, S)
                tl.debug_barrier()
            if t < last:
                saved = io.saved + t * S.saves * stride
                at, n_rows = (t - low) * tokens, (high - low) * tokens
                loop_backward(saved, io, w, DV, r, batch, tokens, at, n_rows, S)
                if S.inject:
                    store_state(io.de, r, load_state(io.de, r, S) + load_state(io.dh, r, S), S)
    # What lies before the loops that carry gradient gets none.
    if first > low:
        store_state(io.dh, r, zeros(S.rows, S), S)
