"""A comparison from its arms to its report: what to train, in which order, and where the runs lie."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shift.build import build_schedule, build_task, with_absolute_paths
from shift.comparison.arms import (
    DERIVED,
    MATCHED,
    SMALLEST,
    Arm,
    Rates,
    Variants,
    make_arm,
    seeded,
    used_variants,
)
from shift.comparison.plan import LOOPED_SHARE, alone_in, matched_mean, write_plan
from shift.comparison.pool import train_all
from shift.comparison.ratios import reached_on_all
from shift.comparison.report import write_report
from shift.comparison.results import collect, seed_facts, share_of_looped
from shift.comparison.summary import write_summary
from shift.config import TrainConfig, differing_key
from shift.run.files import json_bytes, replace_atomically
from shift.run.record import Runs, read_run
from shift_kernels.errors import input_error


def compare_arms(
    base: TrainConfig,
    names: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    target: float | None,
    overtime: bool,
    jobs: int,
    command_line: str,
    rates: Rates | None = None,
    variants: Variants | None = None,
) -> tuple[dict[str, Any], list[Path]]:
    """Train what is not yet trained, write results and reports.

    Args:
        base: all but the schedule and the seeds.
        names: of arms (:mod:`shift.comparison.arms`).
        seeds: of the weights and of the data; different ones.
        out: directory for everything.
        target: accuracy to reach, in (0, 1]; None: :data:`shift.comparison.plan.LOOPED_SHARE` of Looped's.
        overtime: a run that is not at the target after its steps goes on until it has spent what Looped has.
        jobs: runs at a time.
        command_line: what the report says to type.
        rates: learning rates of arms that have one of their own, found on other seeds.
        variants: that arms may name, besides :data:`shift.comparison.arms.VARIANTS`.

    Returns:
        The content of ``results.json`` and the paths of the two reports.

    Raises:
        ShiftInputError: unusable arguments, run directories in ``out`` that other settings made, or another
            process that compares in ``out``.
    """
    arms = {
        name: make_arm(name, base, rates, variants) for name in dict.fromkeys(names) if name not in DERIVED
    }
    _check(seeds, jobs, base, target, overtime, names, arms)
    with alone_in(out):
        plan = write_plan(out, target, command_line) | {
            "overtime": overtime,
            "rates": dict(rates or {}),
            "variants": used_variants(arms, variants),
        }
        comparison = Comparison(out, seeds, jobs)
        target = _train(comparison, base, names, arms, target, overtime, rates)
        labels = {arm.name: arm.label for arm in arms.values()}
        results = collect(comparison.runs(list(arms.values())), labels, target, plan)
        replace_atomically(out / "results.json", json_bytes(results))
        write_summary(out / "summary.json", {base.task.name: results})
        return results, write_report(results, out)


def _train(
    comparison: Comparison,
    base: TrainConfig,
    names: Sequence[str],
    arms: dict[str, Arm],
    target: float | None,
    overtime: bool,
    rates: Rates | None,
) -> float | None:
    """Train all arms, and add those to ``arms`` that are known only on the way; returns the target."""
    # Two loops are tried in any case: at once, as the workers take seconds to start.
    smaller = [make_arm(f"looped:{n_loops}", base, rates) for n_loops in range(2, base.model.n_loops)]
    smaller = smaller if SMALLEST in names else []
    comparison.train([*arms.values(), *smaller[:1]])
    if target is None:
        target = share_of_looped(comparison.runs([arms["looped"]])["looped"], LOOPED_SHARE)
    if MATCHED in names:
        mean = matched_mean(comparison.out, comparison.runs([arms["shift"]])["shift"])
        arm = make_arm(f"{MATCHED}:{mean}", base, rates)
        arms[arm.name] = arm
        comparison.train([arm])
    if overtime:
        comparison.go_on(list(arms.values()), arms["looped"], target)
    for arm in smaller:
        arms[arm.name] = arm
        comparison.train([arm])
        if overtime:
            comparison.go_on([arm], arms["looped"], target)
        tried = comparison.runs([arm])[arm.name]
        if reached_on_all([seed_facts(run, seed, target) for seed, run in tried.items()]):
            break
    return target


@dataclass(frozen=True)
class Comparison:
    """The run directories ``out/<arm>/seed-<seed>``."""

    out: Path
    seeds: Sequence[int]
    jobs: int

    def train(self, arms: Sequence[Arm]) -> None:
        """Train the arms on all seeds; finished runs are kept. Seeds take turns, so that arms interleave."""
        every = {self._directory(arm, seed): seeded(arm, seed) for seed in self.seeds for arm in arms}
        unfinished = {path: config for path, config in every.items() if not finished(path, config)}
        train_all(unfinished, self.jobs)

    def go_on(self, arms: Sequence[Arm], looped: Arm, target: float | None) -> None:
        """Train the runs that are not at the target until they have spent what Looped of their seed has."""
        budgets = {
            seed: run.result.get("flops_total", 0) for seed, run in self.runs([looped])[looped.name].items()
        }
        unfinished = {}
        for arm in arms:
            for seed, run in self.runs([arm])[arm.name].items():
                missed = seed_facts(run, seed, target)["flops_to_target"] is None
                if run.result and missed and run.result.get("flops_total", 0) < budgets[seed]:
                    config = dataclasses.replace(seeded(arm, seed), min_flops=math.ceil(budgets[seed]))
                    unfinished[self._directory(arm, seed)] = config
        train_all(unfinished, self.jobs)

    def runs(self, arms: Sequence[Arm]) -> Runs:
        """What the arms' run directories hold."""
        return {arm.name: {seed: read_run(self._directory(arm, seed)) for seed in self.seeds} for arm in arms}

    def _directory(self, arm: Arm, seed: int) -> Path:
        return self.out / arm.directory / f"seed-{seed}"


