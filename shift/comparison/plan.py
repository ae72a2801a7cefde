"""What a comparison writes down before its first run, so that no later call can change it: ``plan.json``."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from shift.comparison.arms import MATCHED
from shift.reading import is_number, read_json
from shift.run.files import json_bytes, make_directory, replace_atomically
from shift.run.lock import alone_with
from shift.run.record import Run
from shift_kernels.errors import input_error

PLAN, LOCK = "plan.json", ".lock"

LOOPED_SHARE = 0.98
"""Where no target is given it is this share of Looped's mean final accuracy."""


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Make the directory if need be, and let no other process compare in it until this one is done or ends.

    Raises:
        ShiftInputError: another process does, or the directory can't be made or written to.
    """
    make_directory(out, "shift-compare", "out")
    refusal = input_error(
        "shift-compare", "out", str(out), "a directory in which no other comparison is running",
        "Wait for it or stop it, or choose another.",
    )  # fmt: skip
    with alone_with(out / LOCK, refusal):
        yield


def write_plan(out: Path, target: float | None, command_line: str) -> dict[str, str]:
    """Write down what is to be reached before the first run; a later call can't rewrite it."""
    rule = (
        f"accuracy {target:g}" if target is not None else f"{LOOPED_SHARE:g} of Looped's mean final accuracy"
    )
    path = out / PLAN
    if path.is_file():
        first = read_plan(path)
    else:
        first = {
            "first_target_rule": rule,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        replace_atomically(path, json_bytes(first))
    return first | {"target_rule": rule, "command": command_line}


def read_plan(path: Path) -> dict[str, Any]:
    """What an earlier call wrote down.

    Raises:
        ShiftInputError: the file was changed into something else.
    """
    plan = read_json(path, "shift-compare", "out")
    good = isinstance(plan, dict) and is_number(plan.get(MATCHED, 1)) and plan.get(MATCHED, 1) >= 1
    if not good or not all(isinstance(plan.get(key), str) for key in ("first_target_rule", "created")):
        raise input_error(
            "shift-compare", "out", str(path), "a plan as shift-compare writes it", "Restore it."
        )
    return plan


def matched_mean(out: Path, shift: Mapping[int, Run]) -> float:
    """SHIFT's loops a step, mean over steps and the seeds of the first call; later seeds join its arm."""
    path = out / PLAN
    plan = read_plan(path)
    if MATCHED not in plan:
        steps = [
            row["n_loops"]
            for run in shift.values()
            for row in run.of_kind("train")
            if row["step"] <= run.config["steps"]
        ]
        if not steps:
            raise input_error("shift-compare", "arms", MATCHED, "a SHIFT run that took a step", "Drop it.")
        plan[MATCHED] = round(statistics.mean(steps), 2)
        replace_atomically(path, json_bytes(plan))
    return plan[MATCHED]
