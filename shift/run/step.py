"""One optimiser step over all ranks: the loss at the read positions, its gradients, and AdamW."""

from __future__ import annotations

import torch

from shift.config import TrainConfig
from shift.model import LoopedTransformer
from shift.run import draws
from shift.run.evaluate import autocast, loops_of
from shift.run.optim import lr_factors
from shift.run.parallel import Parallel
from shift.run.ranks import Ranks
from shift.tasks.base import IGNORE, Batch


class TrainStep:
    """The step of a run. Nothing in it waits for the device.

    Args:
        config: of the run.
        model: on one device.
        parallel: how the ranks share it.
        ranks: that share the global batch.
    """

    def __init__(
        self, config: TrainConfig, model: LoopedTransformer, parallel: Parallel, ranks: Ranks
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
        step: int = 0,
        first_row: int = 0,
    ) -> torch.Tensor:
        """Leave the gradients of the global batch in the parameters; returns its loss, 0-d.

        Args:
            batch: of this rank, on the model's device.
            loops: T, or an int tensor [batch].
            micro_batch: sequences that go through the model at once; None: all.
            n_grad_loops: the last loops, through which the gradient passes; None: through all.
            step, first_row: steps done before, and the batch's place in the global one; a random first state
                is drawn by these.
        """
        ranks = self._ranks
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
            h0 = self._first_state(part, step, first_row + start)
            loss = self._summed_loss(part, own, n_grad_loops, h0) / n_read
            loss.backward()
            losses.append(loss.detach())
        self._parallel.average_gradients()
        return ranks.mean(losses[0] if len(losses) == 1 else torch.stack(losses).sum())

    def try_out(self, batch: Batch, size: int, n_loops: int) -> None:
        """Forward and backward of the first ``size`` sequences; the next step forgets their gradients."""
        part = batch.rows(0, size)
        self._parallel.begin_micro_batch(last=True)
        h0 = self._first_state(part, 0, 0)
        self._summed_loss(part, loops_of(part, n_loops), self._config.n_grad_loops, h0).backward()

    def _first_state(self, batch: Batch, step: int, first_row: int) -> torch.Tensor | None:
        """The first state of a micro-batch where it is drawn; None: the model's own."""
        if self._model.layout.initial_state != "random":
            return None
        n, seq_len = batch.tokens.shape
        rows, shape = range(first_row, first_row + n), (seq_len, self._model.block.spec.d_model)
        return draws.normal(self._config.seed, step, rows, shape, batch.tokens.device)

    def _summed_loss(
        self,
        batch: Batch,
        loops: int | torch.Tensor,
        n_grad_loops: int | None,
        h0: torch.Tensor | None,
    ) -> torch.Tensor:
        """The sum of the loss over the read positions of a micro-batch."""
        c = self._config
        with autocast(batch.tokens.device, c.precision == "bf16"):
            return self._forward(
                batch.tokens,
                loops,
                context=batch.context,
                cu_seqlens=batch.cu_seqlens,
                h0=h0,
                n_grad_loops=n_grad_loops,
                targets=batch.targets,
                loop_weights=c.loop_loss,
                backend=c.backend,
            )

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
