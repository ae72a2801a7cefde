"""``shift-compare``: train the same model in several ways, and report what each needed. The main job.

    shift-compare --preset demo
    shift-compare --task parity --arms single looped shift fixed:0.25 looped:2 --seeds 0 1 2 --out runs/parity

For each seed all arms start from the same weights and see the same data in the same order. ``--out`` gets
one run directory for each arm and seed, ``results.json``, ``summary.json`` (a line a run), ``report.md``,
``report.html`` and ``figures/``.
The same command again goes on where an interrupted one stopped, and reuses what is finished.

Exit codes: 0 done; 1 failed; 2 unusable input; 75 interrupted. After 1 and 75 start again to go on.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import tyro

from shift.build import build_schedule, build_task
from shift.comparison.arms import DERIVED, MATCHED, SMALLEST, Arm, make_arm, seeded
from shift.comparison.pool import default_jobs, train_all
from shift.comparison.ratios import reached_on_all
from shift.comparison.report import write_report
from shift.comparison.results import Runs, collect, seed_facts, share_of_looped
from shift.comparison.summary import write_summary
from shift.comparison.verdict import caveat, verdict
from shift.config import PRESETS, TaskConfig, TrainConfig, differing_key, load_config
from shift.reading import read_json
from shift.run.files import json_bytes, make_directory, replace_atomically
from shift.run.record import Run, read_run
from shift_kernels import ShiftInputError
from shift_kernels.errors import input_error

INTERRUPTED = 75
PLAN = "plan.json"
DEFAULT_ARMS = ("single", "looped", "shift", "ramp", SMALLEST)
TARGETS = {"demo": 0.99}
"""Accuracies to reach in presets whose tasks have a known ceiling."""
LOOPED_SHARE = 0.98
"""Elsewhere the target is this share of Looped's mean final accuracy."""


@dataclass(frozen=True)
class Command:
    """Train the same model in several ways, and report what each needed."""

    preset: str | None = None
    """Name of a preset; "demo" is the main job."""
    config: Path | None = None
    """A TOML file like a run's config.toml."""
    task: str | None = None
    """A key of shift.tasks.TASKS; with its own defaults where preset or config name another task."""
    arms: tuple[str, ...] = DEFAULT_ARMS
    """Schedules by the names of shift.comparison.arms; looped:smallest tries T = 2, 3, ... in turn."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is a seed of the weights and of the data."""
    out: Path | None = None
    """Where everything is written; default: runs/<preset or task>."""
    steps: int | None = None
    """Optimiser steps of each run."""
    target: float | None = None
    """Accuracy to reach; default: .99 for the demo, else .98 of Looped's mean final accuracy."""
    overtime: bool = False
    """A run that is not at the target after its steps goes on until it has spent what Looped has."""
    jobs: int = dataclasses.field(default_factory=default_jobs)
    """Runs at a time, each in a process of one thread; default: one for each core."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: save, then stop
    command = tyro.cli(Command, args=argv, prog="shift-compare")
    try:
        results, reports = compare(command, f"shift-compare {shlex.join(argv)}".strip())
    except ShiftInputError as error:
        print(f"shift-compare: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # the disk is full, say
        print(f"shift-compare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("shift-compare: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    print("\n".join(filter(None, [*verdict(results), caveat(results), "", *map(str, reports)])))
    return 0


def compare(command: Command, command_line: str) -> tuple[dict[str, Any], list[Path]]:
    """Train what is not yet trained, write results and reports.

    Returns:
        The content of ``results.json`` and the paths of the two reports.

    Raises:
        ShiftInputError: unusable arguments, or run directories in ``out`` that other settings made.
    """
    base = _base_config(command)
    out = command.out or Path("runs") / (command.preset or base.task.name)
    target = TARGETS.get(command.preset or "") if command.target is None else command.target
    return compare_arms(
        base, command.arms, command.seeds, out, target, command.overtime, command.jobs, command_line
    )


def compare_arms(
    base: TrainConfig,
    names: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    target: float | None,
    overtime: bool,
    jobs: int,
    command_line: str,
) -> tuple[dict[str, Any], list[Path]]:
    """As :func:`compare`, for a config at hand.

    Args:
        base: all but the schedule and the seeds.
        names: of arms (:mod:`shift.comparison.arms`).
        seeds, out, target, overtime, jobs: see :class:`Command`.
        command_line: what the report says to type.
    """
    arms = {name: make_arm(name, base) for name in dict.fromkeys(names) if name not in DERIVED}
    _check(seeds, jobs, base, target, overtime, arms)
    make_directory(out, "shift-compare", "out")
    plan = _write_plan(out, target, command_line) | {"overtime": overtime}
    comparison = Comparison(out, seeds, jobs)

    # Two loops are tried in any case: at once, as the workers take seconds to start.
    smaller = [make_arm(f"looped:{n_loops}", base) for n_loops in range(2, base.model.n_loops)]
    smaller = smaller if SMALLEST in names else []
    comparison.train([*arms.values(), *smaller[:1]])
    if target is None:
        target = share_of_looped(comparison.runs([arms["looped"]])["looped"], LOOPED_SHARE)
    if MATCHED in names:
        arm = make_arm(f"{MATCHED}:{matched_mean(out, comparison.runs([arms['shift']])['shift'])}", base)
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

    labels = {arm.name: arm.label for arm in arms.values()}
    results = collect(comparison.runs(list(arms.values())), labels, target, plan)
    replace_atomically(out / "results.json", json_bytes(results))
    write_summary(out / "summary.json", {base.task.name: results})
    return results, write_report(results, out)


def matched_mean(out: Path, shift: Mapping[int, Run]) -> float:
    """SHIFT's loops a step, mean over steps and the seeds of the first call; later seeds join its arm."""
    path = out / PLAN
    plan = _read_plan(path)
    if MATCHED not in plan:
        steps = [
            row["n_loops"]
            for run in shift.values()
            for row in run.of_kind("train")
            if row["step"] <= run.config["steps"]
        ]
        plan[MATCHED] = round(statistics.mean(steps), 2)
        replace_atomically(path, json_bytes(plan))
    return plan[MATCHED]


