"""How the ranks share a model: whole on each, or in shards that are gathered once a step.

Both leave the mean gradient of the global batch where the optimiser reads it, and go by the same step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import nn

from shift.config import TrainConfig
from shift.run import checkpoint
from shift.run.average import WeightAverage
from shift.run.flat import FlatAdamW
from shift.run.muon import FlatMuon
from shift.run.optim import RunOptimizer, build_optimizer
from shift.run.ranks import Ranks


class Parallel(Protocol):
    """How the ranks share a model; they all call its methods."""

    @property
    def optimizer(self) -> RunOptimizer:
        """Of what this rank has of the model."""

    def begin_micro_batch(self, last: bool) -> None:
        """Before the forward of a micro-batch; ``last``: of the step."""

    def average_gradients(self) -> None:
        """After the last backward of a step."""

    def gather(self) -> None:
        """Give this rank all weights, for whoever reads them outside a forward."""

    def release(self) -> None:
        """Take back what :meth:`gather` or a forward without a backward gave: weights may change next."""

    def save(
        self,
        directory: Path,
        step: int,
        model: nn.Module,
        average: WeightAverage | None,
        state: dict[str, Any],
        keep: int,
    ) -> None:
        """See :func:`shift.run.checkpoint.save`."""

    def digests(self, model: nn.Module) -> dict[str, str]:
        """sha256 of weights and optimiser, on rank 0."""


class Replicated:
    """All weights on every rank; gradients are averaged as one flat tensor after the backward.

    Args:
        model: on its device.
        config: of the run.
        ranks: that train it.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, ranks: Ranks) -> None:
        self._ranks = ranks
        self.optimizer: FlatAdamW | FlatMuon = build_optimizer(model, config.optimiser)

    def begin_micro_batch(self, last: bool) -> None:
        """Nothing is to be done: gradients add up where they are."""

    def average_gradients(self) -> None:
        """In one go: the block's gradients, most of all, are there at its end at once."""
        self._ranks.mean(self.optimizer.gradients)

    def gather(self) -> None:
        """Nothing is to be done: all weights are here."""

    def release(self) -> None:
        """Nothing is to be done."""

    def save(
        self,
        directory: Path,
        step: int,
        model: nn.Module,
        average: WeightAverage | None,
        state: dict[str, Any],
        keep: int,
    ) -> None:
        """See :class:`Parallel`."""
        self._ranks.from_first(
            lambda: checkpoint.save(directory, step, model, self.optimizer, state, keep, average)
        )

    def digests(self, model: nn.Module) -> dict[str, str]:
        """See :class:`Parallel`."""
        if self._ranks.rank > 0:
            return {}
        weights, state = model.state_dict(), self.optimizer.state_dict()
        return {"weights_sha256": checkpoint.digest(weights), "optimizer_sha256": checkpoint.digest(state)}


def share(model: nn.Module, config: TrainConfig, ranks: Ranks) -> Parallel:
    """The model as ``config.parallel`` says, with its optimiser."""
    if config.parallel == "ddp":
        return Replicated(model, config, ranks)
    from shift.run.fsdp import Sharded

    return Sharded(model, config, ranks)
