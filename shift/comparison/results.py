"""From run directories to the content of ``results.json``: what each run reached and at what cost.

The rule for "reached the target": the first evaluation whose accuracy is at or above it. Its cost is the
training FLOPs up to there. A run that never gets there, or did not finish, counts as never, and is shown.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shift.build import build_schedule
from shift.comparison.fairness import fairness
from shift.comparison.ratios import against_looped, smallest_sufficient, stopped_at
from shift.config import TrainConfig
from shift.run.record import Run, Runs
from shift.schedules.registry import SCHEDULES, switch_step

SCHEMA_VERSION = 1
CROSSING_RULE = "the first evaluation whose accuracy is at or above the target"


def first_crossing(evals: Sequence[Mapping[str, Any]], target: float) -> Mapping[str, Any] | None:
    """The first evaluation of a trained model at or above the target accuracy; None: never."""
    return next((row for row in evals if row["step"] > 0 and row["accuracy"] >= target), None)


def share_of_looped(looped: Mapping[int, Run], share: float) -> float | None:
    """``share`` of the mean final accuracy of the Looped runs; None if none of them finished."""
    final = [run.of_kind("eval")[-1]["accuracy"] for run in looped.values() if run.result]
    return share * statistics.mean(final) if final else None


def seed_facts(run: Run, seed: int, target: float | None) -> dict[str, Any]:
    """One entry of ``arms.<name>.seeds``; no run reaches a target of None."""
    evals, train, result = run.of_kind("eval"), run.of_kind("train"), run.result
    last: Mapping[str, Any] = evals[-1] if evals else {}
    crossing = (first_crossing(evals, target) if result and target is not None else None) or {}
    clocks = next((row for row in run.timing if row["step"] == crossing.get("step")), {})
    return {
        "seed": seed,
        "failure": run.failure,
        "final_accuracy": last.get("accuracy"),
        "final_exact": last.get("exact"),
        "final_loss": last.get("loss"),
        "final_groups": last.get("groups", {}),
        "flops_total": train[-1]["flops"] if train else 0,
        "block_applications": train[-1]["block_applications"] if train else 0,
        "steps_to_target": crossing.get("step"),
        "late": crossing.get("step", 0) > run.config.get("steps", 0),
        "flops_to_target": crossing.get("flops"),
        "block_applications_to_target": crossing.get("block_applications"),
        "wall_s_to_target": clocks.get("wall_s"),
        "cpu_s_to_target": clocks.get("cpu_s"),
        "wall_s": result.get("wall_s"),
        "cpu_s": result.get("cpu_s"),
        "switch_step": _switch_step(run.config, train),
        "final_loops": train[-1]["n_loops"] if train else None,
        "switch_ms": result.get("switch_ms"),
        "skipped_steps": sum(row["skipped"] for row in train),
        "initial_weights_sha256": result.get("initial_weights_sha256"),
        "first_batches_sha256": result.get("first_batches_sha256"),
        "last_batches_sha256": result.get("last_batches_sha256"),
        "curve": {key: [row[key] for row in evals] for key in ("step", "flops", "loss", "accuracy")},
        "loops": _stretches((row["step"], row["n_loops"]) for row in train),
        "looks": [{k: v for k, v in row.items() if k != "kind"} for row in run.of_kind("look")],
    }


def collect(
    runs: Runs, labels: Mapping[str, str], target: float | None, plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything the report is made of.

    Args:
        runs: all runs; the same seeds for every arm.
        labels: the arms' names in words.
        target: accuracy to reach.
        plan: what was written down before the first run (see :mod:`shift.comparison.plan`).

    Returns:
        The content of ``results.json``.
    """
    arms = {}
    for name, by_seed in runs.items():
        config = next((run.config for run in by_seed.values() if run.config), {})
        arms[name] = {
            "label": labels[name],
            "schedule": config.get("schedule", {}),
            "n_loops": _constant_loops(config),
            "criterion": _criterion(config),
            "seeds": [seed_facts(run, seed, target) for seed, run in by_seed.items()],
        }
    if "looped" in arms:
        for arm in arms.values():
            arm["against_looped"] = against_looped(arm["seeds"], arms["looped"]["seeds"])
    every_run = [run for by_seed in runs.values() for run in by_seed.values()]
    config = next((run.config for run in every_run if run.config), {})
    result = next((run.result for run in every_run if run.result), {})
    results = {
        "schema_version": SCHEMA_VERSION,
        "task": config.get("task", {}),
        "config": {k: v for k, v in config.items() if k not in ("task", "schedule", "seed", "min_flops")},
        "seeds": sorted({seed for by_seed in runs.values() for seed in by_seed}),
        "target_accuracy": target,
        "crossing_rule": CROSSING_RULE,
        "plan": dict(plan),
        "arms": arms,
        "smallest_sufficient": smallest_sufficient(arms),
        "fairness": fairness(runs, target, plan),
    } | {key: result.get(key) for key in ("machine", "versions", "commit")}
    if "shift" in arms and "looped" in arms:
        budgets = {seed["seed"]: seed["flops_total"] for seed in arms["shift"]["seeds"]}
        results["looped_at_shift_compute"] = {
            "valid": config.get("optimiser", {}).get("lr_schedule") == "constant",
            "seeds": stopped_at(arms["looped"]["seeds"], budgets),
        }
    return results


def _switch_step(config: Mapping[str, Any], train: Sequence[Mapping[str, Any]]) -> int | None:
    """From the rows, so that it is right for runs that stopped early, too."""
    return switch_step(config["schedule"]["kind"], [row["n_loops"] for row in train]) if train else None


def _constant_loops(config: Mapping[str, Any]) -> int | None:
    """The number of loops of an arm that never changes it."""
    if not config or SCHEDULES[config["schedule"]["kind"]].decided_by != "nothing":
        return None
    return build_schedule(TrainConfig.from_dict(config)).max_loops


def _criterion(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The criterion's options, defaults included, of an arm that has one."""
    scp = build_schedule(TrainConfig.from_dict(config)).scp if config else None
    return None if scp is None else dataclasses.asdict(scp)


def _stretches(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """[first step, number of loops] of each stretch of steps with the same number of loops."""
    return [[next(group)[0], n_loops] for n_loops, group in itertools.groupby(pairs, key=lambda p: p[1])]
