"""What a step costs, entered into a run's ledger."""

from __future__ import annotations

import math

import torch

from shift.flops import train_step_flops
from shift.model import LoopedTransformer
from shift.run.global_batch import GlobalBatch
from shift.run.progress import Progress
from shift.run.ranks import Ranks
from shift.tasks.base import Batch


def enter_step(
    progress: Progress,
    model: LoopedTransformer,
    batch: Batch,
    loops: int | torch.Tensor,
    n_grad_loops: int | None,
    batches: GlobalBatch,
    ranks: Ranks,
    all_loops: bool,
) -> int:
    """Enter a step; returns the tokens of all ranks. Loops of samples' own are averaged over all of them.

    Args:
        progress: holds the ledger.
        model: that was trained.
        batch, loops: of this rank.
        n_grad_loops: the last loops, which carried gradient; None: all did.
        batches: says how many rows all ranks have.
        ranks: that share them.
        all_loops: whether a loss was read after every loop.
    """
    most = n_grad_loops or math.inf
    mean_loops: float
    grad_loops: float
    if isinstance(loops, int):
        mean_loops, grad_loops = loops, min(loops, most)
    else:  # on the CPU, where the processes of torchrun talk by gloo: nothing waits for the device
        own = loops.double()
        sums = ranks.sum(torch.stack([own.sum(), own.clamp(max=most).sum()]))
        mean_loops, grad_loops = (sums / batches.size).tolist()
    seq_len = batch.tokens.shape[1]
    flops = train_step_flops(model, batches.size, seq_len, mean_loops, grad_loops, all_loops=all_loops)
    progress.enter(mean_loops, flops)
    return batches.size * seq_len
