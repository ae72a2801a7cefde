"""A recorded run, opened: its model and task, its weights over time, and the loss they went down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shift.build import build_model, build_schedule, build_task
from shift.config import TrainConfig, load_config
from shift.landscape.hessian import LossSurface
from shift.model import LoopedTransformer
from shift.run.record import read_run
from shift.run.snapshots import Snapshots, read_snapshots
from shift.tasks.base import Task


@dataclass(frozen=True)
class Recording:
    """``rows``: of ``metrics.jsonl``; ``model`` has the initial weights, ``snapshots`` those over time."""

    config: TrainConfig
    task: Task
    model: LoopedTransformer
    snapshots: Snapshots
    rows: list[dict[str, Any]]

    @property
    def n_parameters(self) -> int:
        """n, the length of a vector of weights."""
        return self.snapshots.weights.shape[1]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The ``train``, ``eval`` or ``look`` rows."""
        return [row for row in self.rows if row["kind"] == kind]

    def steps(self) -> dict[int, dict[str, Any]]:
        """The ``train`` row of each step, by the number of steps done before it."""
        return {row["step"] - 1: row for row in self.of_kind("train")}

    def moments_age(self, step: int) -> int | None:
        """The steps that Adam's second moments go back before a step; None: Muon's run, or a switch may have
        cleared them."""
        optimiser = self.config.optimiser
        clears = build_schedule(self.config).keep < 1 or optimiser.keep_moments == 0
        switched = len({row["n_loops"] for before, row in self.steps().items() if before <= step}) > 1
        return None if optimiser.kind != "adamw" or (clears and switched) else step

    def surface(self, n_loops: int, samples: int, dtype: torch.dtype) -> LossSurface:
        """The loss with ``n_loops`` on the first ``samples`` held-out sequences, always the same ones."""
        return LossSurface(self.model, self.task.batch(samples, 0, split="eval"), n_loops, dtype=dtype)


def open_recording(run_dir: Path) -> Recording:
    """Open a run directory.

    Raises:
        ShiftInputError: no run, or one without snapshots.
    """
    config = load_config(run_dir / "config.toml")
    task = build_task(config)
    model = build_model(config, task)
    snapshots = read_snapshots(run_dir, sum(p.numel() for p in model.parameters()))
    return Recording(config, task, model, snapshots, read_run(run_dir).rows)
