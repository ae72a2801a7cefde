"""``summary.json``: what each run of one or more comparisons reached and at what cost, a line a run.

It holds all that the tables are made of, and leaves out the curves, which ``results.json`` has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shift.comparison.ratios import against_looped, smallest_sufficient
from shift.report.rows import read_rows, write_rows

COLUMNS = {
    "seed": "seed",
    "failure": "failure",
    "accuracy": "final_accuracy",
    "exact": "final_exact",
    "loss": "final_loss",
    "late": "late",
    "steps_to_target": "steps_to_target",
    "flops_to_target": "flops_to_target",
    "block_applications_to_target": "block_applications_to_target",
    "cpu_s_to_target": "cpu_s_to_target",
    "wall_s_to_target": "wall_s_to_target",
    "flops": "flops_total",
    "block_applications": "block_applications",
    "cpu_s": "cpu_s",
    "wall_s": "wall_s",
    "quiet_s_to_target": "quiet_s_to_target",
    "quiet_s": "quiet_s",
    "switch_step": "switch_step",
    "final_loops": "final_loops",
    "skipped_steps": "skipped_steps",
}
"""Column -> key of :func:`shift.comparison.results.seed_facts`; ``quiet_s`` is entered into them where
seconds were measured apart from the runs (``benchmarks.savings.quiet``)."""

OF_ARM = ("label", "schedule", "n_loops", "criterion")
"""What is kept of an arm."""

Comparisons = Mapping[str, Mapping[str, Any]]
"""Name of the task -> content of its ``results.json``."""


def write_summary(path: Path, comparisons: Comparisons, first: Mapping[str, Any] | None = None) -> None:
    """Write the runs of some comparisons; what results made by older versions lack is null.

    Args:
        path: the file.
        comparisons: of which.
        first: what the file begins with, by its key.
    """
    rows = [
        {
            "task": task,
            "arm": name,
            "reached": facts["flops_to_target"] is not None,
            "share_of_looped": arm.get("against_looped", {}).get("per_seed", {}).get(str(facts["seed"])),
            **{column: facts.get(key) for column, key in COLUMNS.items()},
        }
        for task, results in comparisons.items()
        for name, arm in results["arms"].items()
        for facts in arm["seeds"]
    ]
    left_out = ("arms", "smallest_sufficient", "looped_at_shift_compute")
    about = {
        task: {key: value for key, value in results.items() if key not in left_out}
        | {"arms": {name: {key: arm[key] for key in OF_ARM} for name, arm in results["arms"].items()}}
        for task, results in comparisons.items()
    }
    write_rows(path, rows, about, first)


def read_summary(path: Path) -> dict[str, dict[str, Any]]:
    """The comparisons that :func:`write_summary` wrote, as far as it did: without curves, loops and looks."""
    rows, about = read_rows(path)
    comparisons: dict[str, dict[str, Any]] = {}
    for task, facts in about.items():
        arms = {name: arm | {"seeds": []} for name, arm in facts["arms"].items()}
        for row in rows:
            if row["task"] == task:
                arms[row["arm"]]["seeds"].append({key: row.get(column) for column, key in COLUMNS.items()})
        if "looped" in arms:
            for arm in arms.values():
                arm["against_looped"] = against_looped(arm["seeds"], arms["looped"]["seeds"])
        comparisons[task] = facts | {"arms": arms, "smallest_sufficient": smallest_sufficient(arms)}
    return comparisons
