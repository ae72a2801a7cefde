"""How many sequences of a step go through the model at once: more where the loops are few.

The gradients of a step are those of its whole batch, however it is cut. So a run that grows its loops keeps
its batch and its memory: 64 sequences at once with one loop, 16 with four.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from shift.config import micro_batch_sizes
from shift.schedules.base import doublings

REPEATS = 3
"""Times that a size is measured; the best counts."""
EQUAL = 0.97
"""A smaller micro-batch must take less than this share of the time of a larger one to be preferred."""


class MicroBatches:
    """The micro-batch of every number of loops.

    Args:
        setting: ``micro_batch`` of a config; "auto" must be found by :meth:`find` before the first step.
        batch_size: of a step.
    """

    def __init__(self, setting: int | str, batch_size: int) -> None:
        self._batch_size = batch_size
        self.searched = setting == "auto"
        """True if the sizes are found by a probe, not given."""
        self._sizes = {} if self.searched else micro_batch_sizes(setting, batch_size)

    def of(self, n_loops: int) -> int:
        """Sequences at once with ``n_loops`` loops: the size of the least number that is not below it."""
        at_least = [size for most, size in sorted(self._sizes.items()) if most >= n_loops]
        return min((at_least or [self._sizes[max(self._sizes)]])[0], self._batch_size)

    def find(
        self,
        attempt: Callable[..., object],
        max_loops: int,
        device: torch.device,
        agree: Callable[[int], int] = lambda size: size,
    ) -> None:
        """Find the sizes for 1, 2, 4, .. and ``max_loops`` loops: on an accelerator the largest that fits, on
        the CPU the fastest.

        Args:
            attempt: runs forward and backward of one micro-batch: (sequences, n_loops=).
            max_loops: T.
            device: of the model.
            agree: makes one size of those that the ranks found.
        """
        search = _fastest if device.type == "cpu" else _largest
        most = self._batch_size
        for n_loops in sorted(set(doublings(max_loops))):
            most = agree(search(functools.partial(attempt, n_loops=n_loops), most))
            self._sizes[n_loops] = most

    def state_dict(self) -> dict[str, Any]:
        """Sizes by loops where they were found, which decide the order of sums; plain JSON."""
        return {str(n): size for n, size in self._sizes.items()} if self.searched else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the sizes that :meth:`state_dict` gave.

        Raises:
            ValueError: they are none.
        """
        sizes = {int(n): size for n, size in state.items()}
        if not all(isinstance(size, int) and size >= 1 for size in sizes.values()):
            raise ValueError("micro-batches that are no sizes")
        if self.searched:
            self._sizes = sizes

    @property
    def known(self) -> bool:
        """False if :meth:`find` has not been called and there is something to find."""
        return bool(self._sizes)


def _halves(most: int) -> list[int]:
    """``most`` and its halves down to 1, rounded up, which cut a batch into nearly equal parts."""
    sizes = [most]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def _largest(attempt: Callable[[int], object], most: int) -> int:
    """The largest size that the device has memory for.

    Raises:
        torch.OutOfMemoryError: there is not even memory for one sequence.
    """
    for size in _halves(most):
        try:
            attempt(size)
            return size
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if size == 1:
                raise
    raise AssertionError("the last size is 1")


def _fastest(attempt: Callable[[int], object], most: int) -> int:
    """The size with the most sequences a second; sizes fall until they have become slower twice."""
    best, best_s, slower = most, _seconds(attempt, most) / most, 0
    for size in _halves(most)[1:]:
        per_sequence = _seconds(attempt, size) / size
        if per_sequence < EQUAL * best_s:
            best, best_s, slower = size, per_sequence, 0
        else:
            slower += 1
        if slower == 2:
            break
    return best


def _seconds(attempt: Callable[[int], object], size: int) -> float:
    attempt(size)
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        attempt(size)
        times.append(time.perf_counter() - begin)
    return min(times)
