"""Times of calls that take turns in one process."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]


def interleave(
    calls: Mapping[str, Call],
    rounds: int,
    warm_up: int,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of every call, one a round. The calls take turns, so that a busy machine hurts all alike.

    Args:
        calls: name -> a call without arguments.
        rounds: rounds that are kept.
        warm_up: rounds before them.
        device: where the calls compute; on CUDA the times are those of events around each call.
        clock: seconds, on a CPU: ``time.process_time`` leaves out what others compute, with one thread.
    """
    cuda = torch.device(device).type == "cuda"
    milliseconds = _cuda_milliseconds if cuda else functools.partial(_cpu_milliseconds, clock)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warm_up + rounds):
        for name, call in calls.items():
            took = milliseconds(call)
            if i >= warm_up:
                times[name].append(took)
    return times


def _cpu_milliseconds(clock: Callable[[], float], call: Call) -> float:
    start = clock()
    call()
    return 1e3 * (clock() - start)


def _cuda_milliseconds(call: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (quartiles)."""
    low, middle, high = (f"{x:.{digits}f}" for x in statistics.quantiles(values, n=4))
    return f"{middle} ({low}-{high})"


def speedup(times: Mapping[str, Sequence[float]], ours: str, others: Sequence[str]) -> float:
    """Median of the fastest of ``others`` over the median of ``ours``."""
    return min(statistics.median(times[name]) for name in others) / statistics.median(times[ours])
