"""The loss of a step in which the dearest samples run more loops than the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shift.config import TrainConfig
from shift.model import LoopedTransformer
from shift.run.evaluate import autocast
from shift.schedules.base import BySample
from shift.tasks.base import IGNORE, Batch
from shift_kernels.errors import input_error
from shift_kernels.spec import ONE_OVER_T


class DearestDeeper:
    """Sums the loss of micro-batches, and keeps the loops that their samples ran.

    All samples run ``plan.low`` loops. What they would lose there, read once without a gradient, chooses
    those that go on from where they are: no loop is computed twice. The choice waits for the device.

    Args:
        plan: how many go on.
        model: on its device; its submodules are called, so it may be neither sharded nor compiled.
        config: of the run.
        seed: of this step's draws.
    """

    def __init__(
        self, plan: BySample, model: LoopedTransformer, config: TrainConfig, seed: Sequence[int]
    ) -> None:
        self._plan, self._model, self._config = plan, model, config
        self._draw = np.random.default_rng(list(seed))
        self._used: list[Tensor] = []
        for name, value, allowed in (
            ("parallel", config.parallel, "ddp"),
            ("compile", config.compile, False),
            ("loop_loss", config.loop_loss, ()),
            ("n_grad_loops", config.n_grad_loops, None),
        ):
            if value != allowed:
                self._refuse(name, value, f"{allowed!r} where samples differ in their loops")
        if config.model.residual_scale == ONE_OVER_T:
            self._refuse("model.residual_scale", ONE_OVER_T, "a number where samples differ in their loops")

    def _refuse(self, name: str, value: object, allowed: str) -> None:
        raise input_error("TrainConfig", name, value, allowed, "Choose another schedule than by_sample.")

    @property
    def used(self) -> Tensor:
        """Loops of every sample so far, int64 on the CPU."""
        return torch.cat(self._used)

    def summed_loss(self, batch: Batch, loops: int | Tensor) -> Tensor:
        """The loss summed over the read positions.

        Args:
            batch: a micro-batch on the model's device; a row is a sequence.
            loops: T, or each sample's own, int64 [batch] on the CPU.
        """
        if batch.cu_seqlens is not None:
            self._refuse("task", self._config.task.name, "one that packs no sequences")
        model, backend, n = self._model, self._config.backend, len(batch.tokens)
        own = torch.full((n,), loops) if isinstance(loops, int) else loops.cpu()
        low = own.clamp(max=self._plan.low)
        with autocast(batch.tokens.device, self._config.precision == "bf16"):
            e = model.embed(batch.tokens, batch.context)
            e = e if model.prelude is None else model.prelude(e, 1, backend=backend)
            per_sample = not isinstance(loops, int)
            h = model.block(e, low if per_sample else self._plan.low, h0=model.initial(e), backend=backend)
            deep = self._deep(self._costs(h, batch))
            at, stay = (torch.nonzero(chosen)[:, 0] for chosen in (deep, ~deep))
            parts = [(stay, h[stay.to(h.device)])]
            if len(at):
                there, more = at.to(h.device), (own - low)[at] if per_sample else loops - self._plan.low
                parts += [(at, model.block(e[there], more, h0=h[there], backend=backend))]
            losses = [
                model.summed_loss(self._left(after), batch.targets[rows.to(h.device)])
                for rows, after in parts
                if len(rows)
            ]
        self._used.append(torch.where(deep, own, low))
        return torch.stack(losses).sum()

    def _left(self, h: Tensor) -> Tensor:
        coda = self._model.coda
        return h if coda is None else coda(h, 1, backend=self._config.backend)

    @torch.no_grad()
    def _costs(self, h: Tensor, batch: Batch) -> Tensor:
        """The mean loss of each sample, [batch] on the CPU."""
        logits = self._model.read(self._left(h)).float()
        loss = F.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="none"
        )
        read = (batch.targets != IGNORE).sum(1).clamp(min=1)
        return (loss.view_as(batch.targets).sum(1) / read).cpu()

    def _deep(self, costs: Tensor) -> Tensor:
        """Which samples go on, bool [batch]."""
        n = len(costs)
        n_deep = round(self._plan.share * n)
        drawn = self._draw.choice(n, size=round(self._plan.drawn * n_deep), replace=False)
        costs = costs.index_fill(0, torch.from_numpy(drawn), torch.inf)
        deep = torch.zeros(n, dtype=torch.bool)
        deep[costs.topk(n_deep).indices] = True
        return deep
