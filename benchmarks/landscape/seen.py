"""What one seed of one task showed: its runs, read, and the numbers that the claims are about."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.landscape.study import ARMS, SURVEYS, SWITCHES, arms_of, run_dir
from shift.comparison.results import first_crossing
from shift.landscape.spectrum import Spectrum
from shift.landscape.valley import exponent, sensitivity, split, threshold
from shift.run.record import Run, read_run
from shift.tasks.markov import Markov

SHARE = 0.98
"""The target: this share of the accuracy at which Looped ended on the same seed."""
COMMON_EPS = 0.1
"""A threshold between river and valley in loss per squared weight, the same for all runs."""
HEIGHT = "0.1"
"""Nats up the walls at which U or V is decided; of those surveyed, neither the floor nor the sky."""
EASY = {"markov": ("simple",), "hop": ("1 hop",)}
HARD = {"markov": ("complex",), "hop": ("3 hops", "4 hops")}
"""Groups that one pass can, and cannot, learn."""
CEILING = {"markov": Markov().ceiling, "hop": 1.0}
"""The accuracy of a reader who knows the rule."""
TWICE = 2.0
"""A later phase learns at least so many times as fast as the lull before it, ..."""
REAL_GAIN = 0.03
"""... and gains at least so much accuracy."""


@dataclass(frozen=True)
class Seen:
    """``runs`` by arm, the fixed switches as ``fixed:<step>``; ``surveys`` of :data:`ARMS`; ``exact``: all
    eigenvalues of theirs at the end, of the toy; ``upstream``: cosines of Single's and Looped's gradients by
    step of Single, then by parameter."""

    task: str
    runs: Mapping[str, Run]
    surveys: Mapping[str, dict[str, Any]]
    exact: Mapping[str, list[float]]
    upstream: Mapping[int, Mapping[str, float]]

    @property
    def switch_step(self) -> int:
        """Where SHIFT switched; the end if it never did."""
        result = self.runs["shift"].result
        return result["steps"] if result["switch_step"] is None else result["switch_step"]


def read_seed(work: Path, task: str, seed: int) -> Seen:
    """Read the run directories of one seed."""
    path = {arm: run_dir(work, task, arm, seed) for arm in arms_of(task)}
    upstream = json.loads((path["single"] / "upstream.json").read_text())
    return Seen(
        task,
        {arm: read_run(path[arm]) for arm in path},
        {arm: json.loads((path[arm] / "survey.json").read_text()) for arm in ARMS},
        {arm: json.loads(p.read_text()) for arm in ARMS if (p := path[arm] / "exact.json").is_file()},
        {int(step): cosines for step, cosines in upstream.items()},
    )


# The landscape in the second half of the training


def late(seen: Seen, arm: str, quantity: Callable[[dict[str, Any]], float | None]) -> float | None:
    """Mean of a quantity over the points in the second half of a run; None where no point has it."""
    half = seen.runs[arm].result["steps"] / 2
    found = [quantity(p) for p in seen.surveys[arm]["points"] if p["step"] >= half]
    values = [x for x in found if x is not None]
    return statistics.mean(values) if values else None


def looped_minus_single(seen: Seen, quantity: Callable[[dict[str, Any]], float | None]) -> float | None:
    """Difference of the late means; of logs it is the log of a ratio."""
    looped, single = late(seen, "looped", quantity), late(seen, "single", quantity)
    return None if looped is None or single is None else looped - single


def log_ratio(seen: Seen, quantity: str, rule: str, value: float) -> float | None:
    """log of a quantity of the split (``condition``, ``force``), Looped's over Single's.

    Of all eigenvalues at the end where they are known, else of the densities in the second half.
    """
    logs = []
    for arm in ("looped", "single"):
        found = [getattr(split(s, threshold(s, rule, value)), quantity) for s in spectra(seen, arm)]
        found = [math.log(x) for x in found if x]
        if not found:
            return None
        logs.append(statistics.mean(found))
    return logs[0] - logs[1]


def exponent_of(seen: Seen, quantity: str) -> float | None:
    """How a quantity of Looped's split hangs on the threshold: -1: it measures the threshold."""
    rule, value = SURVEYS[seen.task].rule, SURVEYS[seen.task].threshold
    found = [exponent(sensitivity(s, rule, value), quantity) for s in spectra(seen, "looped")]
    values = [x for x in found if x is not None]
    return statistics.mean(values) if values else None


def spectra(seen: Seen, arm: str) -> list[Spectrum]:
    """All eigenvalues at the end where they are known, else the densities in the second half."""
    if arm in seen.exact:
        values = np.array(seen.exact[arm])
        return [Spectrum(values, np.ones(len(values)))]
    half = seen.runs[arm].result["steps"] / 2
    points = [p for p in seen.surveys[arm]["points"] if p["step"] >= half]
    return [Spectrum(*(np.array(x) for x in p["spectrum"])) for p in points]


def margin(point: dict[str, Any]) -> float:
    """How much better a U than a V fits the cut through the sharpest direction, in [-1, 1]."""
    return point["cuts"][HEIGHT]["margin"]


def hopping(name: str) -> Callable[[dict[str, Any]], float | None]:
    """A measure of :class:`shift.landscape.hopping.Hopping`."""
    return lambda point: point["hopping"][name] if "hopping" in point else None


