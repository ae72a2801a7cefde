"""What steps measure: left on the device until it is read, so that nothing waits for each of them."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor


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
