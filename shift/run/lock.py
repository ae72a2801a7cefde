"""A file that one process has for itself, until it lets go of it or ends, in whatever way."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from weakref import WeakValueDictionary

_held: WeakValueDictionary[tuple[int, int, int], FileIO] = WeakValueDictionary()
"""Locked files by process (a fork has what its parent had, but not the lock), device and inode."""


def take_lock(path: Path) -> FileIO | None:
    """Have a file, made if need be, for this process alone.

    It is flock's lock, which stays when something else in this process opens and closes the file, as fcntl's
    would not. Who asks in the same process shares it: a run is resumed beside what is left of the old one.

    Returns:
        What holds the lock as long as anything refers to it: drop it, and do not close it, which others may
        share. None: another process has the lock. Where the file system has no locks, everybody gets one.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = FileIO(os.open(path, flags, 0o666), "r+")
    found = os.fstat(file.fileno())
    key = os.getpid(), found.st_dev, found.st_ino
    if (held := _held.get(key)) is not None:
        file.close()
        return held
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        pass  # a file system that has no locks
    _held[key] = file
    return file


@contextlib.contextmanager
def alone_with(path: Path, refusal: Exception) -> Iterator[None]:
    """Have the file for this process alone; where another one has it, raise ``refusal``."""
    lock = take_lock(path)
    if lock is None:
        raise refusal
    try:
        yield
    finally:
        del lock  # which the traceback of an error would keep
