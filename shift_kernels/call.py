"""One call: the problem that decides which backend can run it, its options, and ragged batches."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from shift_kernels.spec import BlockSpec
from shift_kernels.torch_internals import has_no_values


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
        cached: whether tokens are appended to a :class:`shift_kernels.LoopedCache`.
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
    cached: bool = False


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """What decides which backend can run :func:`shift_kernels.attention`.

    Args:
        batch, n_heads, n_kv_heads, seq_len, head_dim: of q [batch, n_heads, seq_len, head_dim] and k.
        dtype: of q, k and v.
        device: where they live.
        grad: whether a backward pass will follow.
    """

    batch: int
    n_heads: int
    n_kv_heads: int
    seq_len: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    grad: bool


@dataclasses.dataclass(frozen=True)
class CallOptions:
    """The keywords of :func:`shift_kernels.reference.looped_block`, which says what they mean."""

    n_loops: int | Tensor
    compute_dtype: torch.dtype
    seq_lens: Tensor | None = None
    return_all_loops: bool = False
    n_grad_loops: int | None = None
    halt_threshold: float | None = None

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


def without_pads(x: Tensor, seq_lens: Tensor | None) -> Tensor:
    """x [batch, seq_len, d_model] with zeros at pads, where it may hold anything."""
    if seq_lens is None:
        return x
    pad = torch.arange(x.shape[1], device=x.device) >= seq_lens.to(x.device)[:, None]
    return x.masked_fill(pad[..., None], 0)
