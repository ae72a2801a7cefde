"""Who is told how a run goes, beside its own files: the console, TensorBoard, Weights & Biases.

Both packages are imported only where they are asked for (extra ``log``).
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from shift.config import TrainConfig
from shift.reading import is_number
from shift.run.files import replace_atomically
from shift.run.speed import Pace

Log = Literal["tensorboard", "wandb"]


class Watcher(Protocol):
    """Is told on rank 0."""

    def train(self, row: Mapping[str, Any], pace: Pace) -> None:
        """The state after a step: its row of metrics."""

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """The row of an evaluation."""

    def close(self) -> None:
        """The run has ended."""


class Watchers:
    """Several, in turn."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = watchers

    def train(self, row: Mapping[str, Any], pace: Pace) -> None:
        """See :class:`Watcher`."""
        for watcher in self._watchers:
            watcher.train(row, pace)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """See :class:`Watcher`."""
        for watcher in self._watchers:
            watcher.evaluation(row)

    def close(self) -> None:
        """See :class:`Watcher`."""
        for watcher in self._watchers:
            watcher.close()


def open_log(log: Log, config: TrainConfig, run_dir: Path) -> Watcher:
    """The watcher of that name.

    Raises:
        ModuleNotFoundError: its package is missing.
    """
    return TensorBoard(run_dir) if log == "tensorboard" else WeightsAndBiases(config, run_dir)


class TensorBoard:
    """Event files in ``<run_dir>/tensorboard``; what a resumed run does again replaces what was there."""

    def __init__(self, run_dir: Path) -> None:
        import tensorboard  # noqa: F401 (torch's own import hides which package is missing)
        from torch.utils.tensorboard import SummaryWriter

        self._make, self._folder = SummaryWriter, run_dir / "tensorboard"
        self._writer: Any = None

    def train(self, row: Mapping[str, Any], pace: Pace) -> None:
        """See :class:`Watcher`."""
        self._write(scalars("train", row) | pace_scalars(pace), row["step"])

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """See :class:`Watcher`."""
        self._write(scalars("eval", row), row["step"])

    def close(self) -> None:
        """See :class:`Watcher`."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is None:  # not before the first row: a start may be refused
            self._writer = self._make(str(self._folder), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


class WeightsAndBiases:
    """One run there a run directory, whose id is kept in it: a resumed run goes on with it."""

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        import wandb

        self._wandb, self._config, self._run_dir = wandb, config, run_dir
        self._run: Any = None

    def train(self, row: Mapping[str, Any], pace: Pace) -> None:
        """See :class:`Watcher`."""
        self._write(scalars("train", row) | pace_scalars(pace), row["step"])

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """See :class:`Watcher`."""
        self._write(scalars("eval", row), row["step"])

    def close(self) -> None:
        """See :class:`Watcher`."""
        if self._run is not None:
            self._run.finish()

    def _write(self, values: Mapping[str, float], step: int) -> None:
        if self._run is None:
            path = self._run_dir / "wandb-id.txt"
            if not path.is_file():
                replace_atomically(path, uuid.uuid4().hex.encode())
            self._run = self._wandb.init(
                project="shift",
                name=self._run_dir.name,
                dir=str(self._run_dir),
                id=path.read_text(encoding="utf-8"),
                resume="allow",
                config=self._config.to_dict(),
            )
        # A step of its own, as theirs may not fall, and that of a resumed run does.
        self._run.log({**values, "step": step})


def scalars(kind: str, row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row under names that group them; ``groups`` become ``eval/accuracy/<group>``."""
    plain = {name: value for name, value in row.items() if is_number(value) and name != "step"}
    found = {f"{kind}/{name}": float(value) for name, value in plain.items()}
    return found | {f"{kind}/accuracy/{name}": value for name, value in row.get("groups", {}).items()}


def pace_scalars(pace: Pace) -> dict[str, float]:
    """The numbers of a pace; what is unknown is left out."""
    return {f"pace/{name}": float(value) for name, value in vars(pace).items() if value is not None}
