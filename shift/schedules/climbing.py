"""Who decides how many loops a step runs. One protocol; every schedule is a baseline of every other.

constant   T always                         fixed    1, then T from a given step on
shift      1, then T when SCP fires         ladder   1, 2, 4, .., T: SCP at each rung
climb      1, T // 2, T: each in its time, or longer while the loss is low; at a switch half is undone
linear, sqrt, staged   rise from 1 to T over the first part of the run
random     drawn anew at every step
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from shift.schedules.scp import SCP, Look, SCPConfig, Signals, is_int, is_number
from shift_kernels.errors import input_error


class LoopSchedule(ABC):
    """The number of loops of every step.

    Args:
        max_loops: T, the most it ever asks for.
        total_steps: length of the run, for what is given as a fraction of it.

    Raises:
        ShiftInputError: a value outside what is allowed, here and in all subclasses.
    """

    switch_step: int | None = None
    """The step (0-based) at which the last switch happened; None before, and where nothing switches."""

    keep: float = 1.0
    """At a switch, the share that is kept of all that training has changed in the weights. Below 1 Adam's
    moments, which belong to the weights that are left, are forgotten too."""

    def __init__(self, max_loops: int, total_steps: int) -> None:
        _check(is_int(max_loops) and max_loops >= 1, "max_loops", max_loops, "an int >= 1")
        _check(is_int(total_steps) and total_steps >= 1, "total_steps", total_steps, "an int >= 1")
        self.max_loops, self.total_steps = max_loops, total_steps
        self._looks: list[Look] = []

    @abstractmethod
    def n_loops(self, step: int, signals: Signals | None) -> int:
        """Loops of step ``step`` (0, 1, 2, ...; call it once for each, in order).

        Args:
            step: steps done before this one.
            signals: what the step before measured; None at step 0.
        """

    @property
    def looks(self) -> list[Look]:
        """The criterion's looks since the last :meth:`drain_looks`; none where there is no criterion."""
        return list(self._looks)

    def drain_looks(self) -> list[Look]:
        """:attr:`looks`, which are then forgotten. They are no part of the state: drain before saving."""
        looks, self._looks = self._looks, []
        return looks

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values; schedules that only count steps have none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (most have nothing to load)
        """Continue from what :meth:`state_dict` gave."""


class Constant(LoopSchedule):
    """``n_loops`` at every step (default: ``max_loops``): Looped-Attn, or with 1 Single-Attn."""

    def __init__(self, max_loops: int, total_steps: int, n_loops: int | None = None) -> None:
        super().__init__(max_loops, total_steps)
        if n_loops is not None:
            _check(is_int(n_loops) and n_loops >= 1, "n_loops", n_loops, "an int >= 1")
            self.max_loops = n_loops

    def n_loops(self, step: int, signals: Signals | None) -> int:
        return self.max_loops


class FixedSwitch(LoopSchedule):
    """1 loop, and ``max_loops`` from ``at`` on: a step (int), or a fraction of all steps (float below 1).

    The fraction is rounded to the nearest step. An ``at`` beyond the last step never switches.
    """

    def __init__(self, max_loops: int, total_steps: int, at: float = 0.5) -> None:
        super().__init__(max_loops, total_steps)
        good = (is_int(at) and at >= 0) or (isinstance(at, float) and 0 <= at < 1)
        _check(good, "at", at, "a step (int >= 0) or a fraction of all steps (float in [0, 1))")
        self.at = at if isinstance(at, int) else round(at * total_steps)

    def n_loops(self, step: int, signals: Signals | None) -> int:
        self.switch_step = self.at if 0 < self.at <= step else None
        return 1 if step < self.at else self.max_loops


