"""Files of rows: appended to, and cut back to what a checkpoint remembers.

``metrics.jsonl`` holds facts that a repetition of the run reproduces byte for byte; clocks go to
``timing.jsonl``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from shift.run.files import naming, write_all
from shift_kernels.errors import ShiftInputError, input_error


class RowFile:
    """An append-only file of rows that can be cut back to the length a checkpoint remembers.

    What it holds changes only by :meth:`cut` and :meth:`append`.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path``, or make it.

        Raises:
            ShiftInputError: it is no regular file (a link could lead anywhere).
        """
        self.path = path
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._file = open(os.open(path, flags, 0o666), "r+b", buffering=0)  # noqa: SIM115 (see close)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            raise self._refusal("a regular file", f"Remove it ({error.strerror}).") from error
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self.close()
            raise self._refusal("a regular file", "Remove it.")
        self.length = os.fstat(self._file.fileno()).st_size
        self._sha256 = hashlib.sha256()

    def check(self, length: int, sha256: str | None) -> None:
        """Refuse a file that does not begin with what a checkpoint remembers.

        Args:
            length: bytes that it remembers.
            sha256: of these bytes; None: whatever they are.

        Raises:
            ShiftInputError: the file is shorter, or begins with other bytes.
        """
        if self.length < length:
            raise self._refusal(
                f"a file of at least {length} bytes (it has {self.length})",
                "It was changed since the checkpoint; start a new run directory.",
            )
        if sha256 is not None and self._digest_of(length).hexdigest() != sha256:
            raise self._refusal(
                f"a file whose first {length} bytes are those of the checkpoint",
                "It was changed since the checkpoint; start a new run directory.",
            )

    def cut(self, length: int) -> None:
        """Keep the first ``length`` bytes, of which there are as many."""
        self._sha256 = self._digest_of(length)
        with naming(self.path):
            os.ftruncate(self._file.fileno(), length)
        self.length = length

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows and hand them to the operating system."""
        self.append("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode())

    def append(self, data: bytes) -> None:
        """Append rows of another format."""
        with naming(self.path):
            write_all(self._file.fileno(), data)
        self._sha256.update(data)
        self.length += len(data)

    def sync(self) -> int:
        """Wait until the disk has all rows; returns the file's length in bytes.

        Raises:
            OSError: the file is no longer where it was opened: the run directory was deleted or renamed.
        """
        with naming(self.path):
            os.fsync(self._file.fileno())
        own = os.fstat(self._file.fileno())
        try:
            found = os.lstat(self.path)
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != (own.st_dev, own.st_ino):
            reason = "the run directory was deleted, renamed or replaced while the run went on"
            raise OSError(errno.ENOENT, reason, str(self.path))
        return self.length

    def sha256(self) -> str:
        """sha256 of the whole content."""
        return self._sha256.hexdigest()

    def read(self) -> bytes:
        """The whole content."""
        return os.pread(self._file.fileno(), self.length, 0)

    def close(self) -> None:
        self._file.close()

    def _digest_of(self, length: int) -> hashlib._Hash:
        sha256, at = hashlib.sha256(), 0
        while at < length and (data := os.pread(self._file.fileno(), min(2**20, length - at), at)):
            sha256.update(data)
            at += len(data)
        return sha256

    def _refusal(self, allowed: str, remedy: str) -> ShiftInputError:
        return input_error("shift.Trainer", "run_dir", str(self.path), allowed, remedy)
