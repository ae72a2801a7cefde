"""Predictions of Gong et al. (arXiv 2510.10089) as claims about a number a seed, and the rule that decides.

The rule, written down before the runs were surveyed: a claim is a number for each seed, and a side of a
bound on which it is to lie. With the 95% interval of the mean over seeds (Student's t),

    holds            the whole interval lies on that side
    does not hold    the whole interval lies on the other side
    undecided        neither, or fewer than four seeds have a number

A yes-or-no claim holds with yes on every seed, does not with no on every seed, else it is undecided. The
claims are many and each may err one time in twenty: a single line proves little.

The predictions are told after the abstract and public reviews; the body was not available to us.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import scipy.stats

from benchmarks.landscape import seen as s
from benchmarks.landscape.seen import EASY, HARD, Seen

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
ENOUGH = 4
"""Seeds with a number, of which a claim can be decided."""
QK = ("in_proj_weight.q", "in_proj_weight.k")
REST = ("in_proj_weight.v", "head.weight")
"""Ends of the names of the parameters that the theorem speaks of, and of those that it leaves out."""


@dataclass(frozen=True)
class Claim:
    """``measure`` gives one number a seed (None: it has none; a bool for a yes-or-no claim), which is to lie
    on ``side`` of ``bound``. With ``log`` the number is the logarithm of what is shown and of the bound."""

    topic: str
    prediction: str
    measured: str
    measure: Callable[[Seen], float | bool | None]
    side: Literal["above", "below"] = "above"
    bound: float = 0.0
    log: bool = False
    tasks: tuple[str, ...] = ("markov", "hop")

    @property
    def rule(self) -> str:
        """What must hold, in words."""
        return f"{self.side} {self.bound:g}"


@dataclass(frozen=True)
class Verdict:
    """``estimate`` with its interval, of ``n`` seeds; of a yes-or-no claim the yeses, without one."""

    outcome: str
    n: int
    estimate: float | None = None
    low: float | None = None
    high: float | None = None


def judge(claim: Claim, values: Sequence[float | bool | None]) -> Verdict:
    """Apply the rule to one value a seed."""
    found = [x for x in values if x is not None]
    if len(found) < ENOUGH:
        return Verdict(UNDECIDED, len(found), statistics.mean(found) if found else None)
    if all(isinstance(x, bool) for x in found):
        yes = sum(found)
        return Verdict(HOLDS if yes == len(found) else UNDECIDED if yes else FAILS, len(found), yes)
    mean, low, high = interval(found)
    bound = math.log(claim.bound) if claim.log else claim.bound
    beyond = low > bound if claim.side == "above" else high < bound
    short = high < bound if claim.side == "above" else low > bound
    shown = (math.exp(x) if claim.log else x for x in (mean, low, high))
    return Verdict(HOLDS if beyond else FAILS if short else UNDECIDED, len(found), *shown)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95% t interval."""
    mean, n = statistics.mean(values), len(values)
    half = scipy.stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def _late_difference(quantity: Callable) -> Callable[[Seen], float | None]:
    return lambda seen: s.looped_minus_single(seen, quantity)


def _early_less_late(seen: Seen) -> float | None:
    cosines = s.stage_one_cosines(seen, QK)
    half = len(cosines) // 2
    return float(cosines[:half].mean() - cosines[-half:].mean()) if half else None


def _better_than_time(seen: Seen) -> float | None:
    cosine, step = s.foretold(seen, ("all",), "cost"), s.foretold(seen, None, "cost")
    return None if cosine is None or step is None else -cosine - abs(step)


def _log_progress(point: dict) -> float | None:
    progress = s.hopping("river_progress")(point)
    return math.log(progress) if progress else None


