"""What SHIFT saves, on many tasks, against every control we know.

    python -m benchmarks.savings.run quick --out runs/savings          # under 10 minutes on 2 cores
    python -m benchmarks.savings.run full --out runs/savings-full      # 10 seeds

Each task is a comparison of its own in ``out/<task>`` (see ``shift.compare``); ``out`` gets ``results.json``,
``report.md`` and ``report.html`` over all of them. A suite declares its seeds in waves: the next begins when
all tasks have done the last and the reports are written, so whatever there is when it is stopped compares
all tasks. The same command again goes on where an interrupted one stopped.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.savings.report import write_suite_report
from benchmarks.savings.suite import Case, load_suite, suite_parser
from shift.build import build_model, build_task
from shift.comparison.arms import DERIVED
from shift.comparison.runs import compare_arms
from shift.flops import train_step_flops
from shift.report.rows import read_rows
from shift.report.words import count
from shift_kernels.console import command


@command("savings", resumable=True)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = suite_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", default=(), help="these alone")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the suite's")
    args = parser.parse_args(argv)
    suite = load_suite(args.suite, tuple(args.tasks))
    waves = (tuple(args.seeds),) if args.seeds else suite.waves
    command_line = f"python -m benchmarks.savings.run {shlex.join(sys.argv[1:] if argv is None else argv)}"
    progress = Progress(
        [
            0 if finished(case, seeds, args.out) else cost(case) * len(seeds)
            for seeds in waves
            for case in suite.cases
        ]
    )
    for i, wave in enumerate(waves):
        # Each wave takes in the seeds of those before it, so one that is done needs no look of its own.
        if wave is not waves[-1] and all(finished(case, wave, args.out) for case in suite.cases):
            progress.advance(len(suite.cases))
            continue
        seeds, results = sum(waves[: i + 1], ()), {}
        for case in suite.cases:
            print(f"{case.name}, {count(len(seeds), 'seed')} ({progress.words()})", flush=True)
            found, _ = compare_arms(
                case.config,
                case.arms,
                seeds,
                args.out / case.name,
                None,
                suite.overtime,
                args.jobs,
                command_line,
                case.rates,
                case.variants,
            )
            results[case.name] = found | {"used_for": case.used_for}
            progress.advance(1)
        reports = write_suite_report(results, args.out)
    print("\n".join(map(str, reports)))
    return 0


def finished(case: Case, seeds: Sequence[int], out: Path) -> bool:
    """Whether an earlier call has compared the arms of a case on these seeds to the end."""
    path = out / case.name / "summary.json"
    if not path.is_file():
        return False
    rows, _ = read_rows(path)
    arms = [name for name in case.arms if name not in DERIVED]
    return {(arm, seed) for arm in arms for seed in seeds} <= {(row["arm"], row["seed"]) for row in rows}


def cost(case: Case) -> float:
    """Training FLOPs of a Looped run of it; the other arms' are in proportion."""
    config, task = case.config, build_task(case.config)
    n_loops, size = config.model.n_loops, (config.batch_size, task.max_seq_len)
    return config.steps * train_step_flops(build_model(config, task), *size, n_loops, n_loops)


class Progress:
    """How far a list of pieces of work is, by their costs; those already done before cost nothing."""

    def __init__(self, costs: Sequence[float], clock: Callable[[], float] = time.monotonic) -> None:
        self._costs, self._done, self._clock, self._start = costs, 0, clock, clock()

    def advance(self, pieces: int) -> None:
        """Note that this many more pieces are done."""
        self._done += pieces

    def words(self) -> str:
        """Where it is, and the time left if what is to come is as fast as what was."""
        done, left = sum(self._costs[: self._done]), sum(self._costs[self._done :])
        words = f"{self._done + 1} of {len(self._costs)}, "
        if not left:
            return words + "all trained"
        if not done:
            return words + "time left unknown"
        return words + f"about {(self._clock() - self._start) / done * left / 60:.0f} min left"


if __name__ == "__main__":
    sys.exit(main())
