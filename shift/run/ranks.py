"""The processes of ``torchrun``: what they average, share, and agree on. One process is a group of one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shift_kernels import ShiftInputError

T = TypeVar("T")

SIGNS = 10
"""Signs of life in a hang timeout."""


class OtherRankFailed(Exception):
    """Another rank failed, so this one stops, too; the message is that rank's."""


class Ranks:
    """The ranks of the process group that is initialised, if one is.

    A failure of one rank must reach all, or the others would wait for it for ever: what may fail while the
    ranks depend on each other goes through :meth:`together` or :meth:`from_first`.

    Args:
        hang_timeout: seconds that ranks wait for one that works alone and gives no sign of life. One that
            died is noticed at once.
    """

    def __init__(self, hang_timeout: float) -> None:
        distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.size = dist.get_world_size() if distributed else 1
        # Objects go by a group of their own, on the CPU: what one rank does alone, such as a measurement or a
        # save, may take longer than a step may wait for a rank.
        patience = timedelta(seconds=hang_timeout)
        self.control = dist.new_group(backend="gloo", timeout=patience) if self.size > 1 else None
        self._every = hang_timeout / SIGNS
        self._next_sign = math.inf  # of rank 0, while it works alone

    def mean(self, x: Tensor) -> Tensor:
        """The mean over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether a flag is set on any rank; waits for the device."""
        return flag if self.size == 1 else bool(self.mean(torch.tensor(float(flag), device=device)))

    def copy_first(self, x: Tensor) -> None:
        """Give every rank the tensor of rank 0, in place."""
        if self.size > 1:
            dist.broadcast(x, src=0)

    def gather(self, value: T) -> list[T]:
        """The value of every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """What an action returns on this rank; if it fails on any, it fails on all.

        Raises:
            ShiftInputError: raised by the action on this rank or another.
            OtherRankFailed: it raised something else on another.
        """
        result, error = _attempt(action)
        failures = self.gather(None if error is None else _description(self.rank, error))
        if error is not None:
            raise error
        _raise_first(failures)
        return result  # type: ignore[return-value]

    def from_first(self, action: Callable[[], T]) -> T:
        """What an action returns on rank 0, the only one that runs it; its failure there is one on all.

        An action that may take longer than the hang timeout calls :meth:`sign_of_life` as it gets on.
        """
        if self.rank > 0:
            while (outcome := self._spread(None)) is None:
                pass  # a sign of life
            result, failure = outcome
            _raise_first([failure])
            return result
        self._next_sign = time.monotonic() + self._every
        done, error = _attempt(action)
        self._next_sign = math.inf
        self._spread((done, None if error is None else _description(0, error)))
        if error is not None:
            raise error
        return done  # type: ignore[return-value]

    def sign_of_life(self) -> None:
        """Tell the ranks that wait for this one, if any do, that it gets on; cheap enough for any loop."""
        if time.monotonic() >= self._next_sign:
            self._spread(None)
            self._next_sign = time.monotonic() + self._every

    def _spread(self, value: Any) -> Any:
        """The value of rank 0."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _description(rank: int, error: Exception) -> tuple[bool, str]:
    return isinstance(error, ShiftInputError), f"rank {rank}: {error}"


def _raise_first(failures: list[tuple[bool, str] | None]) -> None:
    for failure in failures:
        if failure is not None:
            is_input, text = failure
            raise ShiftInputError(text) if is_input else OtherRankFailed(text)
