"""The length study as a whole: train on both tasks, sweep the lengths, write the reports.

    python -m benchmarks.length.run --out runs/length --arms single looped shift climb@later

A task is a comparison of its own in ``out/<task>``; its report goes to ``benchmarks/results/length/<task>``.
The same command again goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.length.report import measure, write
from shift.comparison.runs import compare_arms
from shift.config import load_config
from shift.length.sweep import SweepConfig
from shift_kernels.console import command
from shift_kernels.machine import default_jobs

TASKS = ("parity", "binary_sum")
TARGET = 0.99
SHARES = (0.5, 1, 1.25, 1.5, 2)
"""Lengths that are tried, over the longest of training."""
RESULTS = Path(__file__).parents[1] / "results/length"


@command("length", resumable=True)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--arms", nargs="+", default=["single", "looped", "shift", "climb@later"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--jobs", type=int, default=default_jobs())
    args = parser.parse_args(argv)
    command_line = f"python -m benchmarks.length.run {shlex.join(sys.argv[1:] if argv is None else argv)}"
    for task in args.tasks:
        config, out = load_config(Path(__file__).parent / f"{task}.toml"), args.out / task
        compare_arms(config, args.arms, args.seeds, out, TARGET, False, args.jobs, command_line)
        longest = config.task.options["max_length"]
        lengths = tuple(round(share * longest) for share in SHARES)  # type: ignore[operator]
        sweep = SweepConfig(lengths=lengths, samples=args.samples)
        print(write(measure(out, sweep), args.results / task, [command_line]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
