"""Checkpoints that survive a kill at any moment: a directory each, complete and verified, or not there.

    run/checkpoints/step-00000400/
        model.safetensors   weights
        average.safetensors averaged weights, where the run averages them
        optimizer.pt        the optimiser's state, read with weights_only=True
        shard-*.safetensors instead of these three, where each rank holds a part (shift.run.shards)
        state.json          all else that is needed to go on as if nothing had happened: step, schedule,
                            generators, file lengths, config
        MANIFEST.json       bytes and sha256 of all of them

A save writes to ``.tmp-step-...``, waits for the disk, and renames; only then are old checkpoints deleted.
A load reads each file once and verifies it against the manifest before anything is decoded. A manifest that
agrees proves nothing about who wrote it: what is decoded is checked again, and names no file.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from shift.reading import is_count, parse_json, read_regular
from shift.run.average import WeightAverage
from shift.run.files import remove, set_aside, sync_directory, sync_file, write_synced
from shift.run.optim import RunOptimizer
from shift.run.ranks import Ranks
from shift.tasks.base import Task
from shift_kernels.errors import input_error

if TYPE_CHECKING:
    from shift.run.sharded import ShardedAdamW

WEIGHTS, AVERAGE, OPTIMIZER = "model.safetensors", "average.safetensors", "optimizer.pt"
STATE, MANIFEST = "state.json", "MANIFEST.json"


WHOLE = (WEIGHTS, OPTIMIZER)
"""Those that a checkpoint has unless it is in shards."""
NAME = re.compile(r"step-([0-9]{1,18})")
SHARD = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
TEMPORARY = re.compile(r"\.tmp-(old-)?step-[0-9]+")
LARGEST_TEXT = 2**26
"""Bytes of a manifest or state that are read."""


class DamagedCheckpoint(Exception):
    """A checkpoint directory does not hold what its manifest says, or not a checkpoint of this run's kind;
    the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read into memory and not yet decoded into a model."""

    path: Path
    files: Mapping[str, bytes]
    state: dict[str, Any]

    @staticmethod
    def of_files(path: Path, files: Mapping[str, bytes]) -> Checkpoint:
        """The checkpoint of files that were verified, or came from another rank that did.

        Raises:
            DamagedCheckpoint: the state is not a table.
        """
        with damage(path / STATE):
            state = parse_json(files[STATE], finite=False)  # a criterion's signals may be NaN
            if not isinstance(state, dict) or not is_count(state["step"]):
                raise ValueError("not a table with a step")
        return Checkpoint(path, files, state)

    def check_data(self, function: str, task: Task, flag: str) -> None:
        """Refuse a task whose data are not those of the run. (Older runs do not say which they were.)

        Args:
            function: who refuses.
            task: that reads the data.
            flag: how the user names where they lie now.

        Raises:
            ShiftInputError: they are others.
        """
        ours, theirs = task.fingerprint, str(self.state.get("data", task.fingerprint))
        if ours != theirs:
            raise input_error(
                function, "task", f"{task.name!r} with the data {ours[:12]}",
                f"the data {theirs[:12]}, as in {self.path}",
                f"Bring it back, or name the folder where it lies now: {flag}.",
            )  # fmt: skip

    def restore_weights(self, model: nn.Module) -> None:
        """Load the weights to be used, averaged ones if there are any, into a model of the same shapes.

        Raises:
            DamagedCheckpoint: they are not weights of such a model.
        """
        if not self.sharded:
            self._load(model, AVERAGE if AVERAGE in self.files else WEIGHTS)
            return
        from shift.run import shards

        part = shards.AVERAGE if self.state["config"]["optimiser"].get("ema") else shards.WEIGHTS
        with damage(self.path):
            tensors = {f"{part}.{name}": p.detach() for name, p in model.named_parameters()}
            shards.read(tensors, self.path)

    @property
    def sharded(self) -> bool:
        """True if each rank has written a part of it."""
        return WEIGHTS not in self.files

    def restore(
        self,
        model: nn.Module,
        optimizer: RunOptimizer,
        average: WeightAverage | None = None,
    ) -> None:
        """Load weights and optimiser into objects of the same shapes; set torch's generators.

        Raises:
            DamagedCheckpoint: they do not fit; the objects may then hold a part of what was saved.
        """
        if self.sharded:
            from shift.run import shards

            with damage(self.path):
                shards.read(shards.tensors_of(model, cast("ShardedAdamW", optimizer), average), self.path)
                optimizer.load_state_dict(self.state["optimizer"])
                _set_generators(self.state["generators"])
            return
        if average is not None:
            self._load(model, AVERAGE)
            average.restart()
        self._load(model, WEIGHTS)
        with damage(self.path / OPTIMIZER):
            file = io.BytesIO(self.files[OPTIMIZER])
            optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        with damage(self.path / STATE):
            _set_generators(self.state["generators"])

    def _load(self, model: nn.Module, name: str) -> None:
        with damage(self.path / name):
            model.load_state_dict(safetensors.torch.load(self.files[name]))


@contextlib.contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turn what foreign content may raise while it is decoded into :class:`DamagedCheckpoint`."""
    try:
        yield
    except DamagedCheckpoint:
        raise
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from error
    except KeyError as error:
        raise DamagedCheckpoint(f"{path}: without {error}") from error
    except (torch.OutOfMemoryError, MemoryError):
        raise  # of this machine, not of the file
    except Exception as error:  # no decoder tells all that it raises on content it was not made for
        reason = " ".join(str(error).split())[:200]
        raise DamagedCheckpoint(f"{path}: {reason or type(error).__name__}") from error


