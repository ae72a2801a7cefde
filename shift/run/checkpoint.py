"""Checkpoints that survive a kill at any moment: a directory each, complete and verified, or not there.

    run/checkpoints/step-00000400/
        model.safetensors   weights
        optimizer.pt        AdamW's state, read with weights_only=True
        state.json          all else that is needed to go on as if nothing had happened: step, schedule,
                            generators, file lengths, config
        MANIFEST.json       bytes and sha256 of the three

A save writes to ``.tmp-step-...``, waits for the disk, and renames; only then are old checkpoints deleted.
A load reads each file once and verifies it against the manifest before anything is decoded.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from shift.run.files import sync_directory, write_synced

WEIGHTS, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.pt", "state.json", "MANIFEST.json"


class DamagedCheckpoint(Exception):
    """A checkpoint directory does not hold what its manifest says; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read into memory and not yet decoded into a model."""

    path: Path
    files: Mapping[str, bytes]
    state: dict[str, Any]

    def restore_weights(self, model: nn.Module) -> None:
        """Load the weights alone into a model of the same shapes."""
        model.load_state_dict(safetensors.torch.load(self.files[WEIGHTS]))

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load weights and optimiser into objects of the same shapes; set torch's generators."""
        self.restore_weights(model)
        file = io.BytesIO(self.files[OPTIMIZER])
        optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        _set_generators(self.state["generators"])


def save(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write ``directory/step-<step>``, then delete all but the newest ``keep``.

    Raises:
        OSError: the disk refused; the message names the path and the bytes needed. Older checkpoints are
            as they were.
    """
    optimizer_file = io.BytesIO()
    torch.save(optimizer.state_dict(), optimizer_file)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    files = {
        WEIGHTS: safetensors.torch.save(weights),
        OPTIMIZER: optimizer_file.getvalue(),
        STATE: json.dumps({"step": step, **state, "generators": _generators()}, indent=1).encode(),
    }
    manifest = {name: {"bytes": len(data), "sha256": _sha256(data)} for name, data in files.items()}
    files[MANIFEST] = json.dumps(manifest, indent=1).encode()

    final = directory / f"step-{step:08d}"
    temporary = directory / f".tmp-{final.name}"
    try:
        remove_leftovers(directory)
        temporary.mkdir(parents=True)
        for name, data in files.items():
            write_synced(temporary / name, data)
        sync_directory(temporary)
        os.rename(temporary, final)
        sync_directory(directory)
    except OSError as error:
        needed = sum(map(len, files.values()))
        shutil.rmtree(temporary, ignore_errors=True)
        text = f"{error.strerror} (checkpoint of {needed} bytes not written; older ones are untouched)"
        raise OSError(error.errno, text, str(final)) from error
    for _, old in checkpoints(directory)[:-keep]:
        _delete(old)
    return final


def read(path: Path) -> Checkpoint:
    """Read and verify one checkpoint directory.

    Raises:
        DamagedCheckpoint: a file is missing or differs from the manifest in length or sha256.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        wanted = {
            name: (manifest[name]["bytes"], manifest[name]["sha256"]) for name in (WEIGHTS, OPTIMIZER, STATE)
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path / MANIFEST}: {error!r}") from error
    files = {}
    for name, (length, sha256) in wanted.items():
        try:
            data = (path / name).read_bytes()
        except OSError as error:
            raise DamagedCheckpoint(f"{path / name}: {error.strerror}") from error
        if len(data) != length or _sha256(data) != sha256:
            raise DamagedCheckpoint(f"{path / name}: {len(data)} bytes that are not the {length} saved")
        files[name] = data
    return Checkpoint(path, files, json.loads(files[STATE]))


def newest_valid(directory: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and the damaged ones (path, reason) that are newer."""
    damaged: list[tuple[Path, str]] = []
    for _, path in reversed(checkpoints(directory)):
        try:
            return read(path), damaged
        except DamagedCheckpoint as error:
            damaged.append((path, str(error)))
    return None, damaged


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Step and path of each checkpoint in a directory, oldest first; empty when there is no directory."""
    paths = directory.iterdir() if directory.is_dir() else ()
    found = [(int(match[1]), path) for path in paths if (match := re.fullmatch(r"step-(\d+)", path.name))]
    return sorted(found)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is neither loaded nor counted; it is kept for a look at it."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed save or deletion left behind."""
    for path in directory.glob(".tmp-*"):
        shutil.rmtree(path)


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
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)


def _delete(path: Path) -> None:
    """Delete a checkpoint; killed half-way it must not look like one."""
    doomed = path.with_name(f".tmp-old-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
