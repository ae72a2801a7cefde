"""River and valley: what is steep, what is flat, and what hangs on where the line is drawn.

With a threshold eps > 0, eigenvalues l of the Hessian belong to the

    valley   l >= eps    walls: the loss rises on both sides        river   |l| < eps    next to flat
    saddle   l <= -eps   the loss falls on both sides

and of a split we measure

    condition number of the valley   kappa = max l / min l over the valley
    cumulative force                 C = sum of 1 / l over the valley, whose cut-off is eps itself

The words, kappa and C are those of the river-valley account of Gong et al. (arXiv 2510.10089, after Wen et
al., arXiv 2410.05192) as its abstract and reviews tell of it. The rules for eps are ours. kappa can't exceed
max l / eps and C is carried by the eigenvalues next to eps: quote neither without :func:`sensitivity`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from shift.landscape.spectrum import Spectrum
from shift_kernels.errors import input_error

RULES = ("absolute", "relative", "gap")


@dataclass(frozen=True)
class Split:
    """A split at ``threshold`` (loss per squared weight): numbers of eigenvalues, kappa and C.

    ``valley``, ``river``, ``saddle`` count eigenvalues; ``condition`` is kappa, None without a valley;
    ``force`` is C, 0 without one; ``sharpest`` is the largest eigenvalue.
    """

    threshold: float
    valley: float
    river: float
    saddle: float
    condition: float | None
    force: float
    sharpest: float


def threshold(spectrum: Spectrum, rule: str = "relative", value: float = 1e-2) -> float:
    """The eps of a rule.

    Args:
        spectrum: with at least one positive eigenvalue.
        rule: ``absolute``: ``value`` itself; ``relative``: ``value`` times the largest eigenvalue; ``gap``:
            in the middle (on a log scale) of the widest gap between neighbouring eigenvalues among those
            above ``value`` times the largest. Only exact spectra have meaningful gaps.
        value: see ``rule``; > 0.

    Raises:
        ShiftInputError: an unknown rule, ``value`` <= 0, or (but for ``absolute``) no positive eigenvalue.
    """
    if rule not in RULES:
        raise input_error("threshold", "rule", rule, " or ".join(map(repr, RULES)), "Choose one.")
    if not value > 0:
        raise input_error("threshold", "value", value, "a number > 0", "Choose a positive one.")
    if rule == "absolute":
        return value
    top = float(spectrum.values.max())
    if top <= 0:
        raise input_error(
            "threshold", "spectrum", f"largest eigenvalue {top:.3g}", "a largest eigenvalue > 0",
            "Use rule='absolute'.",
        )  # fmt: skip
    if rule == "relative":
        return value * top
    logs = np.log(np.sort(spectrum.values[spectrum.values > value * top]))
    if len(logs) < 2:
        return value * top
    widest = int(np.argmax(np.diff(logs)))
    return float(np.exp((logs[widest] + logs[widest + 1]) / 2))


def split(spectrum: Spectrum, eps: float) -> Split:
    """The split at ``eps`` > 0."""
    if not eps > 0:
        raise input_error("split", "eps", eps, "a number > 0", "Take it from threshold(...).")
    values = spectrum.values
    walls = values >= eps
    return Split(
        threshold=eps,
        valley=spectrum.count(walls),
        river=spectrum.count(np.abs(values) < eps),
        saddle=spectrum.count(values <= -eps),
        condition=float(values[walls].max() / values[walls].min()) if walls.any() else None,
        force=float((spectrum.counts[walls] / values[walls]).sum()),
        sharpest=float(values.max()),
    )


def sensitivity(
    spectrum: Spectrum,
    rule: str = "relative",
    value: float = 1e-2,
    factors: tuple[float, ...] = (0.1, 0.3, 1, 3, 10),
) -> list[Split]:
    """The splits at multiples of a rule's threshold: how much kappa, C and the counts are the rule's own."""
    eps = threshold(spectrum, rule, value)
    return [split(spectrum, factor * eps) for factor in factors]


def exponent(splits: list[Split], quantity: str) -> float | None:
    """Slope of log quantity against log threshold: 0: no dependence; -1: it measures the threshold."""
    if quantity not in {f.name for f in dataclasses.fields(Split)}:
        raise input_error("exponent", "quantity", quantity, "a field of Split", "Check the spelling.")
    points = [(s.threshold, getattr(s, quantity)) for s in splits if getattr(s, quantity)]
    if len(points) < 2:
        return None
    x, y = np.log(np.array(points, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])
