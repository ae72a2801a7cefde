"""Files that are either wholly there or not at all, whatever kills the process or the machine."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shift_kernels.errors import input_error


def make_directory(path: Path, function: str, argument: str) -> None:
    """Make the directory that ``argument`` of ``function`` names, if need be.

    Raises:
        ShiftInputError: it can't be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise input_error(
            function, argument, str(path), "a directory that can be written to", f"Choose another ({reason})."
        ) from error


@contextlib.contextmanager
def directory_for(path: Path, function: str, argument: str) -> Iterator[None]:
    """:func:`make_directory` for what follows: where that fails, folders made for it go again if empty."""
    made = missing_folders(path)
    try:
        make_directory(path, function, argument)
        yield
    except BaseException:
        remove_empty(made)
        raise


def missing_folders(path: Path) -> list[Path]:
    """The folder and those above it that are not there, the innermost first."""
    return [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders, each inside the next, that are there and empty."""
    for folder in folders:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in the name
            folder.rmdir()


def refuse_to_overwrite(out: Path, names: Iterable[str], function: str) -> None:
    """Refuse a folder in which something of these names lies, of an earlier call perhaps.

    Raises:
        ShiftInputError: there is such a thing.
    """
    if taken := [name for name in names if os.path.lexists(out / name)]:
        allowed = f"a folder without {' and '.join(taken)}"
        raise input_error(function, "out", str(out), allowed, "Choose another, or overwrite them: --force.")


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it. What lies at ``path``, a link say, is not followed."""
    with naming(path):
        remove(path)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(handle, "wb", buffering=0) as file:
            write_all(file.fileno(), data)
            os.fsync(file.fileno())


def write_all(handle: int, data: bytes) -> None:
    """Write all bytes to an open file."""
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]


def replace_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new one, never a mixture."""
    temporary = path.with_name(f".tmp-{path.name}")
    write_synced(temporary, data)
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Wait until the disk has a directory's entries: renames and new files are only then durable."""
    sync_file(path)


def sync_file(path: Path) -> None:
    """Wait until the disk has what others have written to a file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError that names none, as those of writes to an open file do."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove(path: Path) -> None:
    """Remove what lies there, if anything does: a file, a link itself, a directory with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path, prefix: str) -> Path:
    """Rename a file or directory to ``<prefix>-<name>``, numbered if that is taken; returns the new path."""
    numbers = ("" if n == 1 else f"-{n}" for n in itertools.count(1))
    candidates = (path.with_name(f"{prefix}-{path.name}{number}") for number in numbers)
    return path.rename(next(new for new in candidates if not os.path.lexists(new)))


def json_bytes(value: Any) -> bytes:
    """Strict JSON of plain values; a float that is not finite (clip = inf, say) becomes a string."""
    return json.dumps(_strict(value), indent=1, allow_nan=False).encode()


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, (list, tuple)) else value
