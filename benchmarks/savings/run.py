"""What SHIFT saves, on many tasks, against every control we know.

    python -m benchmarks.savings.run quick --out runs/savings          # under 10 minutes on 2 cores
    python -m benchmarks.savings.run full --out runs/savings-full      # 10 seeds

Each task is a comparison of its own in ``out/<task>`` (see ``shift.compare``); ``out`` gets ``results.json``,
``report.md`` and ``report.html`` over all of them. A suite declares its seeds in waves: the next begins when
all tasks have done the last and the reports are written, so whatever there is when it is stopped compares
all tasks. The same command again goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from pathlib import Path

from benchmarks.savings.report import write_suite_report
from benchmarks.savings.suite import load_suite
from shift.compare import INTERRUPTED, compare_arms
from shift.comparison.pool import default_jobs
from shift_kernels import ShiftInputError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", help="quick, full, or a TOML file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=(), help="these alone")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the suite's")
    parser.add_argument("--jobs", type=int, default=default_jobs())
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        suite = load_suite(args.suite, tuple(args.tasks))
        waves = (tuple(args.seeds),) if args.seeds else suite.waves
        # Each wave takes in the seeds of those before it, which are there already.
        plan = [(case, sum(waves[: i + 1], ())) for i in range(len(waves)) for case in suite.cases]
        results, start = {}, time.monotonic()
        for i, (case, seeds) in enumerate(plan):
            words = f"{case.name}, {len(seeds)} seeds ({i + 1} of {len(plan)}, {_left(start, i, len(plan))})"
            print(words, flush=True)
            found, _ = compare_arms(
                case.config,
                case.arms,
                seeds,
                args.out / case.name,
                None,
                suite.overtime,
                args.jobs,
                f"python -m benchmarks.savings.run {shlex.join(sys.argv[1:])}",
            )
            results[case.name] = found | {"used_for": case.used_for}
            if (i + 1) % len(suite.cases) == 0:
                reports = write_suite_report(results, args.out)
    except ShiftInputError as error:
        print(f"savings: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("savings: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    print("\n".join(map(str, reports)))
    return 0


def _left(start: float, done: int, of: int) -> str:
    """Time left, if what is to come takes as long as what was."""
    if not done:
        return "time left unknown"
    return f"about {(time.monotonic() - start) / done * (of - done) / 60:.0f} min left"


if __name__ == "__main__":
    sys.exit(main())
