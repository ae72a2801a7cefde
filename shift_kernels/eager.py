"""The looped block outside torch.compile: the same backend calls as the operator's, without its overhead.

A registered operator costs over a millisecond a step in Python; a small block's whole step takes five.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from shift_kernels.errors import input_error
from shift_kernels.spec import BlockSpec


class EagerLoopedBlock(torch.autograd.Function):
    """``apply(backend, spec, n_loops, seq_lens, options, e, *weights)`` returns h and the loops used."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: ModuleType,
        spec: BlockSpec,
        n_loops: int | Tensor,
        seq_lens: Tensor | None,
        options: dict[str, Any],
        e: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        named = dict(zip(spec.weight_shapes(), weights, strict=True))
        h, used, saved = backend.forward(
            e, named, spec, n_loops, seq_lens=seq_lens, halt_threshold=None, for_backward=True, **options
        )
        ctx.backend, ctx.spec, ctx.options, ctx.n_weights = backend, spec, options, len(weights)
        ctx.own_loops = isinstance(n_loops, Tensor)
        ctx.n_loops = None if ctx.own_loops else n_loops
        ctx.save_for_backward(e, n_loops if ctx.own_loops else None, seq_lens, *weights, *saved)
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
        e, own_loops, seq_lens, *tensors = ctx.saved_tensors
        weights, saved = tensors[: ctx.n_weights], tensors[ctx.n_weights :]
        grad_e, grads = ctx.backend.backward(
            grad_h,
            e,
            dict(zip(ctx.spec.weight_shapes(), weights, strict=True)),
            ctx.spec,
            own_loops if ctx.own_loops else ctx.n_loops,
            seq_lens=seq_lens,
            saved=saved,
            **ctx.options,
        )
        return None, None, None, None, None, grad_e, *grads
