"""The loss along one direction: is the valley a U or a V there?

    U   c + a (x - x_0)^2        V   c + a |x - x_0|         each with its own best a, c, x_0

Every smooth function is a U near its floor, so the answer depends on how high one looks: cuts reach as far
as the loss needs to rise by a given height (the mean of both sides).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.optimize

from shift_kernels.errors import input_error


@dataclass(frozen=True)
class Cut:
    """Loss ``y`` at offsets ``x`` (unit-vector lengths) and the two fits.

    ``margin``: (SSE of V - SSE of U) / (their sum), in [-1, 1]: above 0 U fits better, below 0 V does.
    """

    x: np.ndarray
    y: np.ndarray
    u: np.ndarray
    v: np.ndarray
    margin: float

    @property
    def shape(self) -> str:
        """The better fit."""
        return "U" if self.margin > 0 else "V"


def cut(function: Callable[[float], float], height: float, n_points: int = 41) -> Cut:
    """Cut through a valley, as wide as it takes for the mean of both ends to rise by ``height``.

    Args:
        function: loss at an offset; the valley's floor is near 0.
        height: > 0, in nats.
        n_points: of the cut.

    Raises:
        ShiftInputError: no height, or the loss does not rise by it within offsets of 1e6.
    """
    if not height > 0:
        raise input_error("cut", "height", height, "a number > 0", "0.1 nats is a start.")
    floor, width = function(0.0), 1e-3

    def rise(width: float) -> float:
        return (function(width) + function(-width)) / 2 - floor - height

    while rise(width) < 0:
        width *= 2
        if width > 1e6:
            raise input_error("cut", "height", height, "a height that the loss reaches", "Lower it.")
    if rise(width / 2) < 0:
        width = scipy.optimize.brentq(rise, width / 2, width, rtol=1e-3)
    x = np.linspace(-width, width, n_points)
    return fit(x, np.array([function(float(offset)) for offset in x]))


def fit(x: np.ndarray, y: np.ndarray) -> Cut:
    """Fit both shapes to a curve.

    Args:
        x: rising offsets [k].
        y: loss [k].
    """
    u, v = (_best(x, y, shape) for shape in (np.square, np.abs))
    error_u, error_v = ((fitted - y) @ (fitted - y) for fitted in (u, v))
    total = error_u + error_v
    return Cut(x, y, u, v, float((error_v - error_u) / total) if total > 0 else 0.0)


def _best(x: np.ndarray, y: np.ndarray, shape: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Least squares: linear in a and c; the x_0 by a search of the whole range."""

    def fitted(x_0: float) -> np.ndarray:
        columns = np.stack([shape(x - x_0), np.ones_like(x)], axis=1)
        return columns @ np.linalg.lstsq(columns, y, rcond=None)[0]

    def error(x_0: float) -> float:
        return float(((fitted(x_0) - y) ** 2).sum())

    starts = np.linspace(x[0], x[-1], 4 * len(x))
    nearest = int(np.argmin([error(x_0) for x_0 in starts]))
    bounds = starts[max(nearest - 1, 0)], starts[min(nearest + 1, len(starts) - 1)]
    return fitted(scipy.optimize.minimize_scalar(error, bounds=bounds, method="bounded").x)
