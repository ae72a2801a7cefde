"""Files that are either wholly there or not at all, whatever kills the process or the machine."""

from __future__ import annotations

import errno
import os
from pathlib import Path

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
    except OSError as error:
        raise input_error(
            function, argument, str(path), "a directory that can be written to",
            f"Choose another ({error.strerror}).",
        ) from error  # fmt: skip


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new one, never a mixture."""
    temporary = path.with_name(f".tmp-{path.name}")
    write_synced(temporary, data)
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Wait until the disk has a directory's entries: renames and new files are only then durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