def save(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: RunOptimizer,
    state: Mapping[str, Any],
    keep: int,
    average: WeightAverage | None = None,
) -> Path:
    """Write ``directory/step-<step>``, then delete all but the newest ``keep``.

    Raises:
        OSError: the disk refused; the message names the path and the bytes needed. Older checkpoints are
            as they were.
    """
    optimizer_file = io.BytesIO()
    torch.save(optimizer.state_dict(), optimizer_file)
    files = {
        WEIGHTS: _weights(model),
        OPTIMIZER: optimizer_file.getvalue(),
        STATE: state_file(step, state),
    }
    if average is not None:
        with average.in_place():
            files[AVERAGE] = _weights(model)
    with _refusals_named(directory, step, sum(map(len, files.values()))):
        temporary = begin(directory, step)
        return commit(temporary, files, keep)


def save_shards(
    directory: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    ranks: Ranks,
) -> None:
    """As :func:`save`, of sharded tensors; called on all ranks, which see the same file system."""
    from shift.run import shards

    temporary = _temporary(directory, step)
    needed = sum(x.numel() * x.element_size() for x in tensors.values())
    with _refusals_named(directory, step, needed):
        ranks.from_first(lambda: begin(directory, step))
        ranks.together(lambda: shards.write(tensors, temporary, ranks.control))
        ranks.from_first(lambda: commit(temporary, {STATE: state_file(step, state)}, keep))


def state_file(step: int, state: Mapping[str, Any]) -> bytes:
    """The content of ``state.json``."""
    return json.dumps({"step": step, **state, "generators": _generators()}, indent=1).encode()


def begin(directory: Path, step: int) -> Path:
    """Make the folder that becomes a checkpoint."""
    directory.mkdir(exist_ok=True)  # its parent is there, or the run directory is gone
    remove_leftovers(directory)
    temporary = _temporary(directory, step)
    temporary.mkdir()
    return temporary


def commit(temporary: Path, files: Mapping[str, bytes], keep: int) -> Path:
    """Add files and the manifest to what is in a folder of :func:`begin`, and make it a checkpoint."""
    manifest = {}
    for path in sorted(temporary.iterdir()):
        manifest[path.name] = {"bytes": path.stat().st_size, "sha256": _file_sha256(path)}
        sync_file(path)
    manifest |= {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()}
    for name, data in {**files, MANIFEST: json.dumps(manifest, indent=1).encode()}.items():
        write_synced(temporary / name, data)
    sync_directory(temporary)
    directory, final = temporary.parent, temporary.with_name(temporary.name.removeprefix(".tmp-"))
    if os.path.lexists(final):
        set_aside(final, "other")
    os.rename(temporary, final)
    sync_directory(directory)
    prune(directory, int(final.name.removeprefix("step-")), keep)
    return final


def _temporary(directory: Path, step: int) -> Path:
    return directory / f".tmp-step-{step:08d}"


