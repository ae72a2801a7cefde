"""One optimiser step over all ranks: the loss at the read positions, its gradients, and AdamW."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from shift.config import TrainConfig
from shift.model import LoopedTransformer
from shift.run.evaluate import autocast, loops_of
from shift.run.optim import lr_factors
from shift.run.parallel import Replicated
from shift.run.ranks import Ranks
from shift.tasks.base import IGNORE, Batch

if TYPE_CHECKING:
    from shift.run.fsdp import Sharded


SummedLoss = Callable[[Batch, "int | torch.Tensor"], torch.Tensor]


class TrainStep:
    """The step of a run. Nothing in it waits for the device.

    Args:
        config: of the run.
        model: on one device.
        parallel: how the ranks share it.
        ranks: that share the global batch.
    """

    def __init__(
        self, config: TrainConfig, model: LoopedTransformer, parallel: Replicated | Sharded, ranks: Ranks
    ) -> None:
        self._config, self._model, self._parallel, self._ranks = config, model, parallel, ranks
        self._optimizer = parallel.optimizer
        self._forward = torch.compile(model) if config.compile else model
        self._lr_factors = lr_factors(model, config.optimiser, self._optimizer)

    def backward(
        self,
        batch: Batch,
        loops: int | torch.Tensor,
        micro_batch: int | None = None,
        n_grad_loops: int | None = None,
        *,
        every_loop: int | None = None,
        summed_loss: SummedLoss | None = None,
    ) -> torch.Tensor:
        """Leave the gradients of the global batch in the parameters; returns its loss, 0-d.

        Args:
            batch: of this rank, on the model's device.
            loops: T, or an int tensor [batch].
            micro_batch: sequences that go through the model at once; None: all.
            n_grad_loops: the last loops, through which the gradient passes; None: through all.
            every_loop: T, if the loss is the mean of those after every loop; these are returned, [T].
            summed_loss: of a micro-batch with its loops, instead of the model's own.
        """
        ranks = self._ranks
        if summed_loss is None:
            summed_loss = functools.partial(
                self._summed_loss, n_grad_loops=n_grad_loops, every_loop=every_loop
            )
        # Divided by the mean number of read positions of a rank, losses and gradients average over ranks to
        # those of the mean over all read positions, however uneven the ranks are, and micro-batches too.
        n_read = ranks.mean((batch.targets != IGNORE).sum(dtype=torch.float32))
        self._optimizer.zero_grad()
        n = len(batch.tokens)
        size = micro_batch or n
        losses = []
        for start in range(0, n, size):
            self._parallel.begin_micro_batch(last=start + size >= n)
            part = batch if size >= n else batch.rows(start, start + size)
            own = loops if isinstance(loops, int) else loops[start : start + size]
            loss = summed_loss(part, own) / n_read
            loss.mean().backward()
            losses.append(loss.detach())
        self._parallel.average_gradients()
        return ranks.mean(losses[0] if len(losses) == 1 else torch.stack(losses).sum(0))

    def try_out(self, batch: Batch, size: int, n_loops: int) -> None:
        """Forward and backward of the first ``size`` sequences; the next step forgets their gradients."""
        part = batch.rows(0, size)
        self._parallel.begin_micro_batch(last=True)
        self._summed_loss(part, loops_of(part, n_loops), self._config.n_grad_loops).backward()

    def _summed_loss(
        self,
        batch: Batch,
        loops: int | torch.Tensor,
        n_grad_loops: int | None,
        every_loop: int | None = None,
    ) -> torch.Tensor:
        """The loss of a micro-batch, summed over read positions; after each of ``every_loop`` loops, [T]."""
        c = self._config
        with autocast(batch.tokens.device, c.precision == "bf16"):
            loss = self._forward(
                batch.tokens,
                loops,
                context=batch.context,
                cu_seqlens=batch.cu_seqlens,
                n_grad_loops=n_grad_loops,
                targets=batch.targets,
                return_all_loops=every_loop is not None,
                loop_weights=() if every_loop else c.loop_loss,
                backend=c.backend,
            )
        # Samples that have loops of their own may all have fewer than T: then nothing changes after those.
        return loss if every_loop is None else torch.cat([loss, loss[-1:].expand(every_loop - len(loss))])

    def update(self, loss: torch.Tensor, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Change the weights, unless loss or gradients are not finite.

        Returns:
            The gradient norm, and whether the step was skipped, both 0-d.
        """
        for group, factor in zip(self._optimizer.param_groups, self._lr_factors, strict=True):
            group["lr"] = lr * factor
        grad_norm = self._optimizer.gradient_norm()
        skipped = ~(loss + grad_norm).isfinite()  # neither is below 0, so that nothing cancels
        self._optimizer.clip_and_step(grad_norm, self._config.optimiser.clip, skipped)
        return grad_norm, skipped
