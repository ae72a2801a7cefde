"""Ramps: from one loop to T over the first part of the run."""

from __future__ import annotations

import math

from shift.reading import is_number
from shift.schedules.base import Declaration, Family, TimedSchedule, check, doublings

SHAPES = ("linear", "sqrt", "staged")


class Ramp(TimedSchedule):
    """Rises from 1 to ``max_loops`` over the first ``fraction`` of the steps.

    With s in [0, 1) the position in the ramp: 1 + floor(s (T - 1)) for ``linear``, so that T itself begins
    when the ramp is over and the mean within it is about T / 2; the same with sqrt(s) for ``sqrt``, which has
    more loops early; ``staged`` doubles: 1, 2, 4, .. below T, for equal times.
    """

    def __init__(self, max_loops: int, total_steps: int, shape: str, fraction: float = 0.5) -> None:
        super().__init__(max_loops, total_steps)
        check(shape in SHAPES, "shape", shape, " or ".join(map(repr, SHAPES)))
        check(is_number(fraction) and 0 < fraction <= 1, "fraction", fraction, "a number in (0, 1]")
        self.shape, self.ramp_steps = shape, fraction * total_steps

    def loops_at(self, step: int) -> int:
        s = step / self.ramp_steps
        if s >= 1:
            return self.max_loops
        if self.shape == "staged":
            stages = doublings(self.max_loops)
            return stages[int(s * (len(stages) - 1))]
        return 1 + int((s if self.shape == "linear" else math.sqrt(s)) * (self.max_loops - 1))


def _declared(shape: str, family: Family) -> Declaration:
    return Declaration(shape, Ramp, "time", baseline=True, families=(family,), preset={"shape": shape})


LINEAR = _declared("linear", Family("ramp", "Linear ramp", "#009E73"))
SQRT = _declared("sqrt", Family("sqrt_ramp", "Square-root ramp", "#117733"))
STAGED = _declared("staged", Family("staged_ramp", "Staged ramp", "#8C6D1F"))
