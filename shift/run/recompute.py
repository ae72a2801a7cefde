"""Activation checkpointing of the core: its loops one by one, so that a backward holds those of one loop.

Between forward and backward a loop keeps its input, [batch, seq_len, d_model]; its activations are computed
again. Of use where a backend keeps them, as ``torch`` does: ``explain`` says what a backend keeps.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shift_kernels import LoopedBlock, looped_block
from shift_kernels.spec import ONE_OVER_T


def loop_by_loop(block: LoopedBlock) -> None:
    """Make a block apply its loops one by one from now on.

    The block is still called once, so that hooks, FSDP's too, see one call whatever the loops.
    """
    block.forward = functools.partial(_loops, block)  # type: ignore[method-assign]


def _loops(
    block: LoopedBlock,
    e: Tensor,
    n_loops: int | Tensor,
    *,
    h0: Tensor | None = None,
    n_grad_loops: int | None = None,
    return_all_loops: bool = False,
    **options: Any,
) -> Tensor:
    """What :meth:`LoopedBlock.forward` gives, by calls of one loop each."""
    weights, spec = block.weights(), block.spec
    alone = dataclasses.replace(spec, injection="none") if spec.injection == "add" else spec
    recomputed = functools.partial(checkpoint, looped_block, use_reentrant=False)
    own = torch.as_tensor(n_loops, device=e.device)
    most = int(own.max())
    if spec.residual_scale == ONE_OVER_T:
        options["residual_scale"] = 1 / n_loops if isinstance(n_loops, int) else 1 / own.double()
    h, states = h0, []
    for t in range(most):
        if alone.injection != "none":
            after = recomputed(e, weights, spec, 1, h0=h, **options)
        else:  # which every backend serves
            entered = e if h is None else h + e if spec.injection == "add" else h
            after = recomputed(entered, weights, alone, 1, **options)
        assert isinstance(after, Tensor), "nothing halts here"
        running = (t < own).view(-1, *[1] * (e.ndim - 1))
        before = after if h is None else h
        h = after if isinstance(n_loops, int) else torch.where(running, after, before)
        if n_grad_loops is not None:
            # A sample's last k loops carry gradient: before them its state counts as given.
            carries = (t + 1 > own - n_grad_loops).view(-1, *[1] * (e.ndim - 1))
            h = torch.where(carries, h, h.detach())
        states.append(h)
    return torch.stack(states) if return_all_loops else states[-1]
