"""Schedules that climb to T from rung to rung, when a criterion says so: SHIFT, its ladder, and our climb."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from shift.reading import is_int, is_number
from shift.schedules.base import Decision, Declaration, Family, LoopSchedule, check, doublings
from shift.schedules.scp import SCP, SCPConfig, Signals


class Ladder(LoopSchedule):
    """Climbs the ``rungs`` in turn, one each time a fresh criterion fires.

    Args:
        max_loops, total_steps: see :class:`LoopSchedule`.
        rungs: rising loop counts that end at ``max_loops``; default 1, 2, 4, .., ``max_loops``.
        shares: of all steps, at most, on each rung but the last; default: SCP alone decides.
        keep: at each switch, of what training has changed; see :class:`LoopSchedule`.
        scp: options of :class:`shift.schedules.scp.SCPConfig`; its steps count from the start of each rung.
    """

    scp: SCPConfig

    def __init__(
        self,
        max_loops: int,
        total_steps: int,
        rungs: list[int] | tuple[int, ...] | None = None,
        shares: list[float] | tuple[float, ...] | None = None,
        keep: float = 1.0,
        **scp: Any,
    ) -> None:
        super().__init__(max_loops, total_steps)
        check(is_number(keep) and 0 <= keep <= 1, "keep", keep, "a number in [0, 1]")
        self.keep = keep
        rungs = doublings(max_loops) if rungs is None else rungs
        good = isinstance(rungs, (list, tuple)) and all(map(is_int, rungs)) and max_loops in rungs[-1:]
        good = good and list(rungs) == sorted(set(rungs)) and rungs[0] >= 1
        check(good, "rungs", rungs, f"a list of rising ints >= 1 that ends with max_loops = {max_loops}")
        self.rungs, self.rung = tuple(rungs), 0
        shares = () if shares is None else shares
        good = isinstance(shares, (list, tuple)) and len(shares) in (0, len(rungs) - 1)
        good = good and all(is_number(x) and 0 < x <= 1 for x in shares)
        check(
            good, "shares", shares, f"a list of {len(rungs) - 1} numbers in (0, 1], one a rung but the last"
        )
        check(
            not (shares and "max_steps" in scp), "max_steps", scp.get("max_steps"), "left out beside shares"
        )
        self.most_steps = [max(1, round(share * total_steps)) for share in shares]
        self.scp = SCPConfig(**scp)
        self.criterion = self._fresh_criterion()

    def _fresh_criterion(self) -> SCP:
        """The criterion of the rung that begins."""
        if self.rung >= len(self.most_steps):
            return SCP(self.scp)
        most = self.most_steps[self.rung]
        # So that a look falls where the share ends. Two at least: the first has nothing to compare with.
        looks = max(2, math.ceil(most / self.scp.interval))
        interval = max(1, most // looks)
        most, least = looks * interval, min(self.scp.min_steps, looks * interval - 1)
        return SCP(dataclasses.replace(self.scp, interval=interval, min_steps=least, max_steps=most))

    def step(self, step: int, signals: Signals | None) -> Decision:
        look = None
        if signals is not None and self.rung < len(self.rungs) - 1:
            look = self.criterion.observe(signals)
        if look is None:
            return Decision(self.rungs[self.rung])
        if look.fired:
            self.rung += 1
            self.criterion = self._fresh_criterion()
        # The run's step; the criterion counts finite steps from the start of the rung.
        look = dataclasses.replace(look, step=step)
        return Decision(self.rungs[self.rung], look.fired, self.keep, (look,))

    def state_dict(self) -> dict[str, Any]:
        return {"rung": self.rung, "criterion": self.criterion.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        good = {"rung", "criterion"} <= state.keys() and is_int(state["rung"])
        good = good and 0 <= state["rung"] < len(self.rungs)
        allowed = f"what state_dict() of a schedule with the rungs {self.rungs} gave"
        check(good, "state", state, allowed)
        self.rung = state["rung"]
        self.criterion = self._fresh_criterion()
        self.criterion.load_state_dict(state["criterion"])


class ShiftSchedule(Ladder):
    """SHIFT (arXiv 2510.10089): Stage I with one loop, Stage II with ``max_loops`` once SCP has fired.

    Args: as those of :class:`Ladder`, but for ``rungs``.
    """

    def __init__(
        self,
        max_loops: int,
        total_steps: int,
        shares: list[float] | tuple[float, ...] | None = None,
        keep: float = 1.0,
        **scp: Any,
    ) -> None:
        rungs = (1, max_loops) if max_loops > 1 else (1,)
        super().__init__(max_loops, total_steps, rungs, shares, keep, **scp)


class Climb(Ladder):
    """Our own: one loop for a twentieth of the run, T // 2 until half of it, then T = ``max_loops``.

    A stage that has taken half of the loss away in its time goes on until SCP fires: there fewer loops may be
    enough. What a stage has learnt with too few loops is as often in the way of what comes as it is of use,
    so at a switch the weights go half the way back to where they began. Why so, and how it compares with
    other schedules: ``benchmarks/savings/NOTES.md``.

    Args:
        max_loops, total_steps: see :class:`LoopSchedule`.
        shares: of all steps, with one loop and in the middle.
        middle: loops in the middle are T / 2 rounded ``down`` (with T = 3 there is no middle) or ``up``.
        enough: a stage goes on while the loss is at most this share of what it was when the stage began.
        keep: at each switch, of what training has changed; see :class:`LoopSchedule`.
        scp: options of :class:`shift.schedules.scp.SCPConfig` but ``min_steps`` and ``max_steps``.
    """

    def __init__(
        self,
        max_loops: int,
        total_steps: int,
        shares: list[float] | tuple[float, ...] = (0.05, 0.45),
        middle: str = "down",
        enough: float = 0.5,
        keep: float = 0.5,
        **scp: Any,
    ) -> None:
        check(is_int(max_loops) and max_loops >= 1, "max_loops", max_loops, "an int >= 1")
        good = isinstance(shares, (list, tuple)) and len(shares) == 2
        check(good, "shares", shares, "a list of two numbers in (0, 1]")
        check(middle in ("down", "up"), "middle", middle, "'down' or 'up'")
        check("min_steps" not in scp, "min_steps", scp.get("min_steps"), "left out: shares say how long")
        rungs = sorted({1, max(1, (max_loops + (middle == "up")) // 2), max_loops})
        shares = list(shares)[: len(rungs) - 1]
        super().__init__(max_loops, total_steps, rungs, shares, keep, enough=enough, **scp)

    def _fresh_criterion(self) -> SCP:
        """A criterion that has no say before the rung's time is up."""
        config = super()._fresh_criterion().config
        return SCP(dataclasses.replace(config, min_steps=(config.max_steps or 1) - 1))


SHIFT = Declaration(
    "shift",
    ShiftSchedule,
    decided_by="criterion",
    baseline=False,
    families=(Family("shift", "SHIFT", "#D55E00", {}, "keep", "SHIFT, keep = {value}"),),
)
LADDER = Declaration(
    "ladder",
    Ladder,
    decided_by="criterion",
    baseline=True,
    families=(Family("ladder", "SHIFT ladder", "#E69F00"),),
    options_of="shift",
)
CLIMB = Declaration(
    "climb", Climb, decided_by="criterion", baseline=False, families=(Family("climb", "Climb", "#000000"),)
)
