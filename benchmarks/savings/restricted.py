"""The restricted mean: compute to the target in which no run is left out.

    cost of a run = its compute to the target, and what Looped of its seed spent in all if it never got there
    of a task     = mean over seeds of an arm's costs / mean over seeds of the rival's
    of a suite    = mean over tasks

A mean over the seeds on which both got there drops just the runs that went wrong; here each of them counts as
much as Looped's whole run: the restricted mean of survival analysis, with Looped's spend as the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.savings.families import Results, arm_names, arm_of
from benchmarks.savings.paired import best_fixed_switch, best_of
from shift.comparison.arms import AGAIN, declared

DRAWS = 10_000
"""Of the bootstrap: tasks are drawn, and seeds of each drawn task, the same seeds for both arms."""

Choice = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
"""The arm to look at in one task's results; None: there is none."""


def named(name: str) -> Choice:
    """The arm of this name on every task."""
    return lambda r: arm_of(r, name)


LOOPED = named("looped")


def best_fixed(r: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The best fixed switch of a task, known with hindsight alone."""
    best = best_fixed_switch(r["arms"])
    return r["arms"][best] if best else None


def oracle(r: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The best arm of all of a task, known with hindsight alone."""
    best = best_of((name for name in r["arms"] if name != AGAIN), r["arms"])
    return r["arms"][best] if best else None


def best_t(r: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The best constant number of loops of a task, in any variant, known with hindsight alone."""
    constant = (name for name, arm in r["arms"].items() if arm["n_loops"] is not None and name != AGAIN)
    best = best_of(constant, r["arms"])
    return r["arms"][best] if best else None


def costs(r: Mapping[str, Any], choice: Choice, measure: str = "flops") -> np.ndarray | None:
    """Restricted costs of an arm on one task, float64 [seeds of Looped]; None: not run on all.

    Args:
        r: a task's results.
        choice: the arm.
        measure: ``flops``; or ``cpu_s``, ``wall_s``, ``quiet_s`` (``benchmarks.savings.quiet``) for seconds.
    """
    total = "flops_total" if measure == "flops" else measure
    spent = {s["seed"]: s.get(total) for s in r["arms"]["looped"]["seeds"]}
    arm = choice(r)
    reached = {s["seed"]: s.get(f"{measure}_to_target") for s in arm["seeds"]} if arm else {}
    if not spent.keys() <= reached.keys() or None in spent.values():
        return None
    return np.array([min(spent[s], np.inf if reached[s] is None else reached[s]) for s in sorted(spent)])


def restricted_mean(
    results: Results, choice: Choice, rival: Choice = LOOPED, measure: str = "flops"
) -> tuple[float, tuple[float, float]] | None:
    """The restricted mean of an arm over that of a rival, and its 95% bootstrap interval.

    Returns:
        None where the arm was run on no task. Tasks without it are left out.
    """
    pairs = [
        (own, theirs)
        for r in results.values()
        if (own := costs(r, choice, measure)) is not None and (theirs := costs(r, rival, measure)) is not None
    ]
    if not pairs:
        return None
    value = float(np.mean([own.mean() / theirs.mean() for own, theirs in pairs]))
    random = np.random.default_rng(0)
    drawn = np.zeros(DRAWS)
    for _ in pairs:
        task = random.integers(len(pairs), size=DRAWS)
        for i, (own, theirs) in enumerate(pairs):
            seeds = random.integers(len(own), size=(int((task == i).sum()), len(own)))
            drawn[task == i] += own[seeds].mean(1) / theirs[seeds].mean(1)
    low, high = np.quantile(drawn / len(pairs), [0.025, 0.975])
    return value, (float(low), float(high))


def headline(results: Results) -> dict[str, Any]:
    """The one automatic schedule: the best of ours on the tuning tasks, reported on all.

    Returns:
        ``arm``, ``restricted_mean`` and its ``interval``, ``lost`` (runs that it lost and Looped won),
        ``lost_looped_other_data`` (what chance alone loses), the restricted means of the best fixed
        switch and of the best arm of all by hindsight, ``best_fixed_by_hindsight`` and ``oracle``, and
        ``over_best_t``: the arm's over the best constant number of loops, where that is smaller than T.
        Nothing where no schedule of ours was run.
    """
    tuning = {task: r for task, r in results.items() if r["used_for"] == "tuning"} or results
    ours = [name for name in arm_names(results) if not declared(name).baseline]
    ranked = {name: found[0] for name in ours if (found := restricted_mean(tuning, named(name)))}
    if not ranked:
        return {}
    arm = min(ranked, key=ranked.__getitem__)
    found = restricted_mean(results, named(arm))
    assert found is not None, "it was run on the tuning tasks"
    fewer = {
        task: r
        for task, r in results.items()
        if (t := best_t(r)) and t["n_loops"] < r["config"]["model"]["n_loops"]
    }
    return {
        "arm": arm,
        "restricted_mean": found[0],
        "interval": list(found[1]),
        "lost": lost(results, arm),
        "lost_looped_other_data": lost(results, AGAIN),
        "best_fixed_by_hindsight": _value(restricted_mean(results, best_fixed)),
        "oracle": _value(restricted_mean(results, oracle)),
        "over_best_t": _value(restricted_mean(fewer, named(arm), best_t)),
    }


def lost(results: Results, name: str) -> int:
    """Runs that Looped won and the arm did not, over all tasks."""
    found = [arm for r in results.values() if (arm := arm_of(r, name))]
    return sum(len(arm["against_looped"]["seeds_never"]) for arm in found)


def _value(found: tuple[float, tuple[float, float]] | None) -> float | None:
    return None if found is None else found[0]
