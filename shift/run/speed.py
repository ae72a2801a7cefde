"""How fast a run goes: tokens a second, its share of what the device can do, and the memory that it takes."""

from __future__ import annotations

import functools
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

REPEATS = 4
SIDES = {"cpu": 512, "cuda": 8192}
"""Of the square matrices whose product tells the peak."""


@dataclass(frozen=True)
class Pace:
    """Of the steps since the last report.

    ``ms``: a step; ``tokens_per_s``: of all ranks; ``flops_share``: model FLOPs over the peak of all devices
    (MFU), None where the peak is unknown; ``memory_bytes``: the most that this process has taken so far.
    """

    ms: float
    tokens_per_s: float
    flops_share: float | None
    memory_bytes: int

    @staticmethod
    def of(timing: Sequence[Mapping[str, Any]], flops: float, peak: float | None) -> Pace:
        """From rows of ``timing.jsonl``, one or more, the FLOPs of their steps and the peak, FLOP/s."""
        seconds = sum(row["ms"] for row in timing) / 1e3
        tokens = sum(row["tokens"] for row in timing)
        share = None if peak is None else flops / seconds / peak
        return Pace(
            1e3 * seconds / len(timing), tokens / seconds, share, max(row["memory_bytes"] for row in timing)
        )


@functools.lru_cache
def matmul_peak(device: torch.device, bf16: bool) -> float | None:
    """FLOP/s of a large matrix product on a device, measured here and now; None where there is none.

    Measured, as what a device is said to do depends on its clock, its threads and who says it.
    """
    side, dtype = SIDES.get(device.type), torch.bfloat16 if bf16 else torch.float32
    if side is None:
        return None
    try:
        a, b = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
        seconds = min(_matmul_seconds(a, b) for _ in range(1 + REPEATS))
    except (RuntimeError, MemoryError):  # no memory left beside the run, say
        return None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # or these matrices would count as the run's
    return 2 * side**3 / seconds


def _matmul_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    _wait(a.device)
    begin = time.perf_counter()
    a @ b
    _wait(a.device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_bytes(device: torch.device) -> int:
    """The most memory taken so far: tensors on a GPU, since the peak was measured; on the CPU all that the
    process has had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
