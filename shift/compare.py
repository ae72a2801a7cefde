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
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from shift.comparison.arms import SMALLEST
from shift.comparison.runs import compare_arms
from shift.comparison.verdict import caveat, verdict
from shift.config import PRESETS, TaskConfig, TrainConfig, load_config
from shift_kernels.console import command
from shift_kernels.errors import input_error
from shift_kernels.machine import default_jobs

DEFAULT_ARMS = ("single", "looped", "shift", "climb@later", "ramp", SMALLEST)
TARGETS = {"demo": 0.99}
"""Accuracies to reach in presets whose tasks have a known ceiling."""


@dataclass(frozen=True)
class Command:
    """Train the same model in several ways, and report what each needed."""

    preset: str | None = None
    """Name of a preset; "demo" is the main job."""
    config: Path | None = None
    """A TOML file like a run's config.toml."""
    task: str | None = None
    """A task of shift.tasks, or module:Class; with its own defaults where preset or config name another."""
    arms: tuple[str, ...] = DEFAULT_ARMS
    """Schedules by the names of shift.comparison.arms; looped:smallest tries T = 2, 3, ... in turn;
    ARM@scaled: with branches times 1/T."""
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


@command("shift-compare", resumable=True)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    argv = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    flags = tyro.cli(Command, args=argv, prog="shift-compare")
    results, reports = compare(flags, f"shift-compare {shlex.join(argv)}")
    print("\n".join(filter(None, [*verdict(results), caveat(results), "", *map(str, reports)])))
    return 0


def compare(command: Command, command_line: str) -> tuple[dict[str, Any], list[Path]]:
    """:func:`shift.comparison.runs.compare_arms` of what the flags say."""
    base = _base_config(command)
    out = command.out or Path("runs") / (command.preset or base.task.name)
    target = TARGETS.get(command.preset or "") if command.target is None else command.target
    return compare_arms(
        base, command.arms, command.seeds, out, target, command.overtime, command.jobs, command_line
    )


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


if __name__ == "__main__":
    sys.exit(main())
