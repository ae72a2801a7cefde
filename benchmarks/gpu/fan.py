"""The tasks of Fan et al. (arXiv 2409.15647) at their budget: does each way to train generalise in length?

    while python -m benchmarks.gpu.fan --out runs/fan; [ $? = 75 ]; do :; done

Each call trains for ``--seconds`` at most and leaves checkpoints; it ends with code 75 while there is work
left, and with 0 when all is trained and measured. Arms differ in their schedule alone. ``out/<task>`` gets
the run directories ``<arm>/seed-<n>`` and, when its last run is done, ``benchmarks.length.report``'s tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.length.report import measure, write
from shift.comparison.arms import make_arm, seeded
from shift.config import TaskConfig, TrainConfig, load_config
from shift.length.sweep import SweepConfig
from shift.run.record import FAILURE
from shift.run.trainer import Trainer, TrainingDiverged, TrainingInterrupted
from shift_kernels.console import INTERRUPTED, command

SIZES: dict[str, dict[str, Any]] = {
    "parity": dict(n_layers=1, n_heads=64, max_length=20, n_loops=20, curriculum_interval=500),
    "copy": dict(n_layers=2, n_heads=8, max_length=19, n_loops=19, curriculum_interval=1000),
    "addition": dict(n_layers=3, n_heads=8, max_length=19, n_loops=19, curriculum_interval=1600),
    "binary_sum": dict(n_layers=2, n_heads=16, max_length=19, n_loops=19, curriculum_interval=500),
    "multiplication": dict(n_layers=4, n_heads=8, max_length=11, n_loops=22, curriculum_interval=500),
    "unique_set": dict(n_layers=3, n_heads=8, max_length=19, n_loops=19, curriculum_interval=1000),
}
"""In what their tasks differ; the rest is the preset ``fan_parity``."""

ARMS = ("single", "looped", "shift", "climb")


def task_config(task: str, backend: str = "auto") -> TrainConfig:
    """Their configuration of a task."""
    base, size = load_config("fan_parity"), dict(SIZES[task])
    options = {key: size.pop(key) for key in ("max_length", "curriculum_interval")}
    return dataclasses.replace(
        base,
        task=TaskConfig(task, options=options),
        model=dataclasses.replace(base.model, **size),
        backend=backend,
    )


def train(config: TrainConfig, run_dir: Path, deadline: float) -> bool:
    """Go on with a run until it is done or ``time.monotonic()`` is past the deadline; whether it is done.

    A run that diverges is done, and says why in :data:`shift.run.record.FAILURE`.
    """
    if time.monotonic() >= deadline:
        return False
    trainer = Trainer(config, run_dir, resume=True)

    def watch(_step: int, _total: int) -> None:
        if time.monotonic() >= deadline:
            trainer.stop()

    try:
        trainer.fit(watch)
    except TrainingInterrupted:
        return False
    except TrainingDiverged as error:
        (run_dir / FAILURE).write_text(f"diverged: {error}", encoding="utf-8")
    return True


def run(
    configs: Mapping[str, TrainConfig],
    arms: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    seconds: float,
    command: str,
) -> int:
    """Train and measure what is left, task by task; returns the exit code.

    Args:
        configs: by task; all but schedule and seeds.
        arms: names of :mod:`shift.comparison.arms`.
        seeds: of weights and data.
        out: directory for everything.
        seconds: after which training stops. A measurement under way is finished.
        command: what the reports say to type.
    """
    deadline = time.monotonic() + seconds
    for task, config in configs.items():
        runs = {
            out / task / arm.directory / f"seed-{seed}": seeded(arm, seed)
            for seed in seeds
            for arm in (make_arm(name, config) for name in arms)
        }
        left = {
            path: own
            for path, own in runs.items()
            if not any((path / name).is_file() for name in ("result.json", FAILURE))
        }
        if not left and (out / task / "report.md").is_file():
            continue
        for path, own in left.items():
            print(path, flush=True)
            if not train(own, path, deadline):
                return INTERRUPTED
        print(write(measure(out / task, SweepConfig()), out / task, [command]), flush=True)
    return 0


@command("fan")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--backend", default="auto", help="of the loop body")
    args = parser.parse_args(argv)
    configs = {task: task_config(task, args.backend) for task in args.tasks}
    command_line = f"python -m benchmarks.gpu.fan {shlex.join(argv)}"
    return run(configs, args.arms, args.seeds, args.out, args.seconds, command_line)


if __name__ == "__main__":
    sys.exit(main())
