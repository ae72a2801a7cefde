"""A run's directory: opening it fresh or at a checkpoint, and writing to it. Only rank 0 writes.

config.toml      the resolved configuration
metrics.jsonl    reproducible facts, no clock      timing.jsonl   milliseconds of each step
snapshots.bin    weights, where they are recorded (shift.run.snapshots)
checkpoints/     see shift.run.checkpoint              result.json    written once, at the end
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import nn

from shift.config import TrainConfig, differing_key
from shift.run import checkpoint
from shift.run.files import make_directory, replace_atomically
from shift.run.metrics import RowFile
from shift.run.snapshots import SNAPSHOTS
from shift_kernels.errors import input_error

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


def short_names(tool: str, runs: Sequence[Path]) -> dict[str, Path]:
    """Run directories by the last two parts of their paths, as ``tool`` shows them.

    Raises:
        ShiftInputError: no runs, or two of one name.
    """
    names = ["/".join(path.resolve().parts[-2:]) for path in runs]
    if not runs or len(set(names)) < len(names):
        raise input_error(tool, "runs", names, "different run directories", "Name some.")
    return dict(zip(names, runs, strict=True))


class RunDirectory:
    """An open run directory.

    Args:
        path: the directory; created if need be.
        config: of the run; must be the checkpoint's, but for what decides no result.
        world_size: number of ranks; it shapes the global batch, so it must be the checkpoint's too.
        resume: read the newest valid checkpoint into :attr:`checkpoint` (None if there is none) and cut the
            files back to its lengths. Damaged newer ones are renamed, with a warning.
        writes: False on all ranks but 0.

    Raises:
        ShiftInputError: the directory holds a run and ``resume`` is False, or another config made the run.
    """

    def __init__(
        self, path: Path, config: TrainConfig, *, world_size: int, resume: bool, writes: bool
    ) -> None:
        self.path, self.config, self.world_size, self._writes = path, config, world_size, writes
        self._checkpoints = path / "checkpoints"
        self.checkpoint = self._find_checkpoint() if resume else None
        if not writes:
            return
        metrics = path / METRICS  # empty: a run that was refused, or ended, before it had done anything
        if not resume and metrics.exists() and metrics.stat().st_size > 0:
            raise input_error(
                "shift.Trainer", "run_dir", str(path), "a directory without a run in it",
                "Resume that run (resume=True, --resume auto), or choose another directory.",
            )  # fmt: skip
        lengths = {METRICS: 0, TIMING: 0}
        if config.landscape.every:
            lengths[SNAPSHOTS] = 0
        if self.checkpoint is not None:
            lengths |= self.checkpoint.state["lengths"]
        make_directory(path, "shift.Trainer", "run_dir")
        replace_atomically(path / "config.toml", tomli_w.dumps(config.to_dict()).encode())
        self._files = {name: RowFile(path / name, length) for name, length in lengths.items()}

    def write_rows(self, metrics: list[dict[str, Any]], timing: list[dict[str, Any]]) -> None:
        """Append rows to the two files."""
        if self._writes:
            self._files[METRICS].write(metrics)
            self._files[TIMING].write(timing)

    def write_snapshots(self, rows: Iterable[bytes]) -> None:
        """Append rows of :class:`shift.run.snapshots.SnapshotRecorder`."""
        for row in rows:
            if self._writes:
                self._files[SNAPSHOTS].append(row)

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Save a checkpoint whose ``state`` also remembers the config and the lengths of the row files."""
        if self._writes:
            lengths = {name: file.sync() for name, file in self._files.items()}
            run = {"config": self.config.to_dict(), "world_size": self.world_size, "lengths": lengths}
            checkpoint.save(self._checkpoints, step, model, optimizer, state | run, self.config.keep)

    def finish(self, result: dict[str, Any]) -> None:
        """Write ``result.json`` and close the row files."""
        if self._writes:
            replace_atomically(self.path / "result.json", json.dumps(result, indent=1).encode())
            for file in self._files.values():
                file.close()

    def metrics_sha256(self) -> str:
        """sha256 of ``metrics.jsonl`` as it stands."""
        return hashlib.sha256((self.path / METRICS).read_bytes()).hexdigest()

    def _find_checkpoint(self) -> checkpoint.Checkpoint | None:
        found, damaged = checkpoint.newest_valid(self._checkpoints)
        for path, reason in damaged if self._writes else ():
            aside = checkpoint.set_aside(path)
            warnings.warn(f"skipped a damaged checkpoint, now {aside}: {reason}", stacklevel=4)
        if found is None:
            return None
        if found.state["world_size"] != self.world_size:
            raise input_error(
                "shift.Trainer", "world_size", self.world_size,
                f"{found.state['world_size']}, as in {found.path}",
                "The global batch depends on it: start as many processes as before.",
            )  # fmt: skip
        difference = differing_key(self.config, found.state["config"])
        if difference is not None:
            key, ours, theirs = difference
            raise input_error(
                "shift.Trainer", key, ours, f"{theirs!r}, as in {found.path}",
                "Resume with the run's own config.toml, or choose another run directory.",
            )  # fmt: skip
        return found
