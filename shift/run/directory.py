"""A run's directory: opening it fresh or at a checkpoint, and writing to it. Only rank 0 writes.

Whatever else lies there is left, or renamed (``before-*``, ``damaged-*``, ``other-*``), never deleted.

config.toml      the resolved configuration
metrics.jsonl    reproducible facts, no clock      timing.jsonl   milliseconds of each step
snapshots.bin    weights, where they are recorded (shift.run.snapshots)
checkpoints/     see shift.run.checkpoint              result.json    written once, at the end
.lock            empty; locked by the process that trains here
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from shift.build import with_absolute_paths
from shift.config import RESULT_FREE, TrainConfig, differing_key
from shift.reading import is_count
from shift.run import checkpoint
from shift.run.checkpoint import Checkpoint, damage
from shift.run.files import (
    json_bytes,
    make_directory,
    missing_folders,
    remove_empty,
    replace_atomically,
    set_aside,
)
from shift.run.lock import take_lock
from shift.run.optim import learning_rate
from shift.run.progress import Progress
from shift.run.row_file import RowFile
from shift.run.snapshots import SNAPSHOTS
from shift.tasks import find_task
from shift_kernels import ShiftInputError
from shift_kernels.errors import input_error

CONFIG, METRICS, TIMING, RESULT = "config.toml", "metrics.jsonl", "timing.jsonl", "result.json"
CHECKPOINTS, LOCK = "checkpoints", ".lock"

DIGESTED = {METRICS, SNAPSHOTS}
"""Row files whose content belongs to the checkpoint; clocks do not."""
ROWS = {*DIGESTED, TIMING}


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
    """An open run directory, which no other process can open until this one closes it or ends.

    Args:
        path: the directory; created if need be.
        config: of the run.
        world_size: ranks that the run began with; where it is resumed its checkpoint says so.
        extend: let a run that is resumed have more steps than it was begun with.

    Raises:
        ShiftInputError: the directory, or that of its checkpoints, can't be written to, or another process
            trains in it.
    """

    def __init__(self, path: Path, config: TrainConfig, world_size: int, extend: bool = False) -> None:
        self.path, self.config, self.world_size, self._extend = path, config, world_size, extend
        self._checkpoints = path / CHECKPOINTS
        self._made = missing_folders(path)
        make_directory(path, "shift.Trainer", "run_dir")
        if os.path.lexists(self._checkpoints):  # a file, say: known now, and not when all steps are done
            make_directory(self._checkpoints, "shift.Trainer", "run_dir")
        self._lock = take_lock(path / LOCK)  # before all else
        if self._lock is None:
            raise input_error(
                "shift.Trainer", "run_dir", str(path), "a run that no other process is training",
                "Wait for that process or stop it, or choose another run directory.",
            )  # fmt: skip
        self._files = {METRICS: RowFile(path / METRICS)}

    def start(self) -> None:
        """Begin a run at step 0.

        Raises:
            ShiftInputError: a run is there. (Rows without a length are of one that was refused, or ended,
                before it had done anything.)
        """
        saved = [
            path
            for _, path in checkpoint.checkpoints(self._checkpoints)
            if (path / checkpoint.MANIFEST).exists()
        ]
        if self._files[METRICS].length > 0 or saved:
            self.close()
            raise input_error(
                "shift.Trainer", "run_dir", str(self.path), "a directory without a run in it",
                "Resume that run (resume=True, --resume auto), or choose another directory.",
            )  # fmt: skip
        self._open_fresh()

    def resume(self, restore: Callable[[Checkpoint], None]) -> Checkpoint | None:
        """Go on from the newest checkpoint that can be restored, with the files cut back to its lengths.

        Damaged newer ones are renamed. A run that was ended before its first checkpoint starts at step 0, and
        rows that are there are renamed, too. Each renaming is a warning.

        Args:
            restore: loads a checkpoint, or raises :class:`DamagedCheckpoint`.

        Returns:
            The checkpoint; None: there is none.

        Raises:
            ShiftInputError: another config made the run, its rows were changed since, or no
                checkpoint that is there can be used.
        """

        def accept(found: Checkpoint) -> None:
            self._check(found)
            restore(found)

        try:
            found, damaged = checkpoint.newest_valid(self._checkpoints, accept)
            if found is None:
                self._refuse_to_start_over(reason for _, reason in damaged)
            for path, reason in damaged:
                aside = set_aside(path, "damaged")
                warnings.warn(f"skipped a damaged checkpoint, now {aside}: {reason}", stacklevel=4)
            if found is None:
                self._open_fresh()
            else:
                self.world_size = found.state["world_size"]
                if found.state["config"]["steps"] < self.config.steps and _holds(self.path / RESULT):
                    set_aside(self.path / RESULT, "before")  # of the shorter run
                self._open_at(found.state["lengths"], found.state.get("sha256", {}))
                checkpoint.remove_leftovers(self._checkpoints)
                checkpoint.prune(self._checkpoints, found.state["step"], self.config.keep)
        except BaseException:
            self.close()
            raise
        return found

    def _refuse_to_start_over(self, damaged: Iterable[str]) -> None:
        """Stop where a run had checkpoints, or was finished, and none of them can be used."""
        aside = map(str, sorted(self._checkpoints.glob("damaged-step-*")))
        results = [str(self.path / RESULT)] if _holds(self.path / RESULT) else []
        remains = [*damaged, *aside, *results]
        if remains:
            raise input_error(
                "shift.Trainer", "run_dir", str(self.path),
                f"a run with a checkpoint that can be used (found: {'; '.join(remains)})",
                "Restore a checkpoint from a copy, or start anew in another directory.",
            )  # fmt: skip

    def write_rows(self, metrics: list[dict[str, Any]], timing: list[dict[str, Any]]) -> None:
        """Append rows to the two files."""
        self._files[METRICS].write(metrics)
        self._files[TIMING].write(timing)

    def write_snapshots(self, rows: Iterable[bytes]) -> None:
        """Append rows of :class:`shift.run.snapshots.SnapshotRecorder`."""
        for row in rows:
            self._files[SNAPSHOTS].append(row)

    def remembered(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of a checkpoint: it also remembers the config and what the row files hold.

        Raises:
            OSError: the disk refused, or the run directory is no longer where it was.
        """
        return state | {
            "config": self.config.to_dict(),
            "world_size": self.world_size,
            "lengths": {name: file.sync() for name, file in self._files.items()},
            "sha256": {name: self._files[name].sha256() for name in DIGESTED if name in self._files},
        }

    def finish(self, result: dict[str, Any]) -> None:
        """Write ``result.json`` and close the row files."""
        replace_atomically(self.path / RESULT, json_bytes(result))
        self.close()

    def close(self) -> None:
        """Close the row files; another process may then open the directory."""
        for file in self._files.values():
            file.close()
        self._lock = None

    def abandon(self) -> None:
        """Close a run that was refused before it did anything; a directory that was made for it goes."""
        self.close()
        if not self._made:
            return
        for name in (METRICS, TIMING, SNAPSHOTS, CONFIG, LOCK):
            (self.path / name).unlink(missing_ok=True)
        remove_empty(self._made)

    def metrics_sha256(self) -> str:
        """sha256 of ``metrics.jsonl`` as it stands."""
        return self._files[METRICS].sha256()

    def _check(self, found: Checkpoint) -> None:
        """Refuse a checkpoint that is not one of this run."""
        with damage(found.path / checkpoint.STATE):
            state = found.state
            missing = Progress().state_dict().keys() - state["progress"].keys()
            if missing or state["step"] != state["progress"]["step"]:
                raise ValueError(f"progress without {missing}" if missing else "two steps")
            lengths, digests = state["lengths"], state.get("sha256", {})
            if not {METRICS, TIMING} <= lengths.keys() <= ROWS or not all(map(is_count, lengths.values())):
                raise ValueError(f"lengths that are not of {', '.join(sorted(ROWS))}")
            if not digests.keys() <= lengths.keys():
                raise ValueError("digests of other files")
            if not is_count(state["world_size"]) or state["world_size"] == 0:
                raise ValueError("a world size that is none")
            theirs = TrainConfig.from_dict(state["config"])
        if self._extend and self.config.steps > theirs.steps:
            theirs = self._extended(theirs, found)
        theirs = with_absolute_paths(theirs)
        # Where data lies is free where the run knows which data it was.
        moved = find_task(theirs.task.name).paths if state.get("data") else ()
        free = (*RESULT_FREE, *(f"task.options.{name}" for name in moved))
        difference = differing_key(self.config, theirs.to_dict(), free)
        if difference is not None:
            key, ours, saved = difference
            raise input_error(
                "shift.Trainer", key, ours, f"{saved!r}, as in {found.path}",
                "Resume with the run's own config.toml, or choose another run directory.",
            )  # fmt: skip

    def _extended(self, theirs: TrainConfig, found: Checkpoint) -> TrainConfig:
        """The config of a run to which steps were added, if no step that is done would have been another."""
        last, steps = found.state["step"] - 1, (theirs.steps, self.config.steps)
        before, now = (learning_rate(theirs.optimiser, last, n) for n in steps)
        if before != now:
            raise input_error(
                "shift.Trainer", "steps", self.config.steps,
                f"{theirs.steps}, as in {found.path}: its learning rate has begun to fall towards that step",
                "Extend runs whose rate is constant, or 'wsd' from a checkpoint before its decay.",
            )  # fmt: skip
        return dataclasses.replace(theirs, steps=self.config.steps)

    def _open_fresh(self) -> None:
        """Open empty row files; those of an earlier run that left no checkpoint are set aside."""
        old = [self.path / name for name in (METRICS, TIMING, SNAPSHOTS, RESULT) if _holds(self.path / name)]
        if (self.path / CONFIG).exists() and (old or (self.path / CONFIG).read_bytes() != self._config()):
            old.append(self.path / CONFIG)  # somebody's own, with comments perhaps
        names = [set_aside(path, "before").name for path in old]
        if names:
            text = f"{self.path} holds no usable checkpoint: starting at step 0; renamed: {', '.join(names)}"
            warnings.warn(text, stacklevel=4)
        if not os.path.lexists(self.path / METRICS):
            self._files[METRICS], renamed = RowFile(self.path / METRICS), self._files[METRICS]
            renamed.close()
        self._open_at({METRICS: 0, TIMING: 0}, {})

    def _open_at(self, lengths: dict[str, int], digests: dict[str, str]) -> None:
        """Open the row files, cut to these lengths, and write the config."""
        if self.config.landscape.every:
            lengths = {SNAPSHOTS: 0, **lengths}
        if lengths.get(SNAPSHOTS) == 0 and _holds(self.path / SNAPSHOTS):
            set_aside(self.path / SNAPSHOTS, "before")
        for name in lengths.keys() & DIGESTED - {METRICS}:
            self._files[name] = RowFile(self.path / name)
        for name in lengths.keys() & DIGESTED:
            self._files[name].check(lengths[name], digests.get(name))
        self._files[TIMING] = self._open_timing(lengths[TIMING])
        for name in lengths.keys() & DIGESTED:
            self._files[name].cut(lengths[name])
        replace_atomically(self.path / CONFIG, self._config())

    def _config(self) -> bytes:
        import tomli_w  # here, so that without the extra 'train' all that writes no run can be imported

        return tomli_w.dumps(self.config.to_dict()).encode()

    def _open_timing(self, length: int) -> RowFile:
        """The file of clocks, as much of it as there is: a run goes on without."""
        path = self.path / TIMING
        try:
            file = RowFile(path)
        except ShiftInputError:
            warnings.warn(f"not a file of rows, now {set_aside(path, 'other')}", stacklevel=5)
            file = RowFile(path)
        if file.length < length:
            warnings.warn(f"{path} has lost rows; the times of those steps are not known", stacklevel=5)
            length = file.read().rfind(b"\n") + 1
        file.cut(length)
        return file


def _holds(path: Path) -> bool:
    """Whether there is anything but an empty file."""
    return os.path.lexists(path) and (not path.is_file() or path.is_symlink() or path.stat().st_size > 0)
