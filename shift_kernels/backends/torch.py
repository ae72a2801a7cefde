"""The ``torch`` backend: the reference behind the backend interface, with the library's fused attention.

It serves every call. Its backward recomputes the forward under autograd, so nothing is kept between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shift_kernels import reference
from shift_kernels.backends.base import WhyNot
from shift_kernels.cache import Step
from shift_kernels.call import AttentionProblem, CallOptions, Problem, differentiable, named_again
from shift_kernels.reference import Heads, Mask
from shift_kernels.spec import GATED, BlockSpec
from shift_kernels.torch_internals import is_exporting, recording, transforms_are_active


class TorchBackend:
    """Plain PyTorch, an operation at a time."""

    name, saves = "torch", False

    def why_not(self, problem: Problem | None) -> WhyNot | None:
        """Nothing is in its way."""
        return None

    def describe(self, problem: Problem) -> str:
        """In a phrase."""
        explicit = _needs_scores(problem.spec, problem.dtype)
        how = f"scores in memory ({explicit})" if explicit else "fused attention"
        return f"plain PyTorch, an operation at a time, {how}"

    def saved_bytes(self, problem: Problem) -> int:
        """Every activation that autograd records (estimate)."""
        s = problem.spec
        hidden = 2 * s.d_ff if s.activation in GATED else s.d_ff
        scores = s.n_heads * problem.seq_len if _needs_scores(s, problem.dtype) else s.n_heads
        per_token = s.n_layers * (4 * s.d_model + 2 * s.qkv_dim + 2 * hidden + scores)
        return problem.batch * problem.seq_len * per_token * problem.dtype.itemsize

    def saved_like(
        self, e: Tensor, spec: BlockSpec, n_loops: int, compute_dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Nothing."""
        return []

    def looped_block(
        self, e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions
    ) -> tuple[Tensor, Tensor]:
        """As :func:`reference.looped_block`, recorded by autograd."""
        inputs = differentiable(e, weights, options)
        heads = None
        if not _needs_scores(spec, e.dtype) and not transforms_are_active(inputs):
            heads = _fused_heads(e, spec, options)
        return reference.looped_block(e, weights, spec, **options.keywords(), heads=heads)

    def forward(
        self, e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, for_backward: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """h_T (or all h_t), the loops used, and what :meth:`backward` needs besides the inputs (nothing)."""
        return *self.looped_block(e, weights, spec, options), []

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
            h, _ = self.looped_block(e, weights, spec, options)
            grad_e, *grads = torch.autograd.grad(h, inputs, grad_h)
        return grad_e, grads

    def extend(
        self, e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, step: Step
    ) -> Tensor:
        """h_T (or all h_t) of the tokens e, which see those in the step's cache and are appended to it."""
        index = torch.arange(e.shape[1])
        real = index < step.n_new[:, None]
        heads = _CachedHeads(step, real, index + step.before[:, None], options.n_loops)
        real = real.to(e.device)[..., None]
        offset = step.before
        if options.position_offset is not None:
            offset = offset + options.position_offset.cpu()
        call = {**options.keywords(), "seq_lens": None, "position_offset": offset}
        h, _ = reference.looped_block(torch.where(real, e, 0), weights, spec, **call, heads=heads.attend)
        return torch.where(real, h, 0)


def _needs_scores(spec: BlockSpec, dtype: torch.dtype) -> str | None:
    """Why the library's fused attention is not used, or None."""
    if spec.softcap is not None:
        return "soft-capped"
    return "float64" if dtype == torch.float64 else None


def _fused_heads(e: Tensor, spec: BlockSpec, options: CallOptions) -> Heads:
    """Heads of right-padded samples by the library's fused attention."""
    allowed, causal = None, spec.causal and spec.window is None  # then no token sees the pads behind it
    if not causal and (options.seq_lens is not None or spec.window is not None):
        valid = None
        if options.seq_lens is not None:
            valid = torch.arange(e.shape[1], device=e.device) < options.seq_lens.to(e.device)[:, None]
        mask = reference.attention_mask(e.shape[1], spec.causal, valid, e.device, spec.window)
        assert mask is not None
        allowed = _something(mask.allowed)

    def heads(loop: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused_attention(q, k, v, allowed, causal, spec.attn_scale)

    return heads


def _something(allowed: Tensor) -> Tensor:
    """The mask, but all keys for queries that may see none, whose softmax would be NaN."""
    return allowed | ~allowed.any(-1, keepdim=True)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """The library's fused attention, differentiable any number of times.

    Args:
        allowed: which query may see which key, bool, broadcast to [batch, n_heads, q_len, k_len].
        causal: instead of ``allowed``; as many queries as keys.
        scale: default 1 / sqrt(head_dim).
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _FusedAttention.apply(q, k, v, allowed, causal, scale)
    return _fused(q, k, v, allowed, causal, scale)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    if _would_hide_nan(q, k):
        return reference.attend(q, k, v, _mask(allowed, causal, q, k), scale)
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _would_hide_nan(q: Tensor, k: Tensor) -> bool:
    """On a CPU the library makes 0 of a row whose scores are all NaN. A traced graph cannot ask."""
    asks = q.device.type == "cpu" and type(q) is Tensor and not is_exporting()
    return asks and not bool(torch.isfinite(q).all() and torch.isfinite(k).all())


def _mask(allowed: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Mask | None:
    if causal:
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return None if allowed is None else Mask(allowed, q.new_full((), -torch.inf))


class _FusedAttention(torch.autograd.Function):
    """The library's fused kernels have no second derivative: it is that of scores in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        allowed: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        with torch.enable_grad():
            q_in, k_in, v_in = inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            o = _fused(q_in, k_in, v_in, allowed, causal, scale)
        ctx.save_for_backward(q, k, v, allowed)
        ctx.graph, ctx.causal, ctx.scale = (inputs, o), causal, scale
        return o.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            inputs, o = ctx.graph
            return *torch.autograd.grad(o, inputs, grad, retain_graph=True), None, None, None
        q, k, v, allowed = ctx.saved_tensors  # create_graph=True
        o = reference.attend(q, k, v, _mask(allowed, ctx.causal, q, k), ctx.scale)
        wanted = [x for x in (q, k, v) if x.requires_grad]
        grads = iter(torch.autograd.grad(o, wanted, grad, create_graph=True))
        return *(next(grads) if x.requires_grad else None for x in (q, k, v)), None, None, None


class _CachedHeads:
    """How the heads of new tokens attend.

    Args:
        real: which tokens are no pads, bool [batch, seq_len] on the CPU.
        position: of each token, likewise.
        n_loops: a sample that is done writes no more: with shared caches it would spoil its last loops.
    """

    def __init__(self, step: Step, real: Tensor, position: Tensor, n_loops: int | Tensor) -> None:
        self.cache, self.seen = step.cache, max(int(step.after.max()), 1)
        device = self.cache.device
        self.loops = None if isinstance(n_loops, int) else n_loops.cpu()
        self.rows = real.nonzero(as_tuple=True)
        self.at = position[self.rows].to(device)
        first, last = int(step.before.min()), int(step.after.max())
        self.together = first if bool(real.all()) and last - first == real.shape[1] else None
        distance = position[..., None] - torch.arange(self.seen)
        allowed = reference.in_reach(distance, True, step.cache.spec.window)
        self.allowed = None if bool(allowed.all()) else allowed[:, None].to(device)

    def attend(self, loop: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
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
        if _needs_scores(spec, q.dtype) is None:
            return _fused(q, keys, values, self.allowed, False, spec.attn_scale)
        mask = None if self.allowed is None else Mask(self.allowed, q.new_full((), -torch.inf))
        return reference.attend(q, keys, values, mask, spec.score_scale, spec.softcap)


class TorchAttention:
    """On an accelerator the library's fused attention, elsewhere scores in memory.

    On a CPU the fused attention makes 0 of a row of scores that are not numbers, and the ``cpu`` backend is
    the fast one there.
    """

    name = "torch"

    def why_not(self, problem: AttentionProblem | None) -> WhyNot | None:
        """Nothing is in its way."""
        return None

    def describe(self, problem: AttentionProblem) -> str:
        """In a phrase."""
        explicit = self._needs_scores(problem.device, problem.dtype, "softcap" in problem.options)
        return "plain PyTorch, with the scores in memory" if explicit else "PyTorch's fused attention"

    @staticmethod
    def _needs_scores(device: torch.device, dtype: torch.dtype, softcap: bool) -> bool:
        return softcap or dtype == torch.float64 or device.type == "cpu"

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        seq_lens: Tensor | None,
        k_seq_lens: Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """As :func:`shift_kernels.attention`, whose checks came before."""
        options: dict[str, Any] = dict(causal=causal, seq_lens=seq_lens, k_seq_lens=k_seq_lens, window=window)
        explicit = self._needs_scores(q.device, q.dtype, softcap is not None)
        if explicit or transforms_are_active((q, k, v)):
            return reference.attention(q, k, v, **options, softcap=softcap, scale=scale)
        whole = seq_lens is None and k_seq_lens is None and window is None and q.shape[2] == k.shape[2]

        def heads(q: Tensor, k: Tensor, v: Tensor, mask: Callable[[], Mask | None]) -> Tensor:
            found = None if whole else mask()
            allowed = None if found is None else _something(found.allowed)
            return fused_attention(q, k, v, allowed, causal and whole, scale)

        return reference.attention(q, k, v, **options, heads=heads)


TORCH, TORCH_ATTENTION = TorchBackend(), TorchAttention()
