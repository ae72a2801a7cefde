"""The ``torch`` backend: the reference behind the backend interface. It serves every call.

Its backward recomputes the forward under autograd, so nothing is kept between the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shift_kernels import reference
from shift_kernels.backends.base import WhyNot
from shift_kernels.call import AttentionProblem, CallOptions, Problem
from shift_kernels.spec import BlockSpec
from shift_kernels.torch_internals import recording


class TorchBackend:
    """Plain PyTorch, an operation at a time."""

    name, saves = "torch", False

    def why_not(self, problem: Problem | None) -> WhyNot | None:
        """Nothing is in its way."""
        return None

    def describe(self, problem: Problem) -> str:
        """In a phrase."""
        return "plain PyTorch, an operation at a time"

    def saved_bytes(self, problem: Problem) -> int:
        """Every activation that autograd records (estimate)."""
        s = problem.spec
        hidden = 2 * s.d_ff if s.activation == "swiglu" else s.d_ff
        per_token = s.n_layers * (4 * s.d_model + 2 * s.qkv_dim + 2 * hidden + s.n_heads * problem.seq_len)
        return problem.batch * problem.seq_len * per_token * problem.dtype.itemsize

    def saved_like(
        self, e: Tensor, spec: BlockSpec, n_loops: int, compute_dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Nothing."""
        return []

    def forward(
        self, e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, for_backward: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """h_T (or all h_t), the loops used, and what :meth:`backward` needs besides the inputs (nothing)."""
        return *reference.looped_block(e, weights, spec, **vars(options)), []

    def backward(
        self,
        grad_h: Tensor,
        e: Tensor,
        weights: dict[str, Tensor],
        spec: BlockSpec,
        options: CallOptions,
        saved: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of e and of the weights, in the order of ``weights``."""
        with recording():
            inputs = [x.detach().requires_grad_() for x in (e, *weights.values())]
            named = dict(zip(weights, inputs[1:], strict=True))
            h, _ = reference.looped_block(inputs[0], named, spec, **vars(options))
            grad_e, *grad_weights = torch.autograd.grad(h, inputs, grad_h)
        return grad_e, grad_weights


class TorchAttention:
    """Scores, softmax and weighted sum in plain PyTorch."""

    name = "torch"

    def why_not(self, problem: AttentionProblem | None) -> WhyNot | None:
        """Nothing is in its way."""
        return None

    def describe(self, problem: AttentionProblem) -> str:
        """In a phrase."""
        return "plain PyTorch, with the scores in memory"

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, seq_lens: Tensor | None) -> Tensor:
        """As :func:`shift_kernels.attention`, whose checks came before."""
        return reference.attention(q, k, v, causal=causal, seq_lens=seq_lens)


TORCH, TORCH_ATTENTION = TorchBackend(), TorchAttention()