@contextlib.contextmanager
def _refusals_named(directory: Path, step: int, needed: int) -> Iterator[None]:
    """Say in an OSError what was not written."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(_temporary(directory, step), ignore_errors=True)
        text = f"{error.strerror} (checkpoint of {needed} bytes not written; older ones are untouched)"
        raise OSError(error.errno, text, str(directory / f"step-{step:08d}")) from error


def _weights(model: nn.Module) -> bytes:
    return safetensors.torch.save({name: x.contiguous() for name, x in model.state_dict().items()})


def prune(directory: Path, step: int, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints of steps up to ``step``."""
    there = [path for at, path in checkpoints(directory) if at <= step and _is_directory(path)]
    own = [path for path in there if (path / MANIFEST).is_file()]
    for old in own[:-keep]:
        _delete(old)


def read(path: Path) -> Checkpoint:
    """Read and verify one checkpoint directory.

    Raises:
        DamagedCheckpoint: a file is missing, is no regular file inside that directory, or differs from the
            manifest in length or sha256; or the state is not one.
    """
    if not _is_directory(path):
        raise DamagedCheckpoint(f"{path}: not a directory")
    with damage(path / MANIFEST):
        manifest = parse_json(_read_inside(path, MANIFEST, None))
        parts = [name for name in manifest if SHARD.fullmatch(name)]
        names = (*(parts or WHOLE), STATE, *((AVERAGE,) if AVERAGE in manifest else ()))
        wanted = {name: (manifest[name]["bytes"], manifest[name]["sha256"]) for name in names}
        if not all(is_count(length) for length, _ in wanted.values()):
            raise ValueError("lengths that are none")
    files = {}
    for name, (length, sha256) in wanted.items():
        with damage(path / name):
            data = _read_inside(path, name, length)
            if _sha256(data) != sha256:
                raise ValueError(f"{length} bytes that are not those saved")
            if name not in parts:  # each rank reads of these what it needs
                files[name] = data
    return Checkpoint.of_files(path, files)


def _read_inside(folder: Path, name: str, size: int | None) -> bytes:
    """The content of a regular file that lies in a folder, links followed."""
    path = folder / name
    if not path.resolve(strict=True).is_relative_to(folder.resolve()):
        raise ValueError("a link that leads out of the checkpoint")
    if name in (MANIFEST, STATE) and path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"more than {LARGEST_TEXT} bytes")
    return read_regular(path, size)


def newest_valid(
    directory: Path, accept: Callable[[Checkpoint], object] | None = None
) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and the damaged ones (path, reason) that are newer.

    Args:
        directory: of the checkpoints.
        accept: called with each that verifies until it does not raise :class:`DamagedCheckpoint`; loads it,
            say.
    """
    damaged: list[tuple[Path, str]] = []
    for _, path in reversed(checkpoints(directory)):
        try:
            found = read(path)
            if accept is not None:
                accept(found)
            return found, damaged
        except DamagedCheckpoint as error:
            damaged.append((path, str(error)))
    return None, damaged


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Step and path of all that is named as a checkpoint, oldest first; empty when there is no directory."""
    paths = directory.iterdir() if directory.is_dir() else ()
    found = [(int(match[1]), path) for path in paths if (match := NAME.fullmatch(path.name))]
    return sorted(found)


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed save or deletion left behind; other hidden files are not ours."""
    for path in directory.glob(".tmp-*"):
        if TEMPORARY.fullmatch(path.name):
            remove(path)


def digest(tree: Any) -> str:
    """sha256 of nested dicts and lists of tensors and plain values, by content and order-free in dicts.

    Pickles of equal state may differ in bytes; this does not. Tensors count with dtype, shape and bits.
    """
    sha256 = hashlib.sha256()
    _feed(sha256, tree)
    return sha256.hexdigest()


def _feed(sha256: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        sha256.update(f"{value.dtype}{list(value.shape)}".encode())
        sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        sha256.update(f"{{{len(value)}}}".encode())
        for key in sorted(value, key=str):
            sha256.update(f"{key!r}:".encode())
            _feed(sha256, value[key])
    elif isinstance(value, (list, tuple)):
        sha256.update(f"[{len(value)}]".encode())
        for item in value:
            _feed(sha256, item)
    else:
        sha256.update(repr(value).encode())


def _generators() -> dict[str, str]:
    """States of torch's default generators, so that a model that draws (dropout) goes on with its draws."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _set_generators(states: Mapping[str, str]) -> None:
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == "cuda" and torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


def _delete(path: Path) -> None:
    """Delete a checkpoint; killed half-way it must not look like one."""
    doomed = path.with_name(f".tmp-old-{path.name}")
    remove(doomed)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _file_sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(2**20):
            sha256.update(data)
    return sha256.hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
