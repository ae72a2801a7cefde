"""Sample-wise SHIFT: in one step the dearest samples run T loops, the others few."""

from __future__ import annotations

import math

from shift.schedules.base import BySample, Decision, Declaration, Family, LoopSchedule, check
from shift.schedules.scp import Signals, is_int, is_number


class SampleWise(LoopSchedule):
    """All samples run ``low`` loops; those with the largest loss after them go on to ``max_loops``.

    Args:
        max_loops, total_steps: see :class:`LoopSchedule`.
        share: of the samples, that go on.
        low: loops of all samples.
        drawn: share of those that go on that chance draws, not the loss.
        until: share of the steps in which samples differ; then all run ``max_loops``.
    """

    def __init__(
        self,
        max_loops: int,
        total_steps: int,
        share: float = 0.5,
        low: int = 1,
        drawn: float = 0.25,
        until: float = 1.0,
    ) -> None:
        super().__init__(max_loops, total_steps)
        for name, value in (("share", share), ("drawn", drawn)):
            check(is_number(value) and 0 <= value <= 1, name, value, "a number in [0, 1]")
        check(is_int(low) and low >= 1, "low", low, "an int >= 1")
        check(is_number(until) and 0 < until <= 1, "until", until, "a number in (0, 1]")
        self.plan = BySample(low, share, drawn) if low < max_loops and share < 1 else None
        self.mixed_steps = math.inf if until == 1 else until * total_steps

    def step(self, step: int, signals: Signals | None) -> Decision:
        return Decision(self.max_loops, by_sample=self.plan if step < self.mixed_steps else None)


BY_SAMPLE = Declaration(
    "by_sample",
    SampleWise,
    decided_by="samples",
    baseline=False,
    families=(Family("by_sample", "T by sample", "#999933", {}, "share", "T for {value} of the samples"),),
)
