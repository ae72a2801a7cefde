"""Backward of the looped block from saved states: recompute a layer, walk t = T..1 with dh on chip.

For each loop from the last, for each layer from the last, x being the layer's saved input:

    mid = x + attention(norm(x))                                     recomputed
    dh += norm'(mid, mlp'(dh));   dh += norm'(x, attention'(dh))     one chunk or head at a time

Weight gradients are not accumulated here: each matmul's two operands go to device memory, and one library
matmul a weight contracts them over all loops x tokens (triton_backend.py). Norm weights' gradients are summed
in a buffer of the program's own. No atomics: the result is the same bits every time.

Registers: dh and one branch's input gradient [rows, d_pad] fp32. dh enters and leaves through DH, so that
loops can be split into several launches that bound the memory of the operands.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shift_kernels.backends.triton.activation import activate_backward
from shift_kernels.backends.triton.resident_forward import (
    NORM1,
    NORM2,
    SLOTS,
    angles,
    apart,
    attention,
    branch_sum,
    head,
    mlp,
    norm,
    normalise,
    place,
    probabilities,
    project,
    rotation,
    sublayer,
    tile_of,
    visible,
    weight_tile,
    without_ff_pads,
)


@triton.jit
def norm_backward(x, dy, V, slot, DV, S: tl.constexpr):
    """Gradient of a norm's input x; its weight's and bias's are added to this program's DV."""
    if S.norm != "none":
        cols = tl.arange(0, S.d_pad)
        unit, inverse = normalise(x, S)
        at = DV + slot * S.d_pad + cols
        # A barrier on both sides: the threads that load are not always the ones that stored.
        tl.debug_barrier()
        weight_sum = tl.load(at) + tl.sum(dy * unit, 0)
        bias_sum = tl.load(at + S.d_pad) + tl.sum(dy, 0)
        tl.debug_barrier()
        tl.store(at, weight_sum)
        tl.store(at + S.d_pad, bias_sum)
        dy = dy * tl.load(V + slot * S.d_pad + cols)[None, :]
        dx = dy - unit * (tl.sum(dy * unit, 1) / S.d_model)[:, None]
        if S.norm == "layernorm":
            dx = tl.where(cols[None, :] < S.d_model, dx - (tl.sum(dy, 1) / S.d_model)[:, None], 0.0)
        dy = dx * inverse[:, None]
    return dy


@triton.jit
def keep(X, row, inside, x, first, n: tl.constexpr, width: tl.constexpr):
    """Store columns first .. first + n of a matmul operand, [tokens, width]."""
    at = X + row[:, None] * width + first + tl.arange(0, n)[None, :]
    tl.store(at, x, mask=inside[:, None])


@triton.jit
def rotate_backward(dy, dtype: tl.constexpr, ROTARY, pos, seq_len, S: tl.constexpr):
    """Gradient of a head before its rotation. dy [rows, head_pad] f32."""
    if S.rope:
        cos, sin = angles(ROTARY, pos, seq_len, S)
        turned = tl.dot((dy * sin).to(dtype), tl.trans(rotation(dtype, S)), input_precision=S.precision)
        dy = dy * cos + turned
    return dy


@triton.jit
def attention_backward(
    xn, dy, W, B, ROTARY, seq, pos, seq_len, row, inside, DQKV, O, S: tl.constexpr
):  # fmt: skip
    """Gradient [rows, d_pad] f32 of self_attention's input. xn, dy [rows, d_pad] in the operand dtype."""
    group: tl.constexpr = S.n_heads // S.n_kv_heads
    heads: tl.constexpr = S.n_heads + 2 * S.n_kv_heads
    qkv_width: tl.constexpr = heads * S.head_pad
    o_width: tl.constexpr = S.n_heads * S.head_pad
    dn = tl.zeros(xn.shape, tl.float32)
    for j in range(S.n_kv_heads):
        at_k = (S.n_heads + j) * S.head_pad
        at_v = (S.n_heads + S.n_kv_heads + j) * S.head_pad
        k = head(xn, W, B, at_k, S.rope, ROTARY, seq, pos, seq_len, S)
        v = head(xn, W, B, at_v, False, ROTARY, seq, pos, seq_len, S)
        k, taint_kv = apart(k, tl.zeros(seq.shape, tl.float32), S)
        v, taint_kv = apart(v, taint_kv, S)
        dk = tl.zeros(k.shape, tl.float32)
        dv = tl.zeros(k.shape, tl.float32)
        for i in range(group):
            h = j * group + i
            q = head(xn, W, B, h * S.head_pad, S.rope, ROTARY, seq, pos, seq_len, S)
            q, taint = apart(q, taint_kv, S)
            wo = weight_tile(W, (heads + h) * S.head_pad, S.head_pad, S)
            do = tl.dot(dy, tl.trans(wo), input_precision=S.precision)
            do = tl.where((seq >= 0)[:, None], do, 0.0).to(xn.dtype)
            do, taint = apart(do, taint, S)
            p = probabilities(q, k, taint, seq, pos, S)
            o = tl.dot(p.to(xn.dtype), v, input_precision=S.precision).to(xn.dtype)
            keep(O, row, inside, o, h * S.head_pad, S.head_pad, o_width)
            dv = tl.dot(tl.trans(p.to(xn.dtype)), do, dv, input_precision=S.precision)
            dp = tl.dot(do, tl.trans(v), input_precision=S.precision)
            if S.packed:
                _, allowed = visible(seq, pos, S)
                dp = tl.where(allowed, dp, 0.0)
            ds = p * (dp - tl.sum(dp * p, 1)[:, None]) * S.score_factor
            if S.packed:
                ds = tl.where(allowed, ds, 0.0)
            ds = ds.to(xn.dtype)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=S.precision)
            dq = tl.dot(ds, k, input_precision=S.precision)
            dq = rotate_backward(dq, xn.dtype, ROTARY, pos, seq_len, S).to(xn.dtype)
            keep(DQKV, row, inside, dq, h * S.head_pad, S.head_pad, qkv_width)
            dn = tl.dot(dq, weight_tile(W, h * S.head_pad, S.head_pad, S), dn, input_precision=S.precision)
        dk = rotate_backward(dk, xn.dtype, ROTARY, pos, seq_len, S).to(xn.dtype)
        dv = dv.to(xn.dtype)
        keep(DQKV, row, inside, dk, at_k, S.head_pad, qkv_width)
        keep(DQKV, row, inside, dv, at_v, S.head_pad, qkv_width)
        dn = tl.dot(dk, weight_tile(W, at_k, S.head_pad, S), dn, input_precision=S.precision)
        dn = tl.dot(dv, weight_tile(W, at_v, S.head_pad, S), dn, input_precision=S.precision)
    return dn