# Phases


def has_phases(seen: Seen, arm: str, *names: str) -> bool:
    """Whether the run's effective rank went through all of these."""
    return set(names) <= set(seen.surveys[arm]["phases"])


def log_rank_range(seen: Seen, arm: str) -> float:
    """log of the largest over the smallest effective rank."""
    ranks = [p["effective_rank"] for p in seen.surveys[arm]["points"]]
    return float(np.log(max(ranks) / min(ranks)))


# Accuracy


def curve(run: Run, groups: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean held-out accuracy over some groups at each."""
    rows = run.of_kind("eval")
    return (
        np.array([row["step"] for row in rows]),
        np.array([statistics.mean(row["groups"][name] for name in groups) for row in rows]),
    )


def final(run: Run, groups: tuple[str, ...]) -> float:
    """Accuracy at the end; mean of the last five evaluations, which take turns on luck."""
    return float(curve(run, groups)[1][-5:].mean())


def final_accuracy(seen: Seen, arm: str) -> float:
    """The same over all read positions."""
    return statistics.mean(row["accuracy"] for row in seen.runs[arm].of_kind("eval")[-5:])


def final_loss(seen: Seen, arm: str) -> float:
    """Held-out loss at the end, in nats; mean of five."""
    return statistics.mean(row["loss"] for row in seen.runs[arm].of_kind("eval")[-5:])


def gain_of_last_third(run: Run, groups: tuple[str, ...]) -> float:
    """How much accuracy the last third of the training added, from one mean of five to the next."""
    accuracy = curve(run, groups)[1]
    third = 2 * len(accuracy) // 3
    return float(accuracy[-5:].mean() - accuracy[third - 2 : third + 3].mean())


def two_phases(accuracy: np.ndarray) -> bool:
    """Whether a curve rises, lulls, and rises again.

    In windows of a fifth of the training: some window gains at least :data:`REAL_GAIN`, a later one lulls,
    and after that one gains at least :data:`REAL_GAIN` and :data:`TWICE` as much as the lull.
    """
    width = len(accuracy) // 5
    smooth = np.convolve(accuracy, np.ones(5) / 5, mode="valid")
    gains = smooth[width:] - smooth[:-width]
    for i in range(width, len(gains) - width):
        before, lull, after = gains[: i - width + 1].max(), gains[i], gains[i + width :].max()
        if min(before, after) >= REAL_GAIN and after >= TWICE * lull and before >= TWICE * lull:
            return True
    return False


# SHIFT, and when to switch


def cost(seen: Seen, arm: str) -> float | None:
    """Training FLOPs to the target; None: never within the run."""
    target = SHARE * final_accuracy(seen, "looped")
    crossing = first_crossing(seen.runs[arm].of_kind("eval"), target)
    return None if crossing is None else crossing["flops"]


def log_cost_ratio(seen: Seen, arm: str) -> float:
    """log of the cost over Looped's; never counts as all of Looped's compute, or all of the run's if more."""
    all_of = {name: seen.runs[name].result["flops_total"] for name in ("looped", arm)}
    looped, own = cost(seen, "looped") or all_of["looped"], cost(seen, arm) or max(all_of.values())
    return math.log(own / looped)


def jump_at_switch(seen: Seen) -> float | None:
    """Accuracy at the first evaluation after SHIFT's switch less that at the last before; None: no switch."""
    if seen.runs["shift"].result["switch_step"] is None:
        return None
    rows = seen.runs["shift"].of_kind("eval")
    after = next((i for i, row in enumerate(rows) if row["step"] > seen.switch_step), None)
    return None if not after else rows[after]["accuracy"] - rows[after - 1]["accuracy"]


def stage_one_cosines(seen: Seen, names: tuple[str, ...]) -> np.ndarray:
    """Mean cosine over some parameters, at each recorded step of Single before SHIFT switched."""
    steps = [step for step in sorted(seen.upstream) if step < seen.switch_step]
    return np.array([cosine(seen, step, names) for step in steps])


def cosine(seen: Seen, step: int, names: tuple[str, ...]) -> float:
    """Mean cosine over parameters, named by the ends of their names."""
    found = [c for name, c in seen.upstream[step].items() if name.endswith(names)]
    return statistics.mean(found)


def has_switches(seen: Seen) -> bool:
    """Whether all runs with a fixed switch are done."""
    return all(seen.runs[f"fixed:{step}"].result for step in SWITCHES[seen.task])


def foretold(seen: Seen, names: tuple[str, ...] | None, outcome: str) -> float | None:
    """Spearman's correlation, over the fixed switches, of the cosine (``names`` None: of the step itself) at
    the switch with ``cost`` (to the target) or ``loss`` (at the end); None where one of them is constant, or
    the switches were not trained."""
    x: list[float] = []
    y: list[float] = []
    if not has_switches(seen):
        return None
    for step in SWITCHES[seen.task]:
        arm = f"fixed:{step}"
        x.append(step if names is None else cosine(seen, step, names))
        if outcome == "cost":
            found = cost(seen, arm)
            y.append(np.inf if found is None else found)
        else:
            y.append(final_loss(seen, arm))
    if len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return float(spearmanr(x, y).statistic)
