"""The MLP's activations and their gradients, fp32: the only place that knows them on this backend.

Each is non-finite where PyTorch's is. The hardware's plain maximum drops a NaN, hence ``propagate_nan``.
EXACT: for fp32 operands. For narrower ones GELU's erf, 28 instructions an element, is a polynomial: its error
is at most 1.6e-5, that of its slope 3.2e-5, where rounding the result to fp16 costs up to 4.9e-4 of it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu_and_tail(x):
    """GELU and Phi(-|x|), the coefficients from benchmarks/offline/fit_gelu.py.

    x Phi(x) = max(x, 0) - |x| Phi(-|x|). Non-finite for every x that is: -inf + inf is NaN.
    """
    a = tl.minimum(tl.abs(x), 4.5)
    s = a - 2.25  # about the middle, so that no terms cancel
    q = -1.3151538951206021e-05 * s + 4.486757461563684e-05
    q = q * s + 0.00017128988110926002
    q = q * s - 0.0009948682272806764
    q = q * s + 0.0006458957213908434
    q = q * s + 0.006104551255702972
    q = q * s - 0.021636884659528732
    q = q * s + 0.03573797270655632
    q = q * s - 0.03170836344361305
    q = q * s + 0.01222113985568285
    return 0.5 * (x + tl.abs(x)) - a * q, q


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
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = x * tl.sigmoid(x)
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
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        y = x * share
        dx = dy * (share + x * share * (1.0 - share) * slope)
    else:
        share = tl.sigmoid(x)
        y = x * share
        dx = dy * share * (1.0 + x * (1.0 - share))
    return y, dx