class Ladder(LoopSchedule):
    """Climbs the ``rungs`` in turn, one each time a fresh criterion fires.

    Args:
        max_loops, total_steps: see :class:`LoopSchedule`.
        rungs: rising loop counts that end at ``max_loops``; default 1, 2, 4, .., ``max_loops``.
        shares: of all steps, at most, on each rung but the last; default: SCP alone decides.
        keep: at each switch, of what training has changed; see :class:`LoopSchedule`.
        scp: options of :class:`shift.schedules.scp.SCPConfig`; its steps count from the start of each rung.
    """

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
        _check(is_number(keep) and 0 <= keep <= 1, "keep", keep, "a number in [0, 1]")
        self.keep = keep
        rungs = _doublings(max_loops) if rungs is None else rungs
        good = isinstance(rungs, (list, tuple)) and all(map(is_int, rungs)) and max_loops in rungs[-1:]
        good = good and list(rungs) == sorted(set(rungs)) and rungs[0] >= 1
        _check(good, "rungs", rungs, f"a list of rising ints >= 1 that ends with max_loops = {max_loops}")
        self.rungs, self.rung = tuple(rungs), 0
        shares = () if shares is None else shares
        good = isinstance(shares, (list, tuple)) and len(shares) in (0, len(rungs) - 1)
        good = good and all(is_number(x) and 0 < x <= 1 for x in shares)
        _check(
            good, "shares", shares, f"a list of {len(rungs) - 1} numbers in (0, 1], one a rung but the last"
        )
        self.most_steps = [max(1, round(share * total_steps)) for share in shares]
        self.config = SCPConfig(**scp)
        self.criterion = self._fresh_criterion()

    def _fresh_criterion(self) -> SCP:
        """The criterion of the rung that begins."""
        if self.rung >= len(self.most_steps):
            return SCP(self.config)
        most = self.most_steps[self.rung]
        # So that a look falls where the share ends. Two at least: the first has nothing to compare with.
        looks = max(2, math.ceil(most / self.config.interval))
        interval = max(1, most // looks)
        return SCP(dataclasses.replace(self.config, interval=interval, max_steps=looks * interval))

    def n_loops(self, step: int, signals: Signals | None) -> int:
        if signals is not None and self.rung < len(self.rungs) - 1:
            look = self.criterion.observe(signals)
            if look is not None:
                # The run's step; the criterion counts finite steps from the start of the rung.
                self._looks.append(dataclasses.replace(look, step=step))
                if look.fired:
                    self.rung, self.switch_step = self.rung + 1, step
                    self.criterion = self._fresh_criterion()
        return self.rungs[self.rung]

    def state_dict(self) -> dict[str, Any]:
        criterion = self.criterion.state_dict()
        return {"rung": self.rung, "switch_step": self.switch_step, "criterion": criterion}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rung, self.switch_step = state["rung"], state["switch_step"]
        self.criterion = self._fresh_criterion()
        self.criterion.load_state_dict(state["criterion"])


class ShiftSchedule(Ladder):
    """SHIFT (arXiv 2510.10089): Stage I with one loop, Stage II with ``max_loops`` once SCP has fired."""

    def __init__(self, max_loops: int, total_steps: int, **scp: Any) -> None:
        super().__init__(max_loops, total_steps, rungs=(1, max_loops) if max_loops > 1 else (1,), **scp)


class Climb(Ladder):
    """Our own: one loop for a twentieth of the run, T // 2 until half of it, then T = ``max_loops``.

    A stage that has taken half of the loss away in its time goes on until SCP fires: there fewer loops may be
    enough. What a stage has learnt with too few loops is as often in the way of what comes as it is of use,
    so at a switch the weights go half the way back to where they began. Why so, and how it compares with
    other schedules: ``benchmarks/savings/NOTES.md``.

    Args:
        max_loops, total_steps: see :class:`LoopSchedule`.
        shares: of all steps, with one loop and with T // 2.
        enough: a stage goes on while the loss is at most this share of what it was when the stage began.
        keep: at each switch, of what training has changed; see :class:`LoopSchedule`.
        scp: options of :class:`shift.schedules.scp.SCPConfig`.
    """

    def __init__(
        self,
        max_loops: int,
        total_steps: int,
        shares: list[float] | tuple[float, ...] = (0.05, 0.45),
        enough: float = 0.5,
        keep: float = 0.5,
        **scp: Any,
    ) -> None:
        _check(is_int(max_loops) and max_loops >= 1, "max_loops", max_loops, "an int >= 1")
        good = isinstance(shares, (list, tuple)) and len(shares) == 2
        _check(good, "shares", shares, "a list of two numbers in (0, 1]")
        rungs = sorted({1, max(1, max_loops // 2), max_loops})
        shares = list(shares)[: len(rungs) - 1]
        super().__init__(max_loops, total_steps, rungs, shares, keep, enough=enough, **scp)

    def _fresh_criterion(self) -> SCP:
        """A criterion that has no say before the rung's time is up."""
        config = super()._fresh_criterion().config
        return SCP(dataclasses.replace(config, min_steps=(config.max_steps or 1) - 1))


RAMPS = ("linear", "sqrt", "staged")


class Ramp(LoopSchedule):
    """Rises from 1 to ``max_loops`` over the first ``fraction`` of the steps.

    With s in [0, 1) the position in the ramp: 1 + floor(s (T - 1)) for ``linear``, so that T itself begins
    when the ramp is over and the mean within it is about T / 2; the same with sqrt(s) for ``sqrt`` (early
    loops, as looped language models ramp); ``staged`` doubles: 1, 2, 4, .. below T, for equal times.
    """

    def __init__(self, max_loops: int, total_steps: int, shape: str, fraction: float = 0.5) -> None:
        super().__init__(max_loops, total_steps)
        _check(shape in RAMPS, "shape", shape, " or ".join(map(repr, RAMPS)))
        _check(is_number(fraction) and 0 < fraction <= 1, "fraction", fraction, "a number in (0, 1]")
        self.shape, self.ramp_steps = shape, fraction * total_steps

    def n_loops(self, step: int, signals: Signals | None) -> int:
        s = step / self.ramp_steps
        if s >= 1:
            return self.max_loops
        if self.shape == "staged":
            stages = _doublings(self.max_loops)
            return stages[int(s * (len(stages) - 1))]
        return 1 + int((s if self.shape == "linear" else math.sqrt(s)) * (self.max_loops - 1))


class Random(LoopSchedule):
    """A draw a step that depends on (seed, step) alone, so that any step can be repeated.

    Args:
        max_loops, total_steps: see :class:`LoopSchedule`.
        seed: of the draws.
        distribution: ``uniform`` over 1 .. T; or ``poisson_lognormal``, 1 + Poisson(rate) with a log-normal
            rate of spread 1/2, cut at T (the depth sampling of recurrent-depth language models); or
            ``two_point``, 1 or T.
        mean: of ``two_point``, and of ``poisson_lognormal`` before the cut; default (1 + T) / 2.
        ramp: share of the steps over which T (and the mean) rises linearly from 1; 0: none.
    """

    def __init__(
        self,
        max_loops: int,
        total_steps: int,
        seed: int = 0,
        distribution: str = "uniform",
        mean: float | None = None,
        ramp: float = 0.0,
    ) -> None:
        super().__init__(max_loops, total_steps)
        _check(is_int(seed) and seed >= 0, "seed", seed, "an int >= 0")
        known = ("uniform", "poisson_lognormal", "two_point")
        _check(distribution in known, "distribution", distribution, " or ".join(map(repr, known)))
        mean = (1 + max_loops) / 2 if mean is None else mean
        _check(is_number(mean) and mean >= 1, "mean", mean, "a number >= 1")
        _check(is_number(ramp) and 0 <= ramp <= 1, "ramp", ramp, "a number in [0, 1]")
        self.seed, self.distribution = seed, distribution
        self.mean, self.ramp_steps = mean, ramp * total_steps

    def n_loops(self, step: int, signals: Signals | None) -> int:
        reached = min(1.0, step / self.ramp_steps) if self.ramp_steps else 1.0
        cap = 1 + round(reached * (self.max_loops - 1))
        draw = np.random.default_rng([self.seed, step])
        if self.distribution == "uniform":
            return int(draw.integers(1, cap + 1))
        if self.distribution == "two_point":
            share = (self.mean - 1) / (self.max_loops - 1) if self.max_loops > 1 else 0.0
            return cap if draw.random() < share else 1
        spread = 0.5
        mean_rate = reached * (self.mean - 1)
        rate = mean_rate * math.exp(spread * draw.standard_normal() - spread**2 / 2)
        return min(1 + int(draw.poisson(rate)), cap)


KINDS = ("constant", "fixed", "shift", "ladder", "climb", *RAMPS, "random")


def make_schedule(
    kind: str, *, max_loops: int, total_steps: int, seed: int = 0, **options: Any
) -> LoopSchedule:
    """The schedule of that kind; ``options`` are those of its class.

    Args:
        kind: one of :data:`KINDS`.
        max_loops: T.
        total_steps: length of the run.
        seed: of schedules that draw.

    Raises:
        ShiftInputError: an unknown kind or option, or a value outside what is allowed.
    """
    _check(kind in KINDS, "kind", kind, "one of " + ", ".join(map(repr, KINDS)))
    try:
        if kind in RAMPS:
            return Ramp(max_loops, total_steps, kind, **options)
        if kind == "random":
            return Random(max_loops, total_steps, seed, **options)
        chosen: dict[str, type[LoopSchedule]] = {
            "constant": Constant,
            "fixed": FixedSwitch,
            "shift": ShiftSchedule,
            "ladder": Ladder,
            "climb": Climb,
        }
        return chosen[kind](max_loops, total_steps, **options)
    except TypeError as error:
        raise input_error(
            "make_schedule", "options", options, f"the options of {kind!r} ({error})", "Check their names."
        ) from None


def _doublings(max_loops: int) -> list[int]:
    """1, 2, 4, .. below ``max_loops``, and ``max_loops``."""
    return [2**i for i in range((max_loops - 1).bit_length())] + [max_loops]


def _check(good: object, name: str, value: object, allowed: str) -> None:
    if not good:
        raise input_error("make_schedule", name, value, allowed, "Change the schedule's options.")
