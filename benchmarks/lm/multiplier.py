"""How much compute another way to train would need for the same loss.

The compute multiplier of a run (loss L after compute C) is C_ref(L) / C: C_ref(L) is where the reference's
losses over its budgets come down to L, on straight lines in log C. No curve is fitted and nothing is
extrapolated: a loss beyond those of the reference has no multiplier. Above 1 the run was cheaper. Seeds are
paired: a run is held against the reference of its own seed, which saw the same text in the same order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
COSTS = {"flops": "flops_total", "wall": "train_s"}
"""What compute is measured in -> where a run's result has it."""


@dataclass(frozen=True)
class Point:
    """A finished run: what it cost, in each of :data:`COSTS`, and its loss on the validation split."""

    cost: Mapping[str, float]
    loss: float


Curve = Mapping[float, Mapping[int, Point]]
"""Budget -> seed -> point."""


def cost_at(loss: float, reference: Sequence[Point], kind: str) -> float | None:
    """Where the reference's losses come down to one; None: nowhere.

    Args:
        loss: to reach.
        reference: its runs, the smallest budget first.
        kind: of cost.
    """
    for before, after in itertools.pairwise(reference):
        if before.loss >= loss > after.loss or loss == after.loss:
            share = (before.loss - loss) / (before.loss - after.loss) if before.loss != after.loss else 1.0
            low, high = math.log(before.cost[kind]), math.log(after.cost[kind])
            return math.exp(low + share * (high - low))
    return None


def multiplier(arm: Curve, reference: Curve, budget: float, kind: str) -> dict[str, Any]:
    """The multiplier at one budget.

    Returns:
        ``per_seed`` (None: beyond the reference's losses), ``mean`` (geometric; None if a seed has none) and
        ``ci95`` of it (bootstrap over seeds; None below two seeds).
    """
    per_seed: dict[int, float | None] = {}
    for seed, point in arm.get(budget, {}).items():
        runs = [reference[b][seed] for b in sorted(reference) if seed in reference[b]]
        needed = cost_at(point.loss, runs, kind)
        per_seed[seed] = None if needed is None else needed / point.cost[kind]
    known = [x for x in per_seed.values() if x is not None]
    whole = bool(known) and len(known) == len(per_seed)
    return {
        "mean": math.exp(np.mean(np.log(known))) if whole else None,
        "ci95": interval(known) if whole else None,
        "per_seed": {str(seed): x for seed, x in per_seed.items()},
    }


def interval(values: Sequence[float]) -> list[float] | None:
    """95% percentile interval of the geometric mean: always the same resamples."""
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(0).choice(np.log(values), size=(RESAMPLES, len(values)))
    return np.exp(np.quantile(drawn.mean(axis=1), [0.025, 0.975])).tolist()


def best_fixed(curves: Mapping[str, Curve], fixed: Sequence[str], budgets: Sequence[float]) -> str:
    """By hindsight, the fixed number of loops of the least loss, mean over budgets and seeds.

    Their budgets are equal FLOPs, so that losses compare.
    """

    def mean_loss(name: str) -> float:
        losses = [p.loss for b in budgets for p in curves[name].get(b, {}).values()]
        return float(np.mean(losses)) if losses else math.inf

    return min(fixed, key=mean_loss)