CLAIMS = (
    # Valley
    Claim("Valley", "Single's valley is a U.",
          "U's margin over V, Single, cut 0.1 nats high", lambda x: s.late(x, "single", s.margin)),
    Claim("Valley", "Looped's valley is a V.",
          "U's margin over V, Looped, cut 0.1 nats high", lambda x: s.late(x, "looped", s.margin), "below"),
    Claim("Valley", "Looped's valley is more of a V than Single's.",
          "U's margin over V, Looped less Single", _late_difference(s.margin), "below"),
    Claim("Valley", "Looped's valley has the larger condition number.",
          "κ, Looped over Single; threshold 0.01 of the sharpest",
          lambda x: s.log_ratio(x, "condition", "relative", 0.01), bound=1, log=True),
    Claim("Valley", "Its condition number is larger with one threshold for both, too.",
          f"κ, Looped over Single; threshold {s.COMMON_EPS:g}",
          lambda x: s.log_ratio(x, "condition", "absolute", s.COMMON_EPS), bound=1, log=True),
    Claim("Valley", "κ is the valley's own, not the threshold's (our check).",
          "slope of log κ against log threshold, Looped",
          lambda x: s.exponent_of(x, "condition"), bound=-0.5),
    Claim("Valley", "Looped's cumulative force is far larger.",
          "C, Looped over Single; threshold 0.01 of the sharpest",
          lambda x: s.log_ratio(x, "force", "relative", 0.01), bound=1, log=True),
    Claim("Valley", "The force is larger with one threshold for both, too.",
          f"C, Looped over Single; threshold {s.COMMON_EPS:g}",
          lambda x: s.log_ratio(x, "force", "absolute", s.COMMON_EPS), bound=1, log=True),
    # Phases
    Claim("Phases", "Looped goes through collapse, diversification and stabilisation.",
          "seeds with all three, by effective rank",
          lambda x: s.has_phases(x, "looped", "collapse", "diversification", "stabilisation"),
          tasks=("markov",)),  # hop is surveyed at too few points for three phases
    Claim("Phases", "Single stays static.", "seeds with neither collapse nor diversification",
          lambda x: not any(s.has_phases(x, "single", p) for p in ("collapse", "diversification"))),
    Claim("Phases", "Single's spectrum changes less than Looped's.",
          "largest over smallest effective rank, Looped over Single",
          lambda x: s.log_rank_range(x, "looped") - s.log_rank_range(x, "single"), bound=1, log=True),
    # Hopping
    Claim("Hopping", "Looped hops between the valley's walls.",
          "z-score of sign changes in the valley against random subspaces",
          lambda x: s.late(x, "looped", s.hopping("hops"))),
    Claim("Hopping", "Looped hops more than Single.", "the same, Looped less Single",
          _late_difference(s.hopping("hops"))),
    Claim("Hopping", "Successive valley gradients of Looped point against each other.",
          "their cosine", lambda x: s.late(x, "looped", s.hopping("valley_cosine")), "below"),
    Claim("Hopping", "Looped goes further along the river.",
          "river progress a step, Looped over Single", _late_difference(_log_progress), bound=1, log=True),
    # Upstream
    Claim("Upstream", "Single and Looped share the river upstream: gradients of W_Q, W_K align.",
          "their cosine, mean over Stage I", lambda x: float(s.stage_one_cosines(x, QK).mean())),
    Claim("Upstream", "They align in W_Q, W_K more than in what the theorem leaves out.",
          "cosine of W_Q, W_K less that of W_V, head",
          lambda x: float((s.stage_one_cosines(x, QK) - s.stage_one_cosines(x, REST)).mean())),
    Claim("Upstream", "They align early.", "cosine of W_Q, W_K, first half of Stage I less second",
          _early_less_late),
    Claim("When to switch", "The cosine foretells a good moment to switch (our question).",
          "rank correlation of the whole gradient's cosine with compute to target",
          lambda x: s.foretold(x, ("all",), "cost"), "below"),
    Claim("When to switch", "The cosine of W_Q and W_K alone foretells it.",
          "rank correlation of their cosine with compute to target",
          lambda x: s.foretold(x, QK, "cost"), "below"),
    Claim("When to switch", "The cosine foretells the loss in the end.",
          "rank correlation of the whole gradient's cosine with final loss",
          lambda x: s.foretold(x, ("all",), "loss"), "below"),
    Claim("When to switch", "The cosine foretells more than the step alone.",
          "strength of the first correlation less that of the step's", _better_than_time),
    # Accuracy
    Claim("Accuracy", "Single is perfect on simple samples.",
          "Single's final accuracy on them over that of a reader who knows the rule",
          lambda x: s.final(x.runs["single"], EASY[x.task]) / s.CEILING[x.task], bound=0.95),
    Claim("Accuracy", "Single stagnates on complex samples.",
          "accuracy on them gained in the last third",
          lambda x: s.gain_of_last_third(x.runs["single"], HARD[x.task]), "below", 0.02),
    Claim("Accuracy", "Looped learns complex samples in two phases.",
          "seeds whose curve rises, lulls and rises",
          lambda x: s.two_phases(s.curve(x.runs["looped"], HARD[x.task])[1])),
    Claim("Accuracy", "Looped is better than Single on complex samples.",
          "final accuracy, Looped less Single",
          lambda x: s.final(x.runs["looped"], HARD[x.task]) - s.final(x.runs["single"], HARD[x.task])),
    Claim("Accuracy", "Looped ends at a lower loss.", "final loss, Looped over Single",
          lambda x: math.log(s.final_loss(x, "looped") / s.final_loss(x, "single")), "below", 1, log=True),
    # SHIFT
    Claim("SHIFT", "SHIFT is quicker than Looped.",
          "compute to 98% of Looped's final accuracy, SHIFT over Looped",
          lambda x: s.log_cost_ratio(x, "shift"), "below", 1, log=True),
    Claim("SHIFT", "Without loss of accuracy.", "final accuracy, SHIFT less Looped",
          lambda x: s.final_accuracy(x, "shift") - s.final_accuracy(x, "looped"), "above", -0.01),
    Claim("SHIFT", "Accuracy drops sharply at the switch (a review).",
          "first evaluation after the switch less last before it", s.jump_at_switch, "below", -0.02),
)  # fmt: skip
