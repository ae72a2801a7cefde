"""One question to a backend: this block, this shape, this dtype, this device, with gradients or without."""

from __future__ import annotations

import dataclasses

import torch

from shift_kernels.spec import BlockSpec


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
    """

    spec: BlockSpec
    batch: int
    seq_len: int
    dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    grad: bool
    halting: bool = False
