"""The compute of one arm held against that of Looped, seed by seed. "Never" is an outcome, not a gap.

The entries of ``arms.<name>.seeds`` that come in are those of :func:`shift.comparison.results.seed_facts`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shift.comparison.arms import split

CI_PAIRS = 5
"""Fewer pairs of seeds than this have no interval worth printing."""

Seeds = Sequence[Mapping[str, Any]]


def against_looped(arm: Seeds, looped: Seeds) -> dict[str, Any]:
    """Compute to the target over Looped's of the same seed.

    Returns:
        ``per_seed`` (a ratio, or None where one of the two never got there); ``mean``, ``min`` and ``max``
        over the seeds where both did, and ``ratio_of_means`` over the same seeds; ``median`` over the seeds
        where Looped did, with the arm's "never" as infinity (None: it is infinite); ``ci95`` of the mean
        (bootstrap; None below :data:`CI_PAIRS` pairs); ``seeds_never`` and ``seeds_only_looped_never``, the
        seeds where only the arm, and only Looped, never got there; ``seeds_late``, those where Looped did and
        the arm did only after its steps.
    """
    base = {seed["seed"]: seed["flops_to_target"] for seed in looped}
    cost = {seed["seed"]: seed["flops_to_target"] for seed in arm if seed["seed"] in base}
    both = [s for s in cost if cost[s] is not None and base[s] is not None]
    ratios = {s: cost[s] / base[s] for s in both}
    pairs = list(ratios.values())
    never = [s for s in cost if cost[s] is None and base[s] is not None]
    with_never = pairs + [math.inf] * len(never)
    median = statistics.median(with_never) if with_never else math.inf
    return {
        "per_seed": {str(s): ratios.get(s) for s in cost},
        "mean": statistics.mean(pairs) if pairs else None,
        "min": min(pairs, default=None),
        "max": max(pairs, default=None),
        "ratio_of_means": sum(cost[s] for s in both) / sum(base[s] for s in both) if both else None,
        "median": median if math.isfinite(median) else None,
        "ci95": _bootstrap_interval(pairs) if len(pairs) >= CI_PAIRS else None,
        "seeds_never": never,
        "seeds_late": [s["seed"] for s in arm if s["late"] and s["seed"] in both],
        "seeds_only_looped_never": [s for s in cost if cost[s] is not None and base[s] is None],
    }


def stopped_at(looped: Seeds, budgets: Mapping[int, float]) -> list[dict[str, Any]]:
    """Looped as it stood at a budget of training FLOPs, by seed: on a line between its evaluations.

    That is what Looped would have been, given no more: true only under a learning rate that does not depend
    on the number of steps to come. Seeds without a budget or an evaluation are left out; a budget beyond
    Looped's own end is that end.
    """
    stopped = []
    for facts in looped:
        seed, curve, cost = facts["seed"], facts["curve"], facts["flops_to_target"]
        if seed in budgets and curve["flops"]:
            spent = min(budgets[seed], curve["flops"][-1])
            stopped.append(
                {
                    "seed": seed,
                    "budget_flops": budgets[seed],
                    "flops_total": spent,
                    "step": round(float(np.interp(spent, curve["flops"], curve["step"]))),
                    "final_accuracy": float(np.interp(spent, curve["flops"], curve["accuracy"])),
                    "flops_to_target": cost if cost is not None and cost <= budgets[seed] else None,
                }
            )
    return stopped


def smallest_sufficient(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The smallest constant number of loops among the arms that reached the target on all seeds.

    Returns:
        ``tried`` (all constant numbers of loops among the arms), ``n_loops`` and ``arm`` (None: none did).
    """
    constant = {
        arm["n_loops"]: name
        for name, arm in arms.items()
        if arm["n_loops"] is not None and _is_plainly_constant(name)
    }
    enough = [t for t, name in constant.items() if reached_on_all(arms[name]["seeds"])]
    best = min(enough, default=None)
    return {"tried": sorted(constant), "n_loops": best, "arm": None if best is None else constant[best]}


def _is_plainly_constant(name: str) -> bool:
    family, _, variant = split(name)
    return family in ("single", "looped") and not variant


def reached_on_all(seeds: Seeds) -> bool:
    """Whether every seed got to the target."""
    return all(seed["flops_to_target"] is not None for seed in seeds)


def _bootstrap_interval(values: Sequence[float]) -> list[float]:
    """95% percentile interval of the mean: 10,000 resamples, always the same ones."""
    draws = np.random.default_rng(0).choice(values, size=(10_000, len(values)))
    return np.quantile(draws.mean(axis=1), [0.025, 0.975]).tolist()
