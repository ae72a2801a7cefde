"""Do the criterion's defaults sit where saved compute costs no run? A sweep on the tuning tasks.

    python -m benchmarks.savings.scp_sweep --out runs/scp [--tasks hop_d12 markov] [--jobs 1]

The criterion reads losses and gradient norms of Stage I alone, which does not depend on it. So Single is run
once for each seed, the criterion is replayed on its record with every setting, and only the switch steps
that come of it are trained, rounded to twentieths of the run, as fixed switches. The cost of a setting is the
restricted mean over Looped's (``benchmarks.savings.restricted``). Writes ``summary.json`` (a line a setting)
and ``front.png`` into ``--out``. The same command again goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.savings.restricted import costs, named
from benchmarks.savings.suite import Case, load_suite
from shift.comparison.arms import make_arm, seeded
from shift.comparison.pool import train_all
from shift.comparison.runs import compare_arms, finished
from shift.report.document import Table
from shift.report.rows import write_rows
from shift.run.record import read_run
from shift.schedules import SCP, SCPConfig
from shift_kernels.console import command
from shift_kernels.machine import default_jobs

SWEPT: Mapping[str, Sequence[float]] = {
    "delta_1": (0.01, 0.02, 0.03, 0.05, 0.1),
    "delta_2": (0.05, 0.1, 0.2, 0.4),
    "patience": (2, 3, 5, 8),
    "beta": (0.9, 0.95, 0.98, 0.99),
}
"""Every combination is a setting; the criterion's other options are its defaults."""
ROUNDED_TO = 20
"""Switch steps are rounded to so many parts of a run."""
SEEDS = (2000, 2001, 2002)
"""Neither the suite's nor those of ``benchmarks.savings.tune``."""

Records = Mapping[int, tuple[list[float], list[float]]]
"""Seed -> losses and gradient norms of Single's steps."""


def settings() -> list[SCPConfig]:
    """All that are swept; the defaults are among them."""
    return [
        SCPConfig(**dict(zip(SWEPT, values, strict=True)))  # type: ignore[arg-type]
        for values in itertools.product(*SWEPT.values())
    ]


@command("scp_sweep", resumable=True)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=(), help="default: the tuning tasks of full")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=default_jobs())
    args = parser.parse_args(argv)
    cases = load_suite("full", tuple(args.tasks)).cases
    cases = cases if args.tasks else tuple(case for case in cases if case.used_for == "tuning")
    rows = swept([(case, *trained(case, args.seeds, args.out, args.jobs)) for case in cases])
    about = {"tasks": [case.name for case in cases], "seeds": list(args.seeds), "rounded_to": ROUNDED_TO}
    write_rows(args.out / "summary.json", rows, about)
    from benchmarks.savings.pictures import draw_front

    print(args.out / "summary.json", draw_front(rows, args.out), sep="\n")
    return 0


def trained(case: Case, seeds: Sequence[int], out: Path, jobs: int) -> tuple[Records, Mapping[str, Any]]:
    """Single's records, and the results of all fixed switches that some setting asks for."""
    single = make_arm("single", case.config, case.rates)
    runs = {out / case.name / "records" / f"seed-{seed}": seeded(single, seed) for seed in seeds}
    train_all({path: config for path, config in runs.items() if not finished(path, config)}, jobs)
    records: dict[int, tuple[list[float], list[float]]] = {}
    for seed, path in zip(seeds, runs, strict=True):
        train = read_run(path).of_kind("train")
        records[seed] = tuple([row[key] for row in train] for key in ("loss", "grad_norm"))  # type: ignore[assignment]
    arms = {arm_of(config, record, case) for config in settings() for record in records.values()}
    names = ["looped", "single", *sorted(arms - {"single"}, key=lambda name: int(name.partition(":")[2]))]
    # One rate for all, Looped's: what is compared is when to switch, and SHIFT's best rate depends on that.
    rates = dict.fromkeys(names, case.rates.get("looped", case.config.optimiser.lr))
    typed = " ".join(sys.argv)
    folder = out / case.name / "fixed"
    results, _ = compare_arms(case.config, names, seeds, folder, None, True, jobs, typed, rates)
    return records, results


def arm_of(config: SCPConfig, record: tuple[list[float], list[float]], case: Case) -> str:
    """The fixed switch that SHIFT with this criterion is on a seed, to the rounding."""
    step, part = SCP.replay(config, *record), case.config.steps / ROUNDED_TO
    return "single" if step is None else f"fixed:{round(max(1, round(step / part)) * part)}"


def swept(found: Sequence[tuple[Case, Records, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """A row a setting: its restricted mean over Looped's, the runs it lost, how many never switched."""
    rows = []
    for config in settings():
        ratios, lost, never = [], 0, 0
        for case, records, r in found:
            arms = {seed: arm_of(config, record, case) for seed, record in records.items()}
            each = {name: costs(r, named(name)) for name in {*arms.values(), "looped"}}
            order = sorted(records)
            own = [each[arms[seed]][i] for i, seed in enumerate(order)]  # type: ignore[index]
            ratios.append(statistics.mean(own) / float(each["looped"].mean()))  # type: ignore[union-attr]
            never += sum(name == "single" for name in arms.values())
            lost += sum(seed in r["arms"][arms[seed]]["against_looped"]["seeds_never"] for seed in order)
        own_options = {name: getattr(config, name) for name in SWEPT}
        is_default = config == SCPConfig()
        rows.append(
            {**own_options, "restricted_mean": statistics.mean(ratios), "lost": lost, "never": never}
            | {"default": is_default}
        )
    best = {(row["lost"], row["restricted_mean"]) for row in front(rows)}
    return [row | {"front": (row["lost"], row["restricted_mean"]) in best} for row in rows]


def front(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Settings than which none is cheaper and loses no more, by the runs that they lose; one of equals."""
    best: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["lost"], row["restricted_mean"], not row["default"])):
        if not best or row["restricted_mean"] < best[-1]["restricted_mean"]:
            best.append(row)
    return best


def front_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The front, and where the defaults are."""
    shown = [row for row in front(rows) if not row["default"]]
    shown += [row for row in rows if row["default"]]
    header = [*SWEPT, "compute, × Looped", "runs lost", "never switched"]
    return Table(
        header,
        [
            [f"{row[name]:g}" for name in SWEPT]
            + [f"{row['restricted_mean']:.2f}" + (" (the defaults)" if row["default"] else "")]
            + [str(row["lost"]), str(row["never"])]
            for row in sorted(shown, key=lambda row: (row["lost"], row["restricted_mean"]))
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
