"""Schedules that are given their loops: constant, and one switch at a step fixed beforehand."""

from __future__ import annotations

from shift.reading import is_int
from shift.schedules.base import Declaration, Family, TimedSchedule, check


class Constant(TimedSchedule):
    """``n_loops`` at every step (default: ``max_loops``): Looped-Attn, or with 1 Single-Attn."""

    def __init__(self, max_loops: int, total_steps: int, n_loops: int | None = None) -> None:
        super().__init__(max_loops, total_steps)
        if n_loops is not None:
            good = is_int(n_loops) and 1 <= n_loops <= max_loops
            check(good, "n_loops", n_loops, f"an int in [1, {max_loops}], the model's n_loops")
            self.max_loops = n_loops

    def loops_at(self, step: int) -> int:
        return self.max_loops


class FixedSwitch(TimedSchedule):
    """1 loop, and ``max_loops`` from ``at`` on: a step (int), or a fraction of all steps (float below 1).

    The fraction is rounded to the nearest step. An ``at`` beyond the last step never switches.
    """

    first = 1
    """Loops before the switch."""

    def __init__(self, max_loops: int, total_steps: int, at: float = 0.5) -> None:
        super().__init__(max_loops, total_steps)
        good = (is_int(at) and at >= 0) or (isinstance(at, float) and 0 <= at < 1)
        check(good, "at", at, "a step (int >= 0) or a fraction of all steps (float in [0, 1))")
        self.at = at if isinstance(at, int) else round(at * total_steps)

    def loops_at(self, step: int) -> int:
        return self.first if step < self.at else self.max_loops


class Grow(FixedSwitch):
    """``first`` loops, and ``max_loops`` from ``at`` on, late: as arXiv 2609.19107 grows a tied core.

    Args:
        max_loops, total_steps: see :class:`LoopSchedule`.
        first: loops before the switch, at most ``max_loops``; default: half of them.
        at: as in :class:`FixedSwitch`.
    """

    def __init__(self, max_loops: int, total_steps: int, first: int | None = None, at: float = 0.8) -> None:
        super().__init__(max_loops, total_steps, at)
        first = max(1, max_loops // 2) if first is None else first
        check(is_int(first) and 1 <= first <= max_loops, "first", first, f"an int in [1, {max_loops}]")
        self.first = first


CONSTANT = Declaration(
    "constant",
    Constant,
    decided_by="nothing",
    baseline=True,
    families=(
        Family("single", "Single (never looped)", "#767676", {"n_loops": 1}),
        Family("looped", "Looped, T = {T}", "#0072B2", {}, "n_loops", "Looped, T = {value}"),
    ),
)
FIXED = Declaration(
    "fixed",
    FixedSwitch,
    decided_by="time",
    baseline=True,
    families=(Family("fixed", "Fixed switch", "#CC79A7", {"at": 0.5}, "at", "Fixed switch at {value}"),),
)
GROW = Declaration(
    "grow",
    Grow,
    decided_by="time",
    baseline=True,
    families=(Family("grow", "Late growth", "#AA4499", {}, "at", "Growth at {value}"),),
)
