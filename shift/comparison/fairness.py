"""What makes a comparison fair, checked from the run directories and not asserted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shift.build import with_absolute_paths
from shift.comparison.arms import AGAIN, Variants, declared, split
from shift.config import RESULT_FREE, TrainConfig, differing_key, flat_keys
from shift.run.record import Run, Runs

Check = dict[str, Any]
"""``rule`` (what must hold), ``ok`` and ``detail`` (the figures behind it)."""


def fairness(runs: Runs, target: float | None, plan: Mapping[str, Any]) -> list[Check]:
    """All checks, in the order in which a sceptic would ask."""
    return [
        _same_weights(runs),
        _same_hash(
            {arm: by_seed for arm, by_seed in runs.items() if arm != AGAIN},
            "Every arm sees the same data in the same order",
            "first_batches_sha256",
            "last_batches_sha256",
        ),
        _same_settings(runs, plan),
        _all_seeds(runs),
        _target_fixed(target, plan),
        _strong_baselines(runs),
        _same_environment(runs),
    ]


def _same_weights(runs: Runs) -> Check:
    """A variant may have weights that others have not, so its arms are held against each other."""
    by_variant: dict[str, dict[str, Any]] = {}
    for arm, by_seed in runs.items():
        by_variant.setdefault(split(arm)[2], {})[arm] = by_seed
    rule = "Every arm starts from the same initial weights"
    checks = {v: _same_hash(found, rule, "initial_weights_sha256") for v, found in by_variant.items()}
    detail = "; ".join((f"{v}: " if v else "") + check["detail"] for v, check in checks.items())
    return {"rule": rule, "ok": all(check["ok"] for check in checks.values()), "detail": detail}


def _same_hash(runs: Runs, rule: str, *keys: str) -> Check:
    details, ok = [], True
    for seed, by_arm in _by_seed(runs).items():
        found: dict[tuple[str, ...], list[str]] = {}
        for arm, run in by_arm.items():
            if run.result:
                found.setdefault(tuple(run.result[key] for key in keys), []).append(arm)
        ok &= len(found) == 1
        words = [f"{'/'.join(h[:8] for h in hashes)} ({', '.join(arms)})" for hashes, arms in found.items()]
        details.append(f"seed {seed}: " + (words[0].split(" ")[0] if len(found) == 1 else "; ".join(words)))
    return {"rule": rule, "ok": ok, "detail": "sha256 " + ", ".join(details)}


def _same_settings(runs: Runs, plan: Mapping[str, Any]) -> Check:
    """One config but for the schedule, the seeds, tuned learning rates, and what a variant declares."""
    rates, variants = plan.get("rates", {}), plan.get("variants", {})
    by_variant = sorted(runs.items(), key=lambda item: bool(split(item[0])[2]))  # plain arms first
    configs = [
        (arm, _without_arm(run.config, tuned=bool(rates)))
        for arm, by_seed in by_variant
        for run in by_seed.values()
        if run.config
    ]
    found = {
        differing_key(configs[0][1], config.to_dict(), (*RESULT_FREE, *_varied(arm, variants)))
        for arm, config in configs
    }
    differing = sorted({difference[0] for difference in found if difference is not None})
    allowed = "only the schedule differs"
    if rates:
        each = ", ".join(f"{arm} {lr:g}" for arm, lr in sorted(rates.items()))
        allowed += f", and the learning rate, tuned for each arm alike on other seeds: {each}"
    used = {variant: None for arm in runs if (variant := split(arm)[2])}
    if used:
        each = "; ".join(f"{name}: {_words(variants.get(name, {}))}" for name in used)
        allowed += f"; and what a variant says: {each}"
    return {
        "rule": "Same model, optimiser, learning rate (or its tuning), batch and number of steps",
        "ok": not differing,
        "detail": f"they differ in {', '.join(differing)}" if differing else allowed,
    }


def _varied(arm: str, variants: Variants) -> dict[str, Any]:
    """What the arm's variant changes, by dotted keys."""
    return flat_keys(variants.get(split(arm)[2], {}))


def _words(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in flat_keys(changes).items())


def _without_arm(config: Mapping[str, Any], tuned: bool) -> TrainConfig:
    """What all runs of a comparison must share."""
    task = {**config["task"], "seed": 0}
    optimiser = {key: value for key, value in config["optimiser"].items() if not (tuned and key == "lr")}
    shared = {**config, "task": task, "seed": 0, "schedule": {}, "optimiser": optimiser}
    return with_absolute_paths(TrainConfig.from_dict(shared))


def _all_seeds(runs: Runs) -> Check:
    seeds = {seed for by_seed in runs.values() for seed in by_seed}
    missing = [
        f"{arm} seed {seed}"
        for arm, by_seed in runs.items()
        for seed in sorted(seeds)
        if seed not in by_seed or not by_seed[seed].result
    ]
    detail = "missing or not finished: " + ", ".join(missing) if missing else f"{len(seeds)} seeds, every arm"
    return {"rule": "Every seed of every arm is finished and shown", "ok": not missing, "detail": detail}


def _target_fixed(target: float | None, plan: Mapping[str, Any]) -> Check:
    """The target, or the rule that gives it, is the one written down before the first run."""
    ok = plan["target_rule"] == plan["first_target_rule"]
    detail = f"{plan['first_target_rule']}, written down before the first run"
    return {
        "rule": "The target was fixed beforehand",
        "ok": ok and target is not None,
        "detail": detail if ok else f"{detail}; this report uses: {plan['target_rule']}",
    }


def _strong_baselines(runs: Runs) -> Check:
    config = next((run.config for by_seed in runs.values() for run in by_seed.values() if run.config), None)
    absent = []
    if "looped" not in runs:
        absent.append("Looped")
    if config and config["model"]["n_loops"] > 2 and not any(name.startswith("looped:") for name in runs):
        absent.append("Looped with fewer loops")
    if not any(declared(name).decided_by == "time" for name in runs):
        absent.append("a schedule without a criterion (a ramp or a fixed switch)")
    found = "Looped, Looped with fewer loops, and a schedule without a criterion were run"
    return {
        "rule": "The strong baselines are there",
        "ok": not absent,
        "detail": "not run: " + ", ".join(absent) if absent else found,
    }


def _same_environment(runs: Runs) -> Check:
    results = [run.result for by_seed in runs.values() for run in by_seed.values() if run.result]
    keys = ("machine", "versions", "commit")
    differing = [key for key in keys if any(result[key] != results[0][key] for result in results)]
    return {
        "rule": "All runs come from one machine and one version of the code",
        "ok": not differing,
        "detail": f"they differ in {', '.join(differing)}"
        if differing
        else "machine, versions, commit agree",
    }


def _by_seed(runs: Runs) -> dict[int, dict[str, Run]]:
    turned: dict[int, dict[str, Run]] = {}
    for arm, by_seed in runs.items():
        for seed, run in by_seed.items():
            turned.setdefault(seed, {})[arm] = run
    return turned
