"""One call: the problem that decides which backend can run it, its options, and ragged batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from shift_kernels.spec import ONE_OVER_T, BlockSpec
from shift_kernels.torch_internals import has_no_values

if TYPE_CHECKING:
    from shift_kernels.cache import LoopedCache


class CallKeywords(TypedDict, total=False):
    """The keywords of :func:`shift_kernels.looped_block`, which says what they mean."""

    seq_lens: Tensor | None
    left_pad: Tensor | None
    cu_seqlens: Tensor | None
    h0: Tensor | None
    position_offset: Tensor | None
    residual_scale: float | Tensor | None
    return_all_loops: bool
    n_grad_loops: int | None
    halt_threshold: float | None
    cache: LoopedCache | None
    backend: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """What decides which backend can run a looped block.

    Args:
        spec: the block.
        batch: samples.
        seq_len: padded length.
        dtype: dtype of the residual stream (that of e).
        compute_dtype: dtype of matmul operands.
        device: where e lives.
        grad: whether a backward pass will follow.
        halting: whether ``halt_threshold`` is given.
        n_loops: T; None where it is data on a device.
        cache_dtype: of the :class:`shift_kernels.LoopedCache` that tokens are appended to; None: to none.
        options: names of the keywords given of those in :data:`OWN_OPTIONS`.
    """

    spec: BlockSpec
    batch: int
    seq_len: int
    dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    grad: bool
    halting: bool = False
    n_loops: int | None = None
    cache_dtype: torch.dtype | None = None
    options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """What decides which backend can run :func:`shift_kernels.attention`.

    Args:
        batch, n_heads, n_kv_heads, seq_len, head_dim: of q [batch, n_heads, seq_len, head_dim] and k.
        dtype: of q, k and v.
        device: where they live.
        grad: whether a backward pass will follow.
        k_len: length of k and v; None: as ``seq_len``.
        options: names of the keywords given of those in :data:`OWN_ATTENTION_OPTIONS`.
        traced: whether a tracer, transform or tensor subclass has to see what is computed.
    """

    batch: int
    n_heads: int
    n_kv_heads: int
    seq_len: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    grad: bool
    k_len: int | None = None
    options: tuple[str, ...] = ()
    traced: bool = False


OWN_ATTENTION_OPTIONS = ("k_seq_lens", "window", "softcap", "scale")
"""Keywords of :func:`shift_kernels.attention` that a backend must know to serve a call that gives them."""


OWN_OPTIONS = ("h0", "residual_scale")
"""Of :class:`CallOptions`, those that a backend must know to serve a call that gives them."""


@dataclasses.dataclass(frozen=True)
class CallOptions:
    """A call's options, checked.

    Args:
        n_loops: T, or an int tensor [batch] with one T per sample.
        compute_dtype: dtype of matmul operands; the residual stream keeps e's.
        seq_lens: [batch]; positions at or beyond a sample's length may hold anything and return 0.
        return_all_loops: return all h_t, [T, batch, seq_len, d_model]; a finished sample repeats its last.
        n_grad_loops: only each sample's last k loops carry gradient.
        halt_threshold: a sample stops after loop t once rms(h_t - h_{t-1}) < threshold * rms(h_{t-1}).
        h0: the initial state, as e; None: e with injection "none", otherwise 0.
        residual_scale: instead of the block's: a number, or float64 [batch] with one for each sample.
        position_offset: [batch], added to rotary positions. Without a cache it changes nothing, since rotary
            attention sees differences of positions alone.
    """

    n_loops: int | Tensor
    compute_dtype: torch.dtype
    seq_lens: Tensor | None = None
    return_all_loops: bool = False
    n_grad_loops: int | None = None
    halt_threshold: float | None = None
    h0: Tensor | None = None
    residual_scale: float | Tensor | None = None
    position_offset: Tensor | None = None

    def keywords(self) -> dict[str, Any]:
        """By name; without ``vars``, which torch.compile of torch 2.11 can't trace here."""
        return {name: getattr(self, name) for name in CALL_OPTIONS}

    def names(self) -> tuple[str, ...]:
        """Which of :data:`OWN_OPTIONS` are given."""
        return tuple(name for name in OWN_OPTIONS if getattr(self, name) is not None)

    def branch_scale(self, spec: BlockSpec) -> float | Tensor:
        """Factor on every branch: a number, or float64 [batch] where samples have their own."""
        scale = spec.residual_scale if self.residual_scale is None else self.residual_scale
        if not isinstance(scale, str):
            return scale
        assert scale == ONE_OVER_T
        if isinstance(self.n_loops, Tensor):
            return 1 / self.n_loops.double().clamp(min=1)
        return 1 / max(self.n_loops, 1)

    def sample_loops(self, device: torch.device) -> Tensor | None:
        """Each sample's T, int64 [batch], or None where all have the same."""
        if isinstance(self.n_loops, Tensor):
            return self.n_loops.to(device, torch.int64).clamp(min=0).contiguous()
        return None

    def max_loops(self) -> int:
        """The largest T; the host waits for it where samples' own are on a device."""
        return max(int(self.n_loops.max()), 0) if isinstance(self.n_loops, Tensor) else self.n_loops

    def known_loops(self) -> int | None:
        """The largest T where the host knows it without waiting; None on a device or while compiling."""
        if torch.compiler.is_compiling():
            return None  # a T that decides a plan would be compiled for
        if isinstance(self.n_loops, Tensor) and (self.n_loops.is_cuda or has_no_values(self.n_loops)):
            return None
        return self.max_loops()


CALL_OPTIONS = tuple(field.name for field in dataclasses.fields(CallOptions))
"""Names of all options of a call."""


def differentiable(e: Tensor, weights: Mapping[str, Tensor], options: CallOptions) -> tuple[Tensor, ...]:
    """What gradients flow to: e, the weights in order, and h0 where it is given."""
    inputs = (e, *weights.values())
    return inputs if options.h0 is None else (*inputs, options.h0)


def named_again(
    inputs: Sequence[Tensor], spec: BlockSpec, options: CallOptions
) -> tuple[Tensor, dict[str, Tensor], CallOptions]:
    """e, weights and options of what :func:`differentiable` returned."""
    names = spec.weight_shapes()
    e, *rest = inputs
    if len(rest) > len(names):
        options = dataclasses.replace(options, h0=rest.pop())
    return e, dict(zip(names, rest, strict=True)), options


def without_pads(x: Tensor, seq_lens: Tensor | None) -> Tensor:
    """x [batch, seq_len, d_model] with zeros at pads, where it may hold anything."""
    if seq_lens is None:
        return x
    pad = torch.arange(x.shape[1], device=x.device) >= seq_lens.to(x.device)[:, None]
    return x.masked_fill(pad[..., None], 0)
