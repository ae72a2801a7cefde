"""Loops drawn anew at every step. What such steps train is meant to run T loops, and is evaluated so."""

from __future__ import annotations

import math

import numpy as np

from shift.reading import is_int, is_number
from shift.schedules.base import Decision, Declaration, Family, LoopSchedule, check
from shift.schedules.scp import Signals


class Random(LoopSchedule):
    """A draw a step that depends on (seed, step) alone, so that any step can be repeated.

    Args:
        max_loops, total_steps: see :class:`LoopSchedule`.
        seed: of the draws.
        distribution: ``uniform`` over 1 .. T; or ``poisson_lognormal``, 1 + Poisson(rate) with a log-normal
            rate of spread 1/2, cut at T (as Huginn draws its depth, arXiv 2502.05171); or
            ``two_point``, 1 or T; or ``inverse_flops``, t loops with a chance in proportion to
            1 / (t + rest), so that every depth gets the same compute.
        mean: of ``two_point``, and of ``poisson_lognormal`` before the cut; default (1 + T) / 2.
        ramp: share of the steps over which T (and the mean) rises linearly from 1; 0: none.
        until: share of the steps that draw; after it T.
        rest: of ``inverse_flops``: FLOPs of all that is not looped over those of one loop; a run takes its
            model's.
    """

    def __init__(
        self,
        max_loops: int,
        total_steps: int,
        seed: int = 0,
        distribution: str = "uniform",
        mean: float | None = None,
        ramp: float = 0.0,
        until: float = 1.0,
        rest: float = 0.0,
    ) -> None:
        super().__init__(max_loops, total_steps)
        check(is_int(seed) and seed >= 0, "seed", seed, "an int >= 0")
        known = ("uniform", "poisson_lognormal", "two_point", "inverse_flops")
        check(distribution in known, "distribution", distribution, " or ".join(map(repr, known)))
        mean = (1 + max_loops) / 2 if mean is None else mean
        check(is_number(mean) and mean >= 1, "mean", mean, "a number >= 1")
        check(is_number(ramp) and 0 <= ramp <= 1, "ramp", ramp, "a number in [0, 1]")
        check(is_number(until) and 0 < until <= 1, "until", until, "a number in (0, 1]")
        check(is_number(rest) and rest >= 0, "rest", rest, "a number >= 0")
        self.seed, self.distribution, self.rest = seed, distribution, rest
        self.mean, self.ramp_steps = mean, ramp * total_steps
        self.drawn_steps = math.inf if until == 1 else until * total_steps

    def step(self, step: int, signals: Signals | None) -> Decision:
        n_loops = self._draw(step) if step < self.drawn_steps else self.max_loops
        return Decision(n_loops, n_eval_loops=self.max_loops)

    def _draw(self, step: int) -> int:
        reached = min(1.0, step / self.ramp_steps) if self.ramp_steps else 1.0
        cap = 1 + round(reached * (self.max_loops - 1))
        draw = np.random.default_rng([self.seed, step])
        if self.distribution == "uniform":
            return int(draw.integers(1, cap + 1))
        if self.distribution == "inverse_flops":
            chances = 1 / (np.arange(1, cap + 1) + self.rest)
            return int(draw.choice(cap, p=chances / chances.sum())) + 1
        if self.distribution == "two_point":
            share = (self.mean - 1) / (self.max_loops - 1) if self.max_loops > 1 else 0.0
            return cap if draw.random() < share else 1
        spread = 0.5
        mean_rate = reached * (self.mean - 1)
        rate = mean_rate * math.exp(spread * draw.standard_normal() - spread**2 / 2)
        return min(1 + int(draw.poisson(rate)), cap)


RANDOM = Declaration(
    "random",
    Random,
    decided_by="chance",
    baseline=True,
    families=(
        Family("random", "Random T", "#332288", {}, "distribution", "Random T, {value}"),
        Family(
            "inverse_flops",
            "Random T by 1/FLOPs",
            "#44AA99",
            {"distribution": "inverse_flops"},
            "until",
            "Random T by 1/FLOPs, until {value}",
        ),
    ),
)
