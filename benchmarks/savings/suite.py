"""A suite, declared in one TOML file.

waves        lists of seeds: all tasks with the first list, then with the next
overtime     whether runs that are not at the target go on until they have spent what Looped has
arms         of every task, by their names in shift.comparison.arms
variants     variants.<name> = changes of the config that the arms <arm>@<name> have: the model's, say, or
             schedule = { options = { ... } }, of the arm's own schedule
everywhere   changes of the demo preset that all tasks share
tasks.<name> further changes; set = "tuning" or "held out"; more_arms = [...] for this task alone
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shift.build import build_task
from shift.comparison.arms import DERIVED, Rates, Variants, check_variants, make_arm
from shift.config import TrainConfig, load_config, merged
from shift.reading import read_json, read_toml
from shift_kernels.errors import input_error
from shift_kernels.machine import default_jobs

SUITES = Path(__file__).parent / "suites"
SETS = ("tuning", "held out")


@dataclass(frozen=True)
class Case:
    """A task of a suite.

    Args:
        name: of its directory and its row.
        used_for: one of :data:`SETS`.
        config: of every arm, but for the schedule.
        arms: the suite's, and the task's own ``more_arms``.
        rates: learning rates found by ``benchmarks.savings.tune``; arms without have the config's.
        variants: of the suite, which arms may name.
    """

    name: str
    used_for: str
    config: TrainConfig
    arms: tuple[str, ...]
    rates: Rates = field(default_factory=dict)
    variants: Variants = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """What is run: every case with its arms, for the seeds of one wave after the other."""

    cases: tuple[Case, ...]
    waves: tuple[tuple[int, ...], ...]
    overtime: bool


def suite_parser(description: str | None) -> argparse.ArgumentParser:
    """What every command that trains a suite asks for."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", help="quick, full, or a TOML file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=default_jobs())
    return parser


def suite_path(name_or_path: str) -> Path:
    """The file of a suite: itself, or one of ``benchmarks/savings/suites`` by its name."""
    path = Path(name_or_path)
    return path if path.suffix == ".toml" else SUITES / f"{name_or_path}.toml"


def load_suite(name_or_path: str, tasks: tuple[str, ...] = ()) -> Suite:
    """Read a suite by its name or path.

    Args:
        name_or_path: a file of ``benchmarks/savings/suites`` without its ending, or any TOML file.
        tasks: keep these alone; none: all.

    Raises:
        ShiftInputError: no such file or task, an unknown key or arm, a value that a config refuses.
    """
    path = suite_path(name_or_path)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SUITES.glob("*.toml")))
        raise input_error("load_suite", "suite", name_or_path, f"a .toml file, or {known}", "Check it.")
    table = read_toml(path, "load_suite", "suite")
    declared, arms, variants = table["tasks"], tuple(table["arms"]), table.get("variants", {})
    check_variants(variants)
    for task in tasks:
        if task not in declared:
            raise input_error("load_suite", "tasks", task, ", ".join(declared), "Check the spelling.")
    everywhere = table.get("everywhere", {})
    tuned = rates_path(path)
    rates = read_json(tuned, "load_suite", "rates")["rates"] if tuned.is_file() else {}
    cases = tuple(
        replace(
            _case(name, merged(everywhere, declared[name]), arms, str(path)),
            rates=rates.get(name, {}),
            variants=variants,
        )
        for name in tasks or declared
    )
    for case in cases:
        build_task(case.config)
        for arm in case.arms:
            if arm not in DERIVED:
                make_arm(arm, case.config, variants=variants)
    return Suite(cases, tuple(map(tuple, table["waves"])), table["overtime"])


def rates_path(suite: Path) -> Path:
    """Where ``benchmarks.savings.tune`` leaves the learning rates of a suite."""
    return suite.with_suffix(".rates.json")


def _case(name: str, table: Mapping[str, Any], arms: tuple[str, ...], source: str) -> Case:
    changes = {key: value for key, value in table.items() if key not in ("set", "more_arms")}
    if table.get("set") not in SETS:
        raise input_error("load_suite", f"tasks.{name}.set", table.get("set"), " or ".join(SETS), "Set it.")
    # The demo's criterion was chosen for the demo: elsewhere SHIFT has the criterion's own defaults.
    base = load_config("demo").to_dict() | {"schedule": {"kind": "shift"}}
    config = TrainConfig.from_dict(merged(base, changes), source)
    return Case(name, table["set"], config, arms + tuple(table.get("more_arms", ())))
