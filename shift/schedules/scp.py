"""SCP, the SHIFT criterion with patience: has the loss reached a plateau, with stable gradients?

Loss and gradient norm stay on the device until a look, every ``interval`` steps, reads those of all steps
since the last look in one transfer. They are smoothed by a running median of three, which takes out a lone
spike of any size, and then by a bias-corrected exponential average. A look is a hit when

    A  |smoothed loss now - a look ago|           < delta_1    (relative to a look ago,
    B  |smoothed gradient norm now - a look ago|  < delta_2     or absolute)

and the criterion fires after ``patience`` hits in a row. A loss that rises by delta_1
or more from look to look is no plateau either; one that rises by less is. Steps with a non-finite value do
not exist for it: they are not averaged, not counted, and bring no look nearer.

The idea is Gong et al.'s (arXiv 2510.10089). This form and its defaults are ours: see ``docs/schedules.md``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shift.reading import is_int, is_number
from shift_kernels.errors import input_error, type_error


@dataclasses.dataclass(frozen=True)
class Signals:
    """What a step measured: 0-d tensors on the training device, before clipping. May be non-finite."""

    loss: Tensor
    grad_norm: Tensor

    def __post_init__(self) -> None:
        for name, x in vars(self).items():
            if not isinstance(x, Tensor) or x.ndim:
                given = list(x.shape) if isinstance(x, Tensor) else x
                raise type_error(
                    "Signals", name, given, "a tensor without dimensions", "Use torch.tensor(x)."
                )


@dataclasses.dataclass(frozen=True)
class Look:
    """One look of the criterion. All numbers are finite.

    ``step``: steps so far; ``loss_ema``, ``grad_ema``: the smoothed signals; ``improvement`` (falling: above
    0), ``grad_change``: what A and B compare with their limits; ``hits``: the count after this look.
    """

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
        change: ``relative`` or ``absolute`` differences; or ``progress``: A is relative to all that the loss
            has gained since the first look, so that a plateau before anything was learnt is none.
        reset: what a miss does to the hits: ``hard`` forgets them all, ``decay`` one of them.
        min_steps: looks before this step are no hits.
        max_steps: fire at the first look at or after this step in any case; None: never by force.
        enough: but not by force where the loss since the last look is at most this share of the first steps':
            what has learnt so much may go on until it stands still. 0: whatever the loss.

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
    enough: float = 0.0

    def __post_init__(self) -> None:
        def check(name: str, good: bool, allowed: str) -> None:
            if not good:
                raise input_error("SCP", name, getattr(self, name), allowed, "Change the schedule's options.")

        for name in ("delta_1", "delta_2"):
            check(name, is_number(getattr(self, name)) and getattr(self, name) > 0, "a finite number > 0")
        for name in ("patience", "interval"):
            check(name, is_int(getattr(self, name)) and getattr(self, name) >= 1, "an int >= 1")
        check("beta", is_number(self.beta) and 0 <= self.beta < 1, "a number in [0, 1)")
        for name, choices in (
            ("mode", ("joint", "sequential")),
            ("change", ("relative", "absolute", "progress")),
            ("reset", ("hard", "decay")),
        ):
            check(name, getattr(self, name) in choices, " or ".join(map(repr, choices)))
        check("min_steps", is_int(self.min_steps) and self.min_steps >= 0, "an int >= 0")
        good = self.max_steps is None or (is_int(self.max_steps) and self.max_steps > self.min_steps)
        check("max_steps", good, "None or an int above min_steps")
        check("enough", is_number(self.enough) and 0 <= self.enough < 1, "a number in [0, 1)")


@dataclasses.dataclass
class _State:
    """What the criterion remembers from look to look, in plain numbers. Pairs are of loss and grad_norm."""

    steps: int = 0
    hits: int = 0
    plateau_held: bool = False  # of mode="sequential": A is done with, B is being watched
    last_two: list[list[float]] = dataclasses.field(default_factory=list)
    sums: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])
    weight: float = 0.0  # sums / weight is the average; the weight tends to 1
    first: list[float] | None = None  # the averages at the first look,
    before: list[float] | None = None  # and at the last
    first_loss: float | None = None  # median of the first three steps


class SCP:
    """The criterion. Feed it every step; it answers with a :class:`Look` where one is due.

    Its decision is the same on all ranks of a process group: signals are averaged over them at a look, so
    every rank must feed every step.
    """

    def __init__(self, config: SCPConfig | None = None) -> None:
        if not isinstance(config, SCPConfig | None):
            raise type_error("SCP", "config", config, "an SCPConfig, or None", "Build one: SCPConfig(...).")
        self.config = config or SCPConfig()
        self._state = _State()
        # [loss, grad_norm] float32 of each step since the last look; a read drops those that are not finite.
        self._pending: list[Tensor] = []

    def observe(self, signals: Signals) -> Look | None:
        """Take in one step; waits for the device only where a look may be due."""
        self._pending.append(torch.stack((signals.loss, signals.grad_norm)).detach().float())
        if len(self._pending) < self.config.interval:
            return None
        on_device = self._stacked()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(on_device)
            on_device /= dist.get_world_size()
        pairs = on_device.tolist()
        finite = [math.isfinite(loss) and math.isfinite(grad_norm) for loss, grad_norm in pairs]
        if all(finite):
            self._pending = []
            return self._look(pairs)
        self._pending = [p for p, good in zip(self._pending, finite, strict=True) if good]
        return None

    @staticmethod
    def replay(
        config: SCPConfig, losses: Sequence[float | None], grad_norms: Sequence[float | None]
    ) -> int | None:
        """The step at which a criterion would have fired that had watched a run on record; None: never.

        Args:
            config: of the criterion.
            losses, grad_norms: of the run's steps; None: not finite.

        Raises:
            ShiftInputError: not as many of one as of the other.
        """
        if len(losses) != len(grad_norms):
            given = f"{len(grad_norms)} of them"
            raise input_error("SCP.replay", "grad_norms", given, f"{len(losses)}, as losses", "Give both.")
        scp, pending = SCP(config), []
        for step, pair in enumerate(zip(losses, grad_norms, strict=True), start=1):
            finite = [x for x in pair if x is not None and math.isfinite(x)]
            if len(finite) == len(pair):
                pending.append(finite)
            if len(pending) == config.interval:
                look = scp._look(pending)
                if look is not None and look.fired:
                    return step
                pending = []
        return None

    def _stacked(self) -> Tensor:
        device = self._pending[-1].device  # in a resumed run the first ones are on the host
        return torch.stack([p.to(device) for p in self._pending])

    def _look(self, pairs: list[list[float]]) -> Look | None:
        """Take in the steps since the last look, and compare."""
        c, s = self.config, self._state
        s.steps += c.interval
        losses = [loss for loss, _ in pairs]
        s.first_loss = statistics.median(losses[:3]) if s.first_loss is None else s.first_loss
        # Not the average: it still holds much of the loss of 50 steps ago, of a short run's beginning.
        much_is_left = statistics.median(losses) > c.enough * s.first_loss
        overdue = c.max_steps is not None and s.steps >= c.max_steps and much_is_left
        for pair in pairs:
            self._average(pair)
        if not s.weight:
            return None  # an interval too short for a median
        now = [x / s.weight for x in s.sums]
        before, s.before = s.before, now
        if before is None or s.first is None:
            s.first = now
            return None

        gain, change = before[0] - now[0], abs(now[1] - before[1])
        loss_unit = {"relative": abs(before[0]), "absolute": 1.0, "progress": s.first[0] - now[0]}[c.change]
        grad_unit = 1.0 if c.change == "absolute" else abs(before[1])
        # Products, not quotients: a unit may be 0, and where all in all nothing was gained it is negative.
        plateau, stable = abs(gain) < c.delta_1 * loss_unit, change < c.delta_2 * grad_unit
        fired = self._count(plateau, stable) or overdue
        improvement, grad_change = gain / (abs(loss_unit) or 1.0), change / (grad_unit or 1.0)
        return Look(s.steps, now[0], now[1], improvement, grad_change, s.hits, fired)

    def _average(self, pair: list[float]) -> None:
        """Let one step into the averages, as the median of itself and the two before it."""
        c, s = self.config, self._state
        if len(s.last_two) == 2:
            for i in range(2):
                median = sorted((s.last_two[0][i], s.last_two[1][i], pair[i]))[1]
                s.sums[i] = c.beta * s.sums[i] + (1 - c.beta) * median
            s.weight = c.beta * s.weight + 1 - c.beta
        s.last_two = [*s.last_two[-1:], pair]

    def _count(self, plateau: bool, stable: bool) -> bool:
        """Count this look; whether the signals say to fire."""
        c, s = self.config, self._state
        if c.mode == "joint":
            hit = plateau and stable
        else:
            hit = stable if s.plateau_held else plateau
        if not hit or s.steps < c.min_steps:
            s.hits = 0 if c.reset == "hard" else max(s.hits - 1, 0)
            return False
        s.hits += 1
        if s.hits < c.patience:
            return False
        if c.mode == "sequential" and not s.plateau_held:
            s.plateau_held, s.hits = True, 0
            return False
        return True

    def state_dict(self) -> dict[str, Any]:
        """Finite plain numbers; loading them continues exactly. Reads what is pending, of this rank alone."""
        pending = self._stacked().tolist() if self._pending else []
        pending = [pair for pair in pending if all(map(math.isfinite, pair))]
        return {**dataclasses.asdict(self._state), "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave.

        Raises:
            ShiftInputError: something else.
        """
        known = {"pending", *(f.name for f in dataclasses.fields(_State))}
        if "pending" not in state or not state.keys() <= known:  # older ones hold fewer
            raise input_error("SCP", "state", state, "what state_dict() gave", "Give that of the same class.")
        state = copy.deepcopy(state)
        self._pending = list(torch.tensor(state.pop("pending"), dtype=torch.float32))
        self._state = _State(**state)
