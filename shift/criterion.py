"""SCP, the SHIFT criterion with patience: has the loss reached a plateau, with stable gradients?

Loss and gradient norm are smoothed (bias-corrected exponential averages that stay on the device) and looked
at every ``interval`` steps, which is the only time that their values reach the host. A look is a hit when

    A  |smoothed loss now - a look ago|           < delta_1  (relative to a look ago, or absolute)
    B  |smoothed gradient norm now - a look ago|  < delta_2

and the criterion fires after ``patience`` hits in a row. A rise of the loss is no plateau either.
The idea is Gong et al.'s (arXiv 2510.10089); this form and its defaults are ours, from a sweep over traces
of Single-Attn on ten tasks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shift_kernels.errors import input_error


@dataclasses.dataclass(frozen=True)
class Signals:
    """What a step measured: 0-d tensors on the training device, before clipping. May be non-finite."""

    loss: Tensor
    grad_norm: Tensor


@dataclasses.dataclass(frozen=True)
class Look:
    """One look of the criterion; ``step`` counts steps done. ``hits`` is the count after this look."""

    step: int
    loss_ema: float
    grad_ema: float
    improvement: float
    grad_change: float
    hits: int
    fired: bool


@dataclasses.dataclass(frozen=True)
class SCPConfig:
    """How the criterion decides.

    Args:
        delta_1: limit of the change of the smoothed loss from look to look.
        delta_2: limit of the change of the smoothed gradient norm.
        patience: hits in a row that are needed.
        interval: steps between two looks.
        beta: decay of the averages a step; 0.98 remembers about 50 steps.
        mode: ``joint``: A and B in the same look; ``sequential``: first A ``patience`` times, then B.
        change: ``relative`` or ``absolute`` differences.
        reset: what a miss does to the hits: ``hard`` forgets them all, ``decay`` one of them.
        min_steps: looks before this step are no hits.
        max_steps: fire at this step at the latest; None: only when the signals say so.

    Raises:
        ShiftInputError: a value outside what is allowed.
    """

    delta_1: float = 0.03
    delta_2: float = 0.2
    patience: int = 5
    interval: int = 20
    beta: float = 0.98
    mode: str = "joint"
    change: str = "relative"
    reset: str = "hard"
    min_steps: int = 0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        def check(name: str, good: bool, allowed: str) -> None:
            if not good:
                raise input_error("SCP", name, getattr(self, name), allowed, "Change the schedule's options.")

        for name in ("delta_1", "delta_2"):
            check(name, _is_number(getattr(self, name)) and getattr(self, name) > 0, "a finite number > 0")
        for name in ("patience", "interval"):
            check(name, _is_int(getattr(self, name)) and getattr(self, name) >= 1, "an int >= 1")
        check("beta", _is_number(self.beta) and 0 <= self.beta < 1, "a number in [0, 1)")
        for name, choices in (
            ("mode", ("joint", "sequential")),
            ("change", ("relative", "absolute")),
            ("reset", ("hard", "decay")),
        ):
            check(name, getattr(self, name) in choices, " or ".join(map(repr, choices)))
        check("min_steps", _is_int(self.min_steps) and self.min_steps >= 0, "an int >= 0")
        good = self.max_steps is None or (_is_int(self.max_steps) and self.max_steps > self.min_steps)
        check("max_steps", good, "None or an int above min_steps")


class SCP:
    """The criterion's state. Feed it every step; it answers with a :class:`Look` where one is due."""

    def __init__(self, config: SCPConfig | None = None) -> None:
        self.config = config or SCPConfig()
        self.steps = 0
        self.hits = 0
        self.stable_phase = False  # of mode="sequential": A has held, B is being watched
        self.before: list[float] | None = None  # smoothed loss and gradient norm at the last look
        # Sums of the two averages, the sum of their weights, finite steps since the last look.
        self._state = torch.zeros(4)

    def observe(self, signals: Signals) -> Look | None:
        """Take in one step; no wait for the device but at a look.

        A step with a non-finite value changes nothing. One value counts at most as twice the average so far,
        so a lone spike moves the average by at most 1 - beta = 2 %: less than delta_1, hence no plateau.
        """
        self.steps += 1
        self._state = _average(self._state, signals, self.config.beta)
        if self.steps % self.config.interval:
            return None
        return self._look()

    def _look(self) -> Look | None:
        c = self.config
        state = self._state
        if dist.is_available() and dist.is_initialized():  # the same decision on all ranks
            state = state.clone()
            dist.all_reduce(state)
            state /= dist.get_world_size()
        loss_sum, grad_sum, weight, counted = state.tolist()
        if counted < c.interval / 2:
            return None  # mostly skipped steps: an average that did not move is no plateau
        self._state[3] = 0
        now = [loss_sum / weight, grad_sum / weight]
        before, self.before = self.before, now
        if before is None:
            return None
        drop, change = before[0] - now[0], abs(now[1] - before[1])
        if c.change == "relative":
            drop, change = _ratio(drop, before[0]), _ratio(change, before[1])
        plateau, stable = abs(drop) < c.delta_1, change < c.delta_2
        forced = c.max_steps is not None and self.steps >= c.max_steps
        fired = self._count(plateau, stable) or forced
        return Look(self.steps, now[0], now[1], drop, change, self.hits, fired)

    def _count(self, plateau: bool, stable: bool) -> bool:
        """Count this look; whether the criterion fires."""
        c = self.config
        if c.mode == "joint":
            hit = plateau and stable
        else:
            hit = stable if self.stable_phase else plateau
        if not hit or self.steps < c.min_steps:
            self.hits = 0 if c.reset == "hard" else max(self.hits - 1, 0)
            return False
        self.hits += 1
        if self.hits < c.patience:
            return False
        if c.mode == "sequential" and not self.stable_phase:
            self.stable_phase, self.hits = True, 0
            return False
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; loading them continues exactly."""
        return {
            "steps": self.steps,
            "hits": self.hits,
            "stable_phase": self.stable_phase,
            "before": self.before,
            "averages": self._state.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        self.steps, self.hits = state["steps"], state["hits"]
        self.stable_phase, self.before = state["stable_phase"], state["before"]
        self._state = torch.tensor(state["averages"])


def _average(state: Tensor, signals: Signals, beta: float) -> Tensor:
    """The next packed state (see :class:`SCP`), on the signals' device and without reading a value."""
    state = state.to(signals.loss.device)
    x = torch.stack([signals.loss, signals.grad_norm]).float()
    mean = state[:2] / state[2]  # NaN before the first step, which fmin and fmax ignore
    x_in_reach = torch.fmin(torch.fmax(x, mean - mean.abs()), mean + mean.abs())
    new = torch.cat([state[:3] * beta, state[3:]])
    # Filled on the device: a tensor from Python numbers would wait for it.
    new += torch.cat([(1 - beta) * x_in_reach, x.new_full((1,), 1 - beta), x.new_ones(1)])
    return torch.where(x.isfinite().all(), new, state)


def _ratio(difference: float, base: float) -> float:
    return difference / abs(base) if base else math.copysign(math.inf, difference) if difference else 0.0


def _is_int(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
