"""A learning rate for every arm of every task: all arms tuned alike, on seeds that the suite does not use.

    python -m benchmarks.savings.tune full --out runs/tune

Every arm runs with :data:`FACTORS` times the learning rate of the suite. An arm's best has the smallest mean
cost: the compute to 98% of the accuracy of Looped at Looped's own best, and Looped's whole run where that is
never reached. While an arm's best is an end of its grid, its grid is widened there: so both neighbours of
every best were tried, and no rates far from it. The rates, and what finding them took, go to
``suites/<suite>.rates.json``; ``benchmarks.savings.run`` then goes by them.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.savings.suite import Case, load_suite, rates_path, suite_parser, suite_path
from shift.comparison.arms import AGAIN, MATCHED, rate_name
from shift.comparison.plan import LOOPED_SHARE
from shift.comparison.runs import compare_arms
from shift.comparison.verdict import mean_accuracy
from shift.reading import read_json
from shift.report.document import Cell, Table
from shift.report.words import flops
from shift.run.files import json_bytes, replace_atomically
from shift_kernels.console import command

FACTORS = (1.0, 2.0)
"""Times the learning rate of the suite's config."""
WIDEST = 1 / 8, 16.0
"""Where widening ends."""
SEEDS = (1000, 1001)
"""Of the tuning runs; no suite has them."""

Found = Mapping[float, Mapping[str, Any]]
"""Factor -> ``results.json`` of the comparison at that learning rate."""


@command("tune", resumable=True)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = suite_parser(__doc__)
    parser.add_argument(
        "--tasks", nargs="+", default=(), help="these alone; the others keep the rates they have"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    args = parser.parse_args(argv)
    path = rates_path(suite_path(args.suite))
    suite = load_suite(args.suite, tuple(args.tasks))
    rates = {case.name: dict(case.rates) for case in load_suite(args.suite).cases if case.rates}
    spent: dict[str, float] = {}
    for case in suite.cases:
        found = widened(case, args.seeds, args.out / case.name, args.jobs)
        factors = best_factors(found)
        rates[case.name] = {arm: factor * case.config.optimiser.lr for arm, factor in factors.items()}
        spent[case.name] = tuning_flops(found)
        print(f"{case.name}: {factors}, {spent[case.name]:.3g} FLOPs", flush=True)
        replace_atomically(
            path, json_bytes({"seeds": list(args.seeds), "tuning_flops": spent, "rates": rates})
        )
    print(path)
    return 0


def widened(case: Case, seeds: Sequence[int], out: Path, jobs: int) -> Found:
    """All arms at :data:`FACTORS`; then those whose best is an end of their grid beyond it, until none is."""
    found = {f: _compared(case, case.arms, f, seeds, out / f"lr-{f:g}", jobs) for f in FACTORS}
    while further := beyond(found):
        for factor, names in further.items():
            names |= _names(found[factor]) if factor in found else set()
            arms = [arm for arm in case.arms if rate_name(arm) in names]
            found[factor] = _compared(case, arms, factor, seeds, out / f"lr-{factor:g}", jobs)
    return found


def beyond(found: Found) -> dict[float, set[str]]:
    """Factor that has not been tried -> names of rates whose best so far is the end next to it."""
    names = set().union(*map(_names, found.values()))
    tried = {name: [f for f, r in found.items() if name in _names(r)] for name in names}
    further: dict[float, set[str]] = {}
    for name, best in best_factors(found).items():
        for end, factor in ((min(tried[name]), best / 2), (max(tried[name]), 2 * best)):
            if best == end and WIDEST[0] <= factor <= WIDEST[1]:
                further.setdefault(factor, set()).add(name)
    return further


def _compared(
    case: Case, arms: Sequence[str], factor: float, seeds: Sequence[int], out: Path, jobs: int
) -> Mapping[str, Any]:
    lr = factor * case.config.optimiser.lr
    # Looped sets the target of each comparison; on other data it has Looped's rate.
    arms = ["looped", *(arm for arm in arms if arm not in ("looped", AGAIN))]
    if MATCHED in arms and "shift" not in arms:
        arms.append("shift")
    same = dict.fromkeys([*map(rate_name, arms)], lr)
    typed = " ".join(sys.argv)
    results, _ = compare_arms(case.config, arms, seeds, out, None, False, jobs, typed, same, case.variants)
    return results


def _names(results: Mapping[str, Any]) -> set[str]:
    return {rate_name(arm) for arm in results["arms"]}


def best_factors(found: Found) -> dict[str, float]:
    """The factor of the smallest mean cost, by the names of :data:`shift.comparison.arms.Rates`."""
    looped = {factor: r["arms"]["looped"]["seeds"] for factor, r in found.items()}
    accuracy = max(mean_accuracy(seeds) or 0.0 for seeds in looped.values())
    spent = {s["seed"]: s["flops_total"] for s in next(iter(looped.values()))}
    costs: dict[str, dict[float, float]] = {}
    for factor, r in found.items():
        for name, arm in r["arms"].items():
            each = [_cost(s["curve"], LOOPED_SHARE * accuracy, spent[s["seed"]]) for s in arm["seeds"]]
            by_factor = costs.setdefault(rate_name(name), {})
            by_factor[factor] = min(by_factor.get(factor, float("inf")), statistics.mean(each))
    # Of equals, such as those that never get there, the one nearest to the suite's rate.
    return {
        name: min(by_factor, key=lambda factor: (by_factor[factor], abs(math.log2(factor))))
        for name, by_factor in costs.items()
    }


def _cost(curve: Mapping[str, Sequence[float]], target: float, most: float) -> float:
    """FLOPs at the first evaluation of a trained model that is at the target; ``most`` if none is."""
    rows = zip(curve["step"], curve["flops"], curve["accuracy"], strict=True)
    return min(next((flops for step, flops, accuracy in rows if step > 0 and accuracy >= target), most), most)


def tuning_flops(found: Found) -> float:
    """Training FLOPs of all runs."""
    return sum(s["flops_total"] for r in found.values() for arm in r["arms"].values() for s in arm["seeds"])


def rates_table(suite: str) -> Table:
    """What a suite's arms were given: rates over the suite's own, and the compute that finding them took."""
    spent = read_json(rates_path(suite_path(suite)), "rates_table", "rates")["tuning_flops"]
    cases = load_suite(suite).cases
    names = dict.fromkeys(rate_name(arm) for case in cases for arm in case.arms)
    rows: list[list[Cell]] = [
        [name, *(f"{case.rates[name] / case.config.optimiser.lr:g}" for case in cases)] for name in names
    ]
    rows.append(["compute of all runs", *(flops(spent[case.name]) for case in cases)])
    return Table(["arm", *(case.name for case in cases)], rows)


if __name__ == "__main__":
    sys.exit(main())