@dataclass(frozen=True)
class Comparison:
    """The run directories ``out/<arm>/seed-<seed>``."""

    out: Path
    seeds: Sequence[int]
    jobs: int

    def train(self, arms: Sequence[Arm]) -> None:
        """Train the arms on all seeds; finished runs are kept. Seeds take turns, so that arms interleave."""
        every = {self._directory(arm, seed): seeded(arm, seed) for seed in self.seeds for arm in arms}
        unfinished = {path: config for path, config in every.items() if not _finished(path, config)}
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


def _finished(path: Path, config: TrainConfig) -> bool:
    """Whether the directory holds this very run, finished.

    Raises:
        ShiftInputError: it holds another one.
    """
    run = read_run(path)
    difference = differing_key(config, run.config) if run.config else None
    if difference is not None:
        key, ours, theirs = difference
        raise input_error(
            "shift-compare", key, ours, f"{theirs!r}, as in {path / 'config.toml'}",
            "Choose another --out.",
        )  # fmt: skip
    return bool(run.result)


def _base_config(command: Command) -> TrainConfig:
    """All that the arms share, but for the seeds."""
    source = command.config or command.preset
    if command.config is not None and command.preset is not None:
        raise input_error(
            "shift-compare", "config", str(command.config), "either --config or --preset", "Drop one of them."
        )
    if source is None and command.task is not None and (PRESETS / f"{command.task}.toml").is_file():
        source = command.task
    base = TrainConfig() if source is None else load_config(source)
    if command.task is not None and command.task != base.task.name:
        base = dataclasses.replace(base, task=TaskConfig(command.task))
    return base if command.steps is None else dataclasses.replace(base, steps=command.steps)


def _check(
    seeds: Sequence[int],
    jobs: int,
    base: TrainConfig,
    target: float | None,
    overtime: bool,
    arms: dict[str, Arm],
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
    if not seeds or len(set(seeds)) < len(seeds):
        raise input_error("shift-compare", "seeds", seeds, "different integers", "Change them.")
    if jobs < 1:
        raise input_error("shift-compare", "jobs", jobs, "an int >= 1", "Use 1.")


def _write_plan(out: Path, target: float | None, command_line: str) -> dict[str, str]:
    """Write down what is to be reached before the first run; a later call can't rewrite it."""
    rule = (
        f"accuracy {target:g}" if target is not None else f"{LOOPED_SHARE:g} of Looped's mean final accuracy"
    )
    path = out / PLAN
    if path.is_file():
        first = _read_plan(path)
    else:
        first = {
            "first_target_rule": rule,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        replace_atomically(path, json_bytes(first))
    return first | {"target_rule": rule, "command": command_line}


def _read_plan(path: Path) -> dict[str, Any]:
    """What an earlier call wrote down.

    Raises:
        ShiftInputError: the file was changed into something else.
    """
    plan = read_json(path, "shift-compare", "out")
    mean = plan.get(MATCHED, 1.0) if isinstance(plan, dict) else None
    texts = [plan.get(key) for key in ("first_target_rule", "created")] if isinstance(plan, dict) else []
    if not isinstance(mean, float) or mean < 1 or not all(isinstance(text, str) for text in texts):
        raise input_error(
            "shift-compare", "out", str(path), "a plan as shift-compare writes it", "Restore it."
        )
    return plan


if __name__ == "__main__":
    sys.exit(main())