@triton.jit
def mlp_backward(xn, dy, W, B, row, inside, DPRE, ACT, S: tl.constexpr):
    """Gradient [rows, d_pad] f32 of the MLP's input. xn, dy [rows, d_pad] in the operand dtype."""
    first: tl.constexpr = 2 * (S.n_heads + S.n_kv_heads) * S.head_pad
    last: tl.constexpr = S.weight_rows - S.ff_pad
    width: tl.constexpr = last - first
    kind: tl.constexpr = S.activation
    dn = tl.zeros(xn.shape, tl.float32)
    for c in range(0, S.ff_pad, S.ff_chunk):
        w2 = weight_tile(W, last + c, S.ff_chunk, S)
        da = tl.dot(dy, tl.trans(w2), input_precision=S.precision)
        gate = project(xn, W, B, first + c, S.ff_chunk, S)
        if S.activation == "swiglu":
            up = project(xn, W, B, first + S.ff_pad + c, S.ff_chunk, S)
            y, dgate = activate_backward(gate, da * up, kind)
            dup = da * y
            y *= up
        else:
            y, dgate = activate_backward(gate, da, kind)
        keep(ACT, row, inside, y.to(xn.dtype), c, S.ff_chunk, S.ff_pad)
        dgate = without_ff_pads(dgate, c, S).to(xn.dtype)
        keep(DPRE, row, inside, dgate, c, S.ff_chunk, width)
        dn = tl.dot(dgate, weight_tile(W, first + c, S.ff_chunk, S), dn, input_precision=S.precision)
        if S.activation == "swiglu":
            dup = without_ff_pads(dup, c, S).to(xn.dtype)
            keep(DPRE, row, inside, dup, S.ff_pad + c, S.ff_chunk, width)
            w_up = weight_tile(W, first + S.ff_pad + c, S.ff_chunk, S)
            dn = tl.dot(dup, w_up, dn, input_precision=S.precision)
    return dn


@triton.jit
def sublayer_backward(
    x, dh, is_mlp: tl.constexpr, W, B, V, DV, ROTARY, seq, pos, seq_len, row, inside,
    XN, DY, FIRST, SECOND, S: tl.constexpr,
):  # fmt: skip
    """Gradient of a half layer's input x, given that of its output. All [rows, d_pad] f32.

    FIRST, SECOND: (DQKV, O) of the attention or (DPRE, ACT) of the MLP.
    """
    slot: tl.constexpr = NORM2 if is_mlp else NORM1
    if S.placement == "post":
        before = branch_sum(x, is_mlp, W, B, V, ROTARY, seq, pos, seq_len, S)
        dh = norm_backward(before, dh, V, slot, DV, S)
    xn = x
    if S.placement != "post":
        xn = norm(x, V, slot, S)
    xn = xn.to(W.dtype.element_ty)
    dy = dh * S.scale
    if S.placement == "sandwich":
        if is_mlp:
            y = mlp(xn, tl.zeros_like(x), W, B, V, S)
        else:
            y = attention(xn, tl.zeros_like(x), W, B, V, ROTARY, seq, pos, seq_len, S)
        dy = norm_backward(y, dy, V, slot + 2, DV, S)
    dy = dy.to(xn.dtype)
    keep(XN, row, inside, xn, 0, S.d_pad, S.d_pad)
    keep(DY, row, inside, dy, 0, S.d_pad, S.d_pad)
    if is_mlp:
        dn = mlp_backward(xn, dy, W, B, row, inside, FIRST, SECOND, S)
    else:
        dn = attention_backward(
            xn, dy, W, B, ROTARY, seq, pos, seq_len, row, inside, FIRST, SECOND, S
        )  # fmt: skip
    if S.placement != "post":
        dn = norm_backward(x, dn, V, slot, DV, S)
    return dh + dn


