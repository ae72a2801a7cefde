"""The MLP's activations and their gradients, fp32: the only place that knows them on this backend.

Each is non-finite where PyTorch's is. The hardware's plain maximum drops a NaN, hence ``propagate_nan``.
EXACT: for fp32 operands. For narrower ones GELU's erf, 28 instructions an element, is an exponential of a
polynomial: its error is at most 1e-6, that of its slope 2e-6, where rounding the result to fp16 costs up to
4.9e-4 of it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu_and_tail(x):
    """GELU and Phi(-|x|) = 2^log2, the coefficients from benchmarks/offline/fit_gelu.py.

    x Phi(x) = max(x, 0) - |x| Phi(-|x|). The maximum may drop a NaN: the other term has it, too.
    """
    a = tl.abs(x)
    log2 = -0.0004925047978758812 * a + 0.007229604292660952
    log2 = log2 * a - 0.052220799028873444
    log2 = log2 * a - 0.459526389837265
    log2 = log2 * a - 1.1510180234909058
    log2 = log2 * a - 1.0000033378601074
    tail = tl.exp2(log2)
    return tl.maximum(x, 0.0) - a * tail, tail


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    """1 / (1 + exp(-x)); for narrow operands with a root, half the instructions of a division."""
    if EXACT:
        y = tl.sigmoid(x)
    else:
        root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
        y = root * root
    return y


@triton.jit
def activate(x, KIND: tl.constexpr, EXACT: tl.constexpr):
    """f(x); of a gated MLP, what its gate goes through."""
    if KIND == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == "relu2":
        root = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = root * root
    elif KIND == "gelu" and EXACT:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu":
        y, _ = gelu_and_tail(x)
    elif KIND == "gelu_tanh" or KIND == "geglu_tanh":
        # tanh(z) = 2 sigmoid(2 z) - 1, hence 0.5 x (1 + tanh(z)) = x sigmoid(2 z).
        y = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), EXACT)
    else:
        y = x * sigmoid(x, EXACT)
    return y


@triton.jit
def activate_backward(x, dy, KIND: tl.constexpr, EXACT: tl.constexpr):
    """f(x), and dy f'(x)."""
    if KIND == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        dx = tl.where(x <= 0.0, 0.0, dy)
    elif KIND == "relu2":
        root = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = root * root
        dx = tl.where(x <= 0.0, 0.0, dy * 2.0 * root)
    elif KIND == "gelu":
        if EXACT:
            share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
            y = x * share
        else:
            y, tail = gelu_and_tail(x)
            share = tl.where(x > 0.0, 1.0 - tail, tail)
        dx = dy * (share + x * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x))
    elif KIND == "gelu_tanh" or KIND == "geglu_tanh":
        share = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), EXACT)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        y = x * share
        dx = dy * (share + x * share * (1.0 - share) * slope)
    else:
        share = sigmoid(x, EXACT)
        y = x * share
        dx = dy * share * (1.0 + x * (1.0 - share))
    return y, dx
