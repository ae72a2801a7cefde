"""Flash attention as an operator, so that autograd and torch.compile know it."""

from __future__ import annotations

import torch
from torch import Tensor

from shift_kernels.backends.triton.attention import attention_backward, attention_forward, needs_exact
from shift_kernels.errors import input_error


def _exact_like(q: Tensor) -> Tensor:
    """Room for o in float32, if the backward needs one beside o."""
    return q.new_empty(q.shape if needs_exact(q) else (0,), dtype=torch.float32)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, seq_lens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    exact = _exact_like(q)
    o, lse = attention_forward(q, k, v, causal, seq_lens, exact=exact if needs_exact(q) else None)
    return o, exact, lse


_LIB = torch.library.Library("shift_kernels", "FRAGMENT")
_LIB.define(
    "attention(Tensor q, Tensor k, Tensor v, bool causal, Tensor? seq_lens) "
    "-> (Tensor o, Tensor exact, Tensor lse)"
)
_LIB.define(
    "attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, bool causal, "
    "Tensor? seq_lens) -> (Tensor, Tensor, Tensor)"
)
torch.library.impl(_LIB, "attention", "CompositeExplicitAutograd")(_forward)
torch.library.impl(_LIB, "attention_backward", "CompositeExplicitAutograd")(attention_backward)


@torch.library.register_fake("shift_kernels::attention", lib=_LIB)
def _forward_fake(q, k, v, causal, seq_lens):
    return q.new_empty(q.shape), _exact_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("shift_kernels::attention_backward", lib=_LIB)
def _backward_fake(grad_o, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.causal, seq_lens = inputs
    o, exact, lse = output
    ctx.save_for_backward(q, k, v, exact if needs_exact(q) else o, lse, seq_lens)
    ctx.mark_non_differentiable(exact, lse)


def _autograd(ctx, grad_o, *_):
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
