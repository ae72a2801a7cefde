"""All schedules. A new one is declared in its own file and listed here.

Arms, results, fairness, reports, pictures, the savings benchmark and the tests go by this list.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from shift.checked import refuse_unknown_options
from shift.schedules.backward import BACKWARD
from shift.schedules.base import Declaration, LoopSchedule
from shift.schedules.climbing import CLIMB, LADDER, SHIFT
from shift.schedules.fixed import CONSTANT, FIXED, GROW
from shift.schedules.ramps import LINEAR, SQRT, STAGED
from shift.schedules.random import RANDOM
from shift.schedules.scp import SCPConfig
from shift_kernels.errors import input_error, near_miss

# In the order in which reports list them.
SCHEDULES = {
    declared.kind: declared
    for declared in (CONSTANT, SHIFT, LINEAR, SQRT, STAGED, LADDER, CLIMB, FIXED, GROW, RANDOM, BACKWARD)
}
"""Kind -> declaration."""


def make_schedule(
    kind: str, *, max_loops: int, total_steps: int, seed: int = 0, **options: Any
) -> LoopSchedule:
    """The schedule of that kind; ``options`` are those of its class.

    Args:
        kind: a key of :data:`SCHEDULES`.
        max_loops: T.
        total_steps: length of the run.
        seed: of schedules that draw.

    Raises:
        ShiftInputError: an unknown kind or option, or a value outside what is allowed.
    """
    if kind not in SCHEDULES:
        allowed = "one of " + ", ".join(map(repr, SCHEDULES))
        remedy = near_miss(kind, SCHEDULES, "Check the spelling.")
        raise input_error("make_schedule", "kind", kind, allowed, remedy)
    declared = SCHEDULES[kind]
    refuse_unknown_options("make_schedule", kind, options, _options_of(declared))
    given = {**declared.preset, **({"seed": seed} if declared.decided_by == "chance" else {})}
    try:
        return declared.schedule(max_loops, total_steps, **given, **options)
    except TypeError as error:
        raise input_error(
            "make_schedule", "options", options, f"the options of {kind!r} ({error})", "Check their names."
        ) from None


def _options_of(declared: Declaration) -> list[str]:
    """Names of what a config may say to a kind of schedule."""
    others = {"max_loops", "total_steps", "seed", *declared.preset}
    own = [name for name in inspect.signature(declared.schedule).parameters if name not in others]
    if "scp" in own:  # the keywords of its criterion
        own.remove("scp")
        own += [f.name for f in dataclasses.fields(SCPConfig) if f.name not in own]
    return own


def switch_step(kind: str, n_loops: Sequence[int]) -> int | None:
    """The switch step, as :mod:`shift.schedules.base` defines it, of a run that is on record.

    Args:
        kind: of its schedule.
        n_loops: of its steps 0, 1, 2, ...
    """
    if SCHEDULES[kind].decided_by == "chance":
        return None
    return max((step for step in range(1, len(n_loops)) if n_loops[step] != n_loops[step - 1]), default=None)
