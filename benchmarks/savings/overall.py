"""One arm over all tasks: its cost on average, what it loses, whether hindsight would have done better."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.savings.families import Results, arm_of, label
from benchmarks.savings.paired import best_fixed_switch, best_of, costs, dearness, p_cheaper
from shift.comparison.arms import AGAIN
from shift.report.words import count


def overall(results: Results, name: str) -> str:
    """The arm's sum in a sentence or two; tasks without it are left out."""
    found = {task: (r, arm) for task, r in results.items() if (arm := arm_of(r, name))}
    lost, late = (
        sum(len(arm["against_looped"][key]) for _, arm in found.values())
        for key in ("seeds_never", "seeds_late")
    )
    won = sum(s["flops_to_target"] is not None for r, _ in found.values() for s in _looped(r))
    only = sum(len(arm["against_looped"]["seeds_only_looped_never"]) for _, arm in found.values())
    means: dict[str, list[float]] = {}
    for r, arm in found.values():
        if arm["against_looped"]["mean"] is not None:
            means.setdefault(r["used_for"], []).append(arm["against_looped"]["mean"])
    known = [mean for of_kind in means.values() for mean in of_kind]
    kinds = ", ".join(f"{used_for} {statistics.mean(of_kind):.2f}" for used_for, of_kind in means.items())
    ratio = "never where Looped got there"
    if known:
        ratio = f"{statistics.mean(known):.2f} of Looped's compute ({kinds}), {count(len(known), 'task')}"
    pairs = [(arm, r["arms"][best]) for r, arm in found.values() if (best := best_fixed_switch(r["arms"]))]
    as_good = sum(dearness(arm["seeds"]) <= dearness(fixed["seeds"]) for arm, fixed in pairs)
    fixed_means = [m for _, fixed in pairs if (m := fixed["against_looped"]["mean"]) is not None]
    fixed_lost = sum(len(fixed["against_looped"]["seeds_never"]) for _, fixed in pairs)
    rival = "no fixed switch got there"
    if fixed_means:
        rival = f"{statistics.mean(fixed_means):.2f} on {count(len(fixed_means), 'task')}, {fixed_lost} lost"
    tests = pooled(results, name, "looped"), pooled(results, name)
    return (
        f"{label(results, name)}: {ratio}. Of {count(won, 'run')} in which Looped got there it lost {lost} "
        f"and was late in {late}; of those in which Looped did not it won {only}. Each task's best fixed "
        f"switch by hindsight: {rival}; at least as good as it on {as_good} of {count(len(pairs), 'task')}. "
        f"Over the seeds of all tasks p = {tests[0]:.2g} for cheaper than Looped, and {tests[1]:.2g} for "
        f"cheaper than each task's best fixed switch."
    )


def hindsight(results: Results) -> str:
    """The compute of each task's best arm of all, which is known with hindsight alone."""
    means, lost = [], 0
    for r in results.values():
        best = best_of((name for name in r["arms"] if name != AGAIN), r["arms"])
        against = r["arms"][best]["against_looped"] if best else {"mean": None}
        if against["mean"] is not None:
            means.append(against["mean"])
            lost += len(against["seeds_never"])
    if not means:
        return "No arm got there on any task."
    return (
        f"Each task's best arm of all by hindsight: {statistics.mean(means):.2f} of Looped's compute on "
        f"{count(len(means), 'task')}, {lost} lost."
    )


def pooled(results: Results, name: str, other: str | None = None) -> float:
    """:func:`p_cheaper` over the seeds of all tasks; ``other`` None: each task's best fixed switch."""
    own: dict[tuple[str, int], float] = {}
    theirs: dict[tuple[str, int], float] = {}
    for task, r in results.items():
        rival = other or best_fixed_switch(r["arms"])
        if name in r["arms"] and rival is not None:
            own |= {(task, seed): c for seed, c in costs(r["arms"][name]["seeds"]).items()}
            theirs |= {(task, seed): c for seed, c in costs(r["arms"][rival]["seeds"]).items()}
    return p_cheaper(own, theirs)


def _looped(r: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return r["arms"]["looped"]["seeds"]
