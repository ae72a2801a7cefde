"""What a run writes down while it runs: rows in files, and a line for whoever watches.

``metrics.jsonl`` holds facts that a repetition of the run reproduces byte for byte; clocks go to
``timing.jsonl``. Values stay on the device until :meth:`PendingRows.read` fetches all of them at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from shift.run.files import naming, write_all
from shift.run.speed import Pace
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


class PendingRows:
    """Rows whose values may still be 0-d tensors on the device."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)

    def read(self) -> list[dict[str, Any]]:
        """All rows since the last call, in order, with one device-to-host copy for all their tensors.

        Non-finite numbers become None, as JSON has no word for them.
        """
        rows, self._rows = self._rows, []
        tensors = [v for row in rows for v in row.values() if isinstance(v, Tensor)]
        values = iter(torch.stack([t.double() for t in tensors]).tolist() if tensors else ())
        return [
            {k: _plain(next(values), v.dtype) if isinstance(v, Tensor) else v for k, v in row.items()}
            for row in rows
        ]


def _plain(value: float, dtype: torch.dtype) -> bool | float | None:
    if dtype == torch.bool:
        return bool(value)
    return value if math.isfinite(value) else None


class StepTimer:
    """Milliseconds of each step: on an accelerator by events in its stream, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self._begin = self._now()

    def stop(self) -> None:
        self._marks.append((self._begin, self._now()))

    def read(self) -> list[float]:
        """Times of the steps since the last call; waits for the last of them."""
        marks, self._marks = self._marks, []
        if not self._cuda:
            return [1e3 * (end - begin) for begin, end in marks]
        if marks:
            marks[-1][1].synchronize()
        return [begin.elapsed_time(end) for begin, end in marks]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Console:
    """One line per report; below a bar on a terminal, plain in a log file."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        self._total = total_steps
        self._stream = stream or sys.stderr
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, file=self._stream, unit="step", dynamic_ncols=True)

    def train(self, row: Mapping[str, Any], pace: Pace) -> None:
        """The state after a step: its metrics row, and how fast the last steps went."""
        share = "unknown" if pace.flops_share is None else f"{100 * pace.flops_share:.1f}%"
        facts = (
            f"loss {_short(row['loss'])} | lr {row['lr']:.1e} | grad {_short(row['grad_norm'])} | "
            f"T {row['n_loops']} stage {row['stage']} | {pace.ms:.1f} ms | {pace.tokens_per_s:,.0f} tok/s | "
            f"MFU {share} | {pace.memory_bytes / 2**20:,.0f} MiB"
        )
        if self._bar is not None:
            self._bar.update(row["step"] - self._bar.n)
            self._bar.set_postfix_str(facts)
        else:
            eta = (self._total - row["step"]) * pace.ms / 1e3
            self.say(f"step {row['step']:5d}/{self._total} | {facts} | eta {eta:.0f} s")

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """The result of an evaluation: its metrics row."""
        bits = f" | bits/byte {_short(row['bits_per_byte'])}" if "bits_per_byte" in row else ""
        self.say(
            f"eval {row['step']:5d}/{self._total} | loss {_short(row['loss'])}{bits} | T {row['n_loops']} | "
            f"accuracy {row['accuracy']:.4f} | exact {row['exact']:.4f}"
        )

    def say(self, text: str) -> None:
        """Any other line."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
