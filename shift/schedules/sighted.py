"""See first how many loops are of use: the loss after every loop from the same weights, then the fewest."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shift.schedules.base import Decision, Declaration, Family, LoopSchedule, check
from shift.schedules.climbing import Ladder
from shift.schedules.scp import Signals, is_number


class Sighted(LoopSchedule):
    """T loops with a loss after each, for a short while; then the fewest loops that did as well; then T.

    In the first ``until`` of the steps the loss is the mean of those after 1 .. T loops. Then training goes
    on with the smallest number of loops whose loss, mean over the second half of those steps, was within
    ``within`` of the least, and climbs to T when the criterion fires.

    Args:
        max_loops, total_steps: see :class:`LoopSchedule`.
        until: share of all steps that have all losses.
        within: how much larger, relative to the least, a loss may be.
        climbing: ``keep`` and the criterion's options; see :class:`shift.schedules.climbing.Ladder`.
    """

    def __init__(
        self,
        max_loops: int,
        total_steps: int,
        until: float = 0.05,
        within: float = 0.01,
        **climbing: Any,
    ) -> None:
        super().__init__(max_loops, total_steps)
        check(is_number(until) and 0 < until < 1, "until", until, "a number in (0, 1)")
        check(is_number(within) and within >= 0, "within", within, "a number >= 0")
        self.sighting_steps, self.within = max(1, round(until * total_steps)), within
        if max_loops == 1:
            self.sighting_steps = 0
        self._climbing = climbing
        self._ladder = self._from(max_loops)
        self.scp, self.keep = self._ladder.scp, self._ladder.keep
        self._sum: Tensor | None = None  # of the losses, [T]

    def _from(self, n_loops: int) -> Ladder:
        """The ladder from so many loops to T."""
        rungs = sorted({n_loops, self.max_loops})
        return Ladder(self.max_loops, self.total_steps, rungs, **self._climbing)

    def step(self, step: int, signals: Signals | None) -> Decision:
        if signals is not None and signals.loop_losses is not None and 2 * step > self.sighting_steps:
            self._add(signals.loop_losses)
        if step < self.sighting_steps:
            return Decision(self.max_loops, every_loop=True)
        if step == self.sighting_steps and self.max_loops > 1:
            self._ladder = self._from(self._enough())
            n_loops = self._ladder.rungs[0]
            if n_loops < self.max_loops:
                self.switch_step = step
            return Decision(n_loops, n_loops < self.max_loops, self.keep)
        decision = self._ladder.step(step, signals)
        if decision.switched:
            self.switch_step = step
        return decision

    def _add(self, losses: Tensor) -> None:
        # Left on the device: a step that is not finite must not spoil the others, and nothing waits for it.
        losses = torch.where(losses.isfinite().all(), losses.detach().float(), 0.0)
        self._sum = losses if self._sum is None else self._sum.to(losses.device) + losses

    def _enough(self) -> int:
        losses = [] if self._sum is None else self._sum.tolist()
        limit = (1 + self.within) * min(losses, default=math.inf)
        return next((n for n, loss in enumerate(losses, start=1) if loss <= limit), self.max_loops)

    def state_dict(self) -> dict[str, Any]:
        losses = None if self._sum is None else self._sum.tolist()
        first = self._ladder.rungs[0]
        ladder = self._ladder.state_dict()
        return {"sum": losses, "first": first, "switch_step": self.switch_step, "ladder": ladder}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum = None if state["sum"] is None else torch.tensor(state["sum"])
        self._ladder, self.switch_step = self._from(state["first"]), state["switch_step"]
        self._ladder.load_state_dict(state["ladder"])


SIGHTED = Declaration(
    "sighted",
    Sighted,
    decided_by="criterion",
    baseline=False,
    families=(
        Family(
            "sighted",
            "All losses first",
            "#661133",
            {},
            "until",
            "All losses until {value}",
        ),
    ),
)
