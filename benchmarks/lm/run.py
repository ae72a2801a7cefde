"""Language models, trained in every way, at several budgets: the compute each needs for the same loss.

    python -m benchmarks.lm.run quick --out runs/lm         # under ten minutes on two cores
    python -m benchmarks.lm.run full --out runs/lm-full     # under four core-hours

First every arm's learning rate is chosen on seeds of their own, at a middle budget, from a grid that is
widened while its best is at an end. Then all arms run at all budgets, seed by seed, and after each seed the
report is written. The same command again goes on where an interrupted one stopped. ``out`` gets
``summary.json``, ``report.md`` and ``loss.png``. On a GPU: ``benchmarks.gpu.lm``.
"""

from __future__ import annotations

import math
import shlex
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from benchmarks.lm.multiplier import COSTS, Curve, Point
from benchmarks.lm.report import write_report
from benchmarks.lm.suite import Suite, arms_of, load_suite, run_config, step_flops, tuning_budget
from benchmarks.lm.text import make_shards
from benchmarks.savings.suite import suite_parser
from benchmarks.savings.tune import WIDEST
from shift.comparison.pool import train_all
from shift.comparison.runs import finished
from shift.config import TrainConfig
from shift.run.record import read_run
from shift_kernels.console import command


@command("lm", resumable=True)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = suite_parser(__doc__).parse_args(argv)
    command_line = f"python -m benchmarks.lm.run {shlex.join(sys.argv[1:] if argv is None else argv)}"
    suite = load_suite(args.suite)
    data = make_shards(args.out / "text", suite.text, args.jobs)
    print(run(suite, data, args.out, lambda runs: train_all(runs, args.jobs), command_line))
    return 0


def run(
    suite: Suite, data: Path, out: Path, train: Callable[[Mapping[Path, TrainConfig]], object], command: str
) -> Path:
    """Train what is not yet trained; returns the report.

    Args:
        suite: what to run.
        data: the folder of its shards.
        out: directory for everything else.
        train: trains all runs that it is given, or raises.
        command: what the report says to type.
    """
    arms = arms_of(suite, data)
    each = {name: step_flops(arm.config) for name, arm in arms.items()}
    tuned = tuning_budget(suite.budgets)

    def path(kind: str, name: str, key: str, seed: int) -> Path:
        return out / kind / name.replace(":", "-") / key / f"seed-{seed}"

    def tuning(name: str, factor: float) -> dict[Path, TrainConfig]:
        return {
            path("tuning", name, f"rate-{factor:g}", seed): run_config(
                arms[name], tuned, each[name], factor, seed
            )
            for seed in suite.tuning_seeds
        }

    tried = {name: set(suite.rates) for name in arms}
    missing = [(name, factor) for factor in suite.rates for name in arms]
    while missing:
        train(unfinished({place: config for pair in missing for place, config in tuning(*pair).items()}))
        rates = {name: best_rate({f: list(tuning(name, f)) for f in tried[name]}) for name in arms}
        missing = [(name, wider) for name, f in rates.items() for wider in beyond(f, tried[name])]
        for name, wider in missing:
            tried[name].add(wider)
    curves: dict[str, Curve] = {}
    for n in range(1, len(suite.seeds) + 1):
        places = {
            name: {
                b: {s: path("runs", name, f"{b:.4g}", s) for s in suite.seeds[:n]}
                for b in suite.budgets_of(name)
            }
            for name in arms
        }
        seed = suite.seeds[n - 1]
        runs = {
            of_seed[seed]: run_config(arms[name], budget, each[name], rates[name], seed)
            for name, of_budget in places.items()
            for budget, of_seed in of_budget.items()
        }
        train(unfinished(runs))
        curves = {
            name: {
                budget: {s: p for s, place in of_seed.items() if (p := point(place)) is not None}
                for budget, of_seed in of_budget.items()
            }
            for name, of_budget in places.items()
        }
        report = write_report(suite, arms, rates, curves, out, command)
    return report


def unfinished(runs: Mapping[Path, TrainConfig]) -> dict[Path, TrainConfig]:
    """Those that are not finished."""
    return {path: config for path, config in runs.items() if not finished(path, config)}


def beyond(best: float, tried: Collection[float]) -> list[float]:
    """The factor to try next where the best is at an end of those tried; none beyond :data:`WIDEST`."""
    wider = [best / 2] * (best == min(tried)) + [best * 2] * (best == max(tried))
    return [factor for factor in wider if WIDEST[0] <= factor <= WIDEST[1]]


def best_rate(tried: Mapping[float, list[Path]]) -> float:
    """The factor of the least mean loss; one at which a run came to nothing is none."""

    def mean_loss(factor: float) -> float:
        points = [point(path) for path in tried[factor]]
        return math.inf if None in points else statistics.mean(p.loss for p in points if p is not None)

    return min(tried, key=mean_loss)


def point(path: Path) -> Point | None:
    """What a run came to; None: to nothing."""
    result = read_run(path).result
    loss = result["final_eval"]["loss"] if result else None
    return None if loss is None else Point({kind: result[key] for kind, key in COSTS.items()}, loss)


if __name__ == "__main__":
    sys.exit(main())
