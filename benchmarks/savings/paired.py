"""Is one arm cheaper than another? Costs of equal seeds, with "never reached" as infinitely dear."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

EXACT = 12
"""Up to this many differing pairs all sign patterns count; beyond, the observed one and 20,000 drawn ones."""


def costs(seeds: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Training FLOPs to the target by seed; infinite where it was never reached."""
    return {s["seed"]: math.inf if s["flops_to_target"] is None else s["flops_to_target"] for s in seeds}


def p_cheaper(arm: Mapping[Any, float], other: Mapping[Any, float]) -> float:
    """One-sided p of "the arm is no cheaper": signed ranks of log cost ratios, by permutation of the signs.

    A seed on which just one of the two never got there is the largest difference there is; one on which
    neither did, or both at the same cost, says nothing and is left out. 1 if no seed is left.
    """
    differences = [_log(other[s]) - _log(arm[s]) for s in arm if s in other and arm[s] != other[s]]
    if not differences:
        return 1.0
    ranks = _ranks([abs(d) for d in differences])
    signs = np.sign(differences)
    observed = float(signs @ ranks)
    if len(ranks) <= EXACT:
        patterns = np.array(list(itertools.product((-1, 1), repeat=len(ranks))))
    else:
        drawn = np.random.default_rng(0).choice((-1, 1), size=(20_000, len(ranks)))
        patterns = np.vstack((signs, drawn))  # or p could be 0
    return float(np.mean(patterns @ ranks >= observed - 1e-9))


def _log(cost: float) -> float:
    return 1e9 if math.isinf(cost) else math.log(cost)


def _ranks(values: Sequence[float]) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    ordered = np.sort(values)
    low, high = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return (low + 1 + high) / 2


def dearness(seeds: Sequence[Mapping[str, Any]]) -> tuple[int, float]:
    """For sorting: the number of seeds never, then the mean cost of the others."""
    reached = [c for c in costs(seeds).values() if math.isfinite(c)]
    return len(seeds) - len(reached), sum(reached) / max(len(reached), 1)


def best_of(names: Iterable[str], arms: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Of some arms the one that was best with hindsight: fewest seeds never, then least mean cost."""
    return min(names, key=lambda name: dearness(arms[name]["seeds"]), default=None)


def best_fixed_switch(arms: Mapping[str, Mapping[str, Any]]) -> str | None:
    """:func:`best_of` the fixed switches."""
    return best_of((name for name in arms if name.startswith("fixed:")), arms)