def finished(path: Path, config: TrainConfig) -> bool:
    """Whether the directory holds this very run, finished.

    Raises:
        ShiftInputError: it holds another one.
    """
    run = read_run(path)
    difference = None
    if run.config:  # of an older version perhaps, with a path as it was given
        theirs = with_absolute_paths(TrainConfig.from_dict(run.config))
        difference = differing_key(with_absolute_paths(config), theirs.to_dict())
    if difference is not None:
        key, ours, theirs = difference
        raise input_error(
            "shift-compare", key, ours, f"{theirs!r}, as in {path / 'config.toml'}",
            "Choose another --out.",
        )  # fmt: skip
    return bool(run.result)


def _check(
    seeds: Sequence[int],
    jobs: int,
    base: TrainConfig,
    target: float | None,
    overtime: bool,
    names: Sequence[str],
    arms: Mapping[str, Arm],
) -> None:
    """Find what is wrong before hours are spent."""
    build_task(base)
    for arm in arms.values():
        build_schedule(arm.config)
    if target is not None and not 0 < target <= 1:
        raise input_error("shift-compare", "target", target, "an accuracy in (0, 1]", "99% is 0.99.")
    if target is None and "looped" not in arms:
        raise input_error(
            "shift-compare", "target", None, "an accuracy in (0, 1]", "Give one, or add the arm looped."
        )
    if overtime and ("looped" not in arms or base.optimiser.lr_schedule != "constant"):
        allowed = "False without the arm looped, or with a learning rate that decays towards the last step"
        raise input_error("shift-compare", "overtime", overtime, allowed, "Drop it.")
    if MATCHED in names and "shift" not in arms:
        raise input_error("shift-compare", "arms", MATCHED, f"{MATCHED} together with shift", "Add shift.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise input_error("shift-compare", "seeds", seeds, "different integers", "Change them.")
    if jobs < 1:
        raise input_error("shift-compare", "jobs", jobs, "an int >= 1", "Use 1.")