@triton.jit(do_not_specialize=["n_loops", "n_grad_loops", "low", "high", "seq_len", "batch"])
def resident_backward(
    SAVED,  # [n_loops * saves, batch, seq_len, d_model]: layer inputs of the forward
    GRAD_H,  # [batch, seq_len, d_model], or with keep_all [n_loops, ...]
    W,  # packed weights, see resident_forward.py
    B,
    V,
    ROTARY,
    LOOPS,  # [batch]
    LENS,  # [batch], read with ragged
    DH,  # [batch, seq_len, d_model] f32: gradient of h_high, becomes that of h_low
    DE,  # [batch, seq_len, d_model] f32: gradient of e so far, with injection
    DV,  # [programs, n_layers + 1, 10, d_pad] f32: gradients of V so far
    XN,  # matmul operands, each [n_layers, high - low, tokens, width]
    DQKV,
    O,
    DY,
    XN2,
    DPRE,
    ACT,
    DY2,
    n_loops,
    n_grad_loops,
    low,
    high,
    seq_len,
    batch,
    S: tl.constexpr,
    own_loops: tl.constexpr,
    ragged: tl.constexpr,
    keep_all: tl.constexpr,
):
    pid = tl.program_id(0)
    row, inside, seq, pos = place(pid, LENS, seq_len, batch, ragged, S)
    column = tl.arange(0, S.d_pad)[None, :] < S.d_model
    valid = (seq >= 0)[:, None] & column
    tokens = tl.cast(batch, tl.int64) * seq_len
    stride = tokens * S.d_model
    qkv_width: tl.constexpr = (S.n_heads + 2 * S.n_kv_heads) * S.head_pad
    o_width: tl.constexpr = S.n_heads * S.head_pad
    pre_width: tl.constexpr = S.weight_rows - S.ff_pad - 2 * (S.n_heads + S.n_kv_heads) * S.head_pad
    DV += pid.to(tl.int64) * (S.n_layers + 1) * SLOTS * S.d_pad

    last = n_loops
    if own_loops:
        last = tl.minimum(tl.load(LOOPS + pid), n_loops).to(tl.int32)
    first = tl.maximum(last - n_grad_loops, 0)  # loops first + 1 .. last carry gradient
    dh = tl.load(tile_of(DH, row, S), mask=valid, other=0.0)
    for back in range(high - low):
        t = high - 1 - back  # loop t + 1 turned h_t into h_{t+1}
        if t >= first:
            if keep_all:
                dh += tl.load(tile_of(GRAD_H + t * stride, row, S), mask=valid, other=0.0).to(tl.float32)
            if t < last:
                states = SAVED + t * S.saves * stride
                if S.loop_norm:
                    u = tl.load(tile_of(states + S.n_layers * stride, row, S), mask=valid, other=0.0)
                    end = S.n_layers * SLOTS * S.d_pad
                    dh = norm_backward(u.to(tl.float32), dh, V + end, NORM1, DV + end, S)
                for from_last in range(S.n_layers):
                    layer = S.n_layers - 1 - from_last
                    w = W + layer * S.weight_rows * S.d_pad
                    b = B + layer * S.weight_rows
                    v = V + layer * SLOTS * S.d_pad
                    dv = DV + layer * SLOTS * S.d_pad
                    at = (layer * (high - low) + t - low) * tokens
                    x = tl.load(tile_of(states + layer * stride, row, S), mask=valid, other=0.0)
                    x = x.to(tl.float32)
                    if S.d_ff > 0:
                        mid = sublayer(x, False, w, b, v, ROTARY, seq, pos, seq_len, S)
                        dh = sublayer_backward(
                            mid, dh, True, w, b, v, dv, ROTARY, seq, pos, seq_len, row, inside,
                            XN2 + at * S.d_pad, DY2 + at * S.d_pad,
                            DPRE + at * pre_width, ACT + at * S.ff_pad, S,
                        )  # fmt: skip
                    dh = sublayer_backward(
                        x, dh, False, w, b, v, dv, ROTARY, seq, pos, seq_len, row, inside,
                        XN + at * S.d_pad, DY + at * S.d_pad,
                        DQKV + at * qkv_width, O + at * o_width, S,
                    )  # fmt: skip
                if S.inject:
                    de = tile_of(DE, row, S)
                    tl.store(de, tl.load(de, mask=valid, other=0.0) + dh, mask=valid)
    # What lies before the loops that carry gradient gets none.
    dh = tl.where(first > low, 0.0, dh)
    tl.store(tile_of(DH, row, S), dh, mask=valid)
