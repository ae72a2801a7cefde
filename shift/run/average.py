"""The exponential average of a run's weights, which is what is evaluated, and saved beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class WeightAverage:
    """An average that starts at the first weights: after each step it moves ``1 - decay`` of the way to them.

    Args:
        pieces: the weights, as an optimiser's ``pieces``; changed in place by whoever trains them.
        decay: in (0, 1).
    """

    def __init__(self, pieces: Sequence[Tensor], decay: float) -> None:
        self._weights, self._decay = list(pieces), decay
        self._average = [x.clone() for x in pieces]

    @property
    def pieces(self) -> list[Tensor]:
        """The average, as the weights' pieces."""
        return self._average

    @torch.no_grad()
    def update(self) -> None:
        """After a step."""
        torch._foreach_lerp_(self._average, self._weights, 1 - self._decay)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew at the weights of now."""
        torch._foreach_copy_(self._average, self._weights)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weights, average in zip(self._weights, self._average, strict=True):
            held = weights.clone()
            weights.copy_(average)
            average.copy_(held)
