"""Does the river-valley picture of looped training hold? The study, in one command.

    python -m benchmarks.landscape.run --out runs/landscape

Trains and surveys what is not done in ``out/runs``, then writes ``report.md``, ``report.html``,
``results.json`` and ``figures`` into ``out``. Interrupted, the same command goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.landscape.report import write_study_report
from benchmarks.landscape.seen import read_seed
from benchmarks.landscape.study import run_all, tasks
from shift_kernels.machine import default_jobs


def main() -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=default_jobs())
    args = parser.parse_args()
    work = args.out / "runs"
    run_all(work, args.seeds, args.jobs)
    study = {task: [read_seed(work, task, seed) for seed in args.seeds] for task in tasks()}
    print("\n".join(map(str, write_study_report(study, work, args.out))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
