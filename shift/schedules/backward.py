"""All loops forward, ever more of them backward: the depth of back-propagation warms up."""

from __future__ import annotations

from shift.reading import is_int, is_number
from shift.schedules.base import Decision, Declaration, Family, LoopSchedule, check
from shift.schedules.scp import Signals


class BackwardWarmup(LoopSchedule):
    """``max_loops`` loops at every step, with gradient through the last ``first`` of them, then through more.

    With s in [0, 1) the position in the first ``fraction`` of the steps, the gradient passes through
    first + floor(s (last - first)) loops, and through ``last`` from there on. So HRM-Text trains
    (github.com/sapientinc/HRM-Text, ``hrm_nocarry_bp_warmup.py``): from 2 to 5 of 8 over the first fifth.

    Args:
        max_loops, total_steps: see :class:`LoopSchedule`.
        first: loops that carry gradient at the start.
        last: loops that carry it in the end; default: all.
        fraction: of the steps, over which it rises.
    """

    def __init__(
        self,
        max_loops: int,
        total_steps: int,
        first: int = 2,
        last: int | None = None,
        fraction: float = 0.2,
    ) -> None:
        super().__init__(max_loops, total_steps)
        check(is_int(first) and first >= 1, "first", first, "an int >= 1")
        self.last = max_loops if last is None else last
        check(is_int(self.last) and self.last >= 1, "last", last, "an int >= 1")
        check(is_number(fraction) and 0 < fraction <= 1, "fraction", fraction, "a number in (0, 1]")
        self.first, self.ramp_steps = min(first, self.last), fraction * total_steps

    def step(self, step: int, signals: Signals | None) -> Decision:
        reached = min(1.0, step / self.ramp_steps)
        n_grad_loops = self.first + int(reached * (self.last - self.first))
        return Decision(self.max_loops, n_grad_loops=min(n_grad_loops, self.max_loops))


BACKWARD = Declaration(
    "backward_warmup",
    BackwardWarmup,
    decided_by="nothing",
    baseline=True,
    families=(
        Family(
            "backward_warmup",
            "Looped, backward warm-up",
            "#661100",
            {},
            "fraction",
            "Looped, backward warm-up over {value}",
        ),
    ),
)
