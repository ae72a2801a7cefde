"""The MLP's activations and their gradients, fp32: the only place that knows them on this backend.

Each is non-finite where PyTorch's is. The hardware's plain maximum drops a NaN, hence ``propagate_nan``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, KIND: tl.constexpr):
    """f(x); of swiglu's gate, silu."""
    if KIND == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == "relu2":
        root = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = root * root
    elif KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2 z) - 1, hence 0.5 x (1 + tanh(z)) = x sigmoid(2 z).
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = x * tl.sigmoid(x)
    return y


@triton.jit
def activate_backward(x, dy, KIND: tl.constexpr):
    """f(x), and dy f'(x)."""
    if KIND == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        dx = tl.where(x <= 0.0, 0.0, dy)
    elif KIND == "relu2":
        root = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = root * root
        dx = tl.where(x <= 0.0, 0.0, dy * 2.0 * root)
    elif KIND == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        y = x * share
        dx = dy * (share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x))
    elif KIND == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        y = x * share
        dx = dy * (share + x * share * (1.0 - share) * slope)
    else:
        share = tl.sigmoid(x)
        y = x * share
        dx = dy * share * (1.0 + x * (1.0 - share))
    return y, dx
