"""What a comparison says, in plain words, computed from ``results.json`` alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from shift.comparison.arms import AGAIN
from shift.comparison.ratios import reached_on_all
from shift.report.words import count, each, goal, listing, percent

EVEN = 0.05
"""Mean differences in compute up to this are called none."""

ENOUGH_SEEDS = 10
"""With fewer, the report says how little that proves: escaping the first plateau is a matter of luck."""


def mean_accuracy(seeds: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean of the final accuracies; None if no seed has one."""
    final = [seed["final_accuracy"] for seed in seeds if seed["final_accuracy"] is not None]
    return statistics.mean(final) if final else None


def verdict(results: Mapping[str, Any]) -> list[str]:
    """Sentences; the first says whether SHIFT saved compute."""
    arms = results["arms"]
    if "shift" not in arms or "looped" not in arms:
        return ["SHIFT and Looped were not both run, so this comparison says nothing about savings."]
    sentences = [_savings(results), _quality(arms), _cheaper(arms), _stopped(results), _single(results)]
    return [sentence for sentence in sentences if sentence]


def caveat(results: Mapping[str, Any]) -> str | None:
    """How little a few seeds prove; None where there are enough."""
    n = len(results["seeds"])
    if n >= ENOUGH_SEEDS:
        return None
    return (
        f"{count(n, 'seed')} prove{'s' if n == 1 else ''} little: how soon a run learns depends "
        f"much on its initial weights. Use at least {ENOUGH_SEEDS} before you rely on a difference."
    )


def _savings(results: Mapping[str, Any]) -> str:
    arms, target = results["arms"], goal(results["target_accuracy"])
    shift, looped = arms["shift"]["seeds"], arms["looped"]["seeds"]
    ratio, n = arms["shift"]["against_looped"], len(arms["shift"]["seeds"])
    hits = sum(seed["flops_to_target"] is not None for seed in shift)
    looped_hits = sum(seed["flops_to_target"] is not None for seed in looped)
    if results["target_accuracy"] is None:
        return "No Looped run finished, so there is no target to compare at and no saving can be stated."
    if hits == looped_hits == 0:
        return (
            f"Neither SHIFT nor Looped reached the target of {target} on any seed, so no saving can be "
            f"stated: on average they ended at {percent(mean_accuracy(shift))} and "
            f"{percent(mean_accuracy(looped))}."
        )
    pairs = sum(value is not None for value in ratio["per_seed"].values())
    if ratio["seeds_never"]:
        failed = {
            seed["seed"]: seed["failure"] or f"ended at {percent(seed['final_accuracy'])}" for seed in shift
        }
        reasons = "; ".join(f"seed {seed}: {failed[seed]}" for seed in ratio["seeds_never"])
        rest = f" On the other {pairs} it needed {_times(ratio)}." if pairs else ""
        return (
            f"SHIFT did not save reliably: on {len(ratio['seeds_never'])} of {count(n, 'seed')} it never "
            f"reached the target of {target}, which Looped did reach ({reasons}).{rest}"
        )
    if not pairs:
        return (
            f"SHIFT reached the target of {target} on {hits} of {count(n, 'seed')}, Looped on none of them, "
            f"so a saving has no number."
        )
    also = ""
    if ratio["seeds_only_looped_never"]:
        also = f" On seeds {listing(ratio['seeds_only_looped_never'])} only SHIFT reached it."
    elif hits < n:
        also = f" On {n - hits} of {count(n, 'seed')} neither reached it."
    where = (
        f"to the target of {target} on {pairs} of {count(n, 'seed')}"
        if pairs < n
        else f"to the target of {target}"
    )
    if ratio["mean"] > 1 + EVEN:
        return f"SHIFT did not save: {where} it needed {_times(ratio)}.{also}"
    if ratio["mean"] >= 1 - EVEN:
        return f"SHIFT did not save: {where} it needed {_times(ratio)}, which is as good as even.{also}"
    saved = f"SHIFT saved {100 * (1 - ratio['mean']):.0f}% of the compute {where}: it needed {_times(ratio)}."
    if ratio["max"] > 1:
        saved += " But the seeds disagree: on some it needed more than Looped."
    return saved + also


def _times(ratio: Mapping[str, Any]) -> str:
    pairs = [value for value in ratio["per_seed"].values() if value is not None]
    text = f"{ratio['mean']:.2f} times Looped's training compute"
    if ratio["ci95"]:
        return f"{text} on average (95% interval {ratio['ci95'][0]:.2f} to {ratio['ci95'][1]:.2f})"
    if len(pairs) > 1:
        return f"{text} on average (by seed: {each([f'{value:.2f}' for value in pairs])})"
    return text


def _quality(arms: Mapping[str, Any]) -> str:
    shift, looped = mean_accuracy(arms["shift"]["seeds"]), mean_accuracy(arms["looped"]["seeds"])
    return f"After all steps SHIFT answered {percent(shift)} right on average, Looped {percent(looped)}."


def _cheaper(arms: Mapping[str, Any]) -> str:
    """Other arms that got to the target on all seeds for less than SHIFT."""
    own = arms["shift"]["against_looped"]
    limit = own["mean"] if own["mean"] is not None and not own["seeds_never"] else 1.0
    rivals = {
        arm["label"]: arm["against_looped"]["mean"]
        for name, arm in arms.items()
        if name not in ("shift", "looped", AGAIN)
        and reached_on_all(arm["seeds"])
        and arm["against_looped"]["mean"]
    }
    cheaper = sorted((ratio, label) for label, ratio in rivals.items() if ratio < limit)
    if cheaper:
        return (
            f"Cheaper than {'SHIFT' if limit == own['mean'] else 'Looped'} to the same target on all seeds: "
            f"{listing(f'{label} ({ratio:.2f} times Looped)' for ratio, label in cheaper)}."
        )
    return "No other arm that reached the target on all seeds was cheaper than SHIFT." if rivals else ""


def _stopped(results: Mapping[str, Any]) -> str:
    row = results.get("looped_at_shift_compute", {})
    if not row.get("valid") or not row["seeds"]:
        return ""
    shift = mean_accuracy(results["arms"]["shift"]["seeds"])
    return (
        f"Looped, simply stopped when it had used as much compute as SHIFT in all, stood at "
        f"{percent(mean_accuracy(row['seeds']))} (SHIFT: {percent(shift)})."
    )


def _single(results: Mapping[str, Any]) -> str:
    if "single" not in results["arms"]:
        return ""
    seeds = results["arms"]["single"]["seeds"]
    so = ""
    if reached_on_all(seeds):
        so = ", so this task needs no loops"
    elif any(reached_on_all(arm["seeds"]) for arm in results["arms"].values()):
        so = ", so this task needs its loops"
    return f"Never looped, the same model ended at {percent(mean_accuracy(seeds))}{so}."
