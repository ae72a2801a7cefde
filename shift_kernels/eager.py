"""The looped block outside torch.compile: the same backend calls as the operator's, without its overhead.

A registered operator costs over a millisecond a step in Python; a small block's whole step takes five.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from shift_kernels.asked import Asked
from shift_kernels.errors import input_error
from shift_kernels.spec import BlockSpec


class EagerLoopedBlock(torch.autograd.Function):
    """``apply(backend, spec, asked, e, *weights)`` returns h and the loops used."""

    @staticmethod
    def forward(
        ctx: Any, backend: ModuleType, spec: BlockSpec, asked: Asked, e: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        named = dict(zip(spec.weight_shapes(), weights, strict=True))
        h, used, saved = backend.forward(e, named, spec, asked, for_backward=True)
        ctx.backend, ctx.spec, ctx.asked, ctx.n_weights = backend, spec, asked, len(weights)
        ctx.save_for_backward(e, *weights, *saved)
        ctx.mark_non_differentiable(used)
        return h, used

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise input_error(
                "shift_kernels.looped_block",
                "backend",
                ctx.backend.NAME,
                "backend='torch' outside torch.compile for second derivatives",
                "Call looped_block(..., backend='torch').",
            )
        e, *tensors = ctx.saved_tensors
        weights, saved = tensors[: ctx.n_weights], tensors[ctx.n_weights :]
        named = dict(zip(ctx.spec.weight_shapes(), weights, strict=True))
        grad_e, grads = ctx.backend.backward(_in_memory(grad_h), e, named, ctx.spec, ctx.asked, saved)
        return None, None, None, grad_e, *grads


def _in_memory(x: Tensor) -> Tensor:
    """The same values where kernels find them: autograd may leave a negation to do, or store no zeros."""
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if x._is_zerotensor() else x.resolve_neg()
