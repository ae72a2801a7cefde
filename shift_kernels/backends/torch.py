"""The ``torch`` backend: the reference behind the backend interface. It serves every call.

Its backward recomputes the forward under autograd, so nothing is kept between the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shift_kernels import reference
from shift_kernels.backends.base import WhyNot
from shift_kernels.cache import Step
from shift_kernels.call import AttentionProblem, CallOptions, Problem, differentiable, named_again
from shift_kernels.reference import Mask
from shift_kernels.spec import GATED, BlockSpec
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
        hidden = 2 * s.d_ff if s.activation in GATED else s.d_ff
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
        """Gradients of e, of the weights, in the order of ``weights``, and of h0 if it is given."""
        with recording():
            inputs = [x.detach().requires_grad_() for x in differentiable(e, weights, options)]
            e, weights, options = named_again(inputs, spec, options)
            h, _ = reference.looped_block(e, weights, spec, **vars(options))
            grad_e, *grads = torch.autograd.grad(h, inputs, grad_h)
        return grad_e, grads

    def extend(
        self, e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, step: Step
    ) -> Tensor:
        """h_T (or all h_t) of the tokens e, which see those in the step's cache and are appended to it."""
        index = torch.arange(e.shape[1])
        real = (index >= step.begin[:, None]) & (index < step.end[:, None])
        heads = _CachedHeads(step, real, (index + step.offset[:, None]).clamp(min=0), options.n_loops)
        real = real.to(e.device)[..., None]
        offset = step.offset
        if options.position_offset is not None:
            offset = offset + options.position_offset.cpu()
        call = {**vars(options), "seq_lens": None, "position_offset": offset}
        h, _ = reference.looped_block(torch.where(real, e, 0), weights, spec, **call, attend=heads.attend)
        return torch.where(real, h, 0)


class _CachedHeads:
    """How the heads of new tokens attend.

    Args:
        real: which tokens are no pads, bool [batch, seq_len] on the CPU.
        position: of each token, likewise.
        n_loops: a sample that is done writes no more: with shared caches it would spoil its last loops.
    """

    def __init__(self, step: Step, real: Tensor, position: Tensor, n_loops: int | Tensor) -> None:
        self.cache, self.seen = step.cache, int(step.after.max())
        device = self.cache.device
        self.loops = None if isinstance(n_loops, int) else n_loops.cpu()
        self.rows = real.nonzero(as_tuple=True)
        self.at = position[self.rows].to(device)
        first, last = int(step.before.min()), int(step.after.max())
        self.together = first if bool(real.all()) and last - first == real.shape[1] else None
        distance = position[..., None] - torch.arange(self.seen)
        allowed = reference.in_reach(distance, True, step.cache.spec.window)[:, None].to(device)
        self.mask = Mask(allowed, torch.full((), -torch.inf, device=device))

    def attend(self, loop: int, layer: int, q: Tensor, k: Tensor, v: Tensor, _: Mask | None) -> Tensor:
        """Store the new keys and values, and attend to all."""
        store = self.cache.slot(loop)[layer]
        new = torch.stack([k, v])  # [2, batch, n_kv_heads, seq_len, head_dim]
        if self.together is not None and self.loops is None:
            store[..., self.together : self.seen, :] = new
        else:
            sample, token, at = *self.rows, self.at
            if self.loops is not None:
                runs = loop <= self.loops[sample]
                sample, token, at = sample[runs], token[runs], at[runs.to(at.device)]
            sample, token = sample.to(at.device), token.to(at.device)
            store[:, sample, :, at] = new[:, sample, :, token].to(store.dtype)
        keys, values = store[..., : self.seen, :].to(q.dtype)
        spec = self.cache.spec
        return reference.attend(q, keys, values, self.mask, spec.score_scale, spec.softcap)


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
