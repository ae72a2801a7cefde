"""What every schedule is: a decision a step, and a declaration beside the class.

A *switch* is a step that runs another number of loops than the step before it, because the schedule has
moved on. The *switch step* of a run, wherever one is recorded or reported, is the step (0-based) of its last
switch: from there on all steps run the same number of loops. A run that never changed its number of loops
has no switch step, and neither has one whose loops are drawn anew at every step.
"""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

from shift.reading import is_int
from shift.schedules.scp import Look, SCPConfig, Signals
from shift_kernels.errors import input_error


@dataclass(frozen=True)
class Decision:
    """What a schedule says to one step.

    Args:
        n_loops: loops of this step.
        switched: True if this step is a switch (see the top of this file).
        keep: at a switch, the share that is kept of all that training has changed in the weights. Below 1
            Adam's moments, which belong to the weights that are left, are forgotten too.
        looks: what the criterion saw before this step; none where no look was due, or there is no criterion.
        n_grad_loops: the last loops, through which the gradient passes; None: through all.
        n_eval_loops: loops to evaluate with after this step; None: ``n_loops``.
    """

    n_loops: int
    switched: bool = False
    keep: float = 1.0
    looks: tuple[Look, ...] = ()
    n_grad_loops: int | None = None
    n_eval_loops: int | None = None

    @property
    def evaluated(self) -> int:
        """Loops to evaluate with after this step."""
        return self.n_loops if self.n_eval_loops is None else self.n_eval_loops


class LoopSchedule(ABC):
    """The number of loops of every step.

    Args:
        max_loops: T, the most it ever asks for.
        total_steps: length of the run, for what is given as a fraction of it.

    Raises:
        ShiftInputError: a value outside what is allowed, here and in all subclasses.
    """

    keep: float = 1.0
    """:attr:`Decision.keep` of every switch."""

    scp: SCPConfig | None = None
    """The options of its criterion, defaults included; None: it has none."""

    def __init__(self, max_loops: int, total_steps: int) -> None:
        check(is_int(max_loops) and max_loops >= 1, "max_loops", max_loops, "an int >= 1")
        check(is_int(total_steps) and total_steps >= 1, "total_steps", total_steps, "an int >= 1")
        self.max_loops, self.total_steps = max_loops, total_steps

    @abstractmethod
    def step(self, step: int, signals: Signals | None) -> Decision:
        """The decision for step ``step`` (0, 1, 2, ...; call it once for each, in order).

        Args:
            step: steps done before this one.
            signals: what the step before measured; None at step 0.
        """

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values; schedules that only count steps have none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        check(not state, "state", state, "an empty one: this schedule only counts steps")


class TimedSchedule(LoopSchedule):
    """A schedule whose loops depend on the step alone, and never fall."""

    @abstractmethod
    def loops_at(self, step: int) -> int:
        """Loops of step ``step``."""

    def step(self, step: int, signals: Signals | None) -> Decision:
        n_loops = self.loops_at(step)
        first = bisect.bisect_left(range(step), n_loops, key=self.loops_at)
        return Decision(n_loops, switched=0 < first == step)


@dataclass(frozen=True)
class Family:
    """How a schedule appears in comparisons: arms that share a kind.

    Args:
        name: of the arm; ``name:value`` sets the option ``value_option``.
        label: the arm in words; ``{T}`` stands for the model's number of loops.
        colour: ``#rrggbb``; tells the arm from all others for colour-blind eyes too.
        options: of the schedule, where they are not its defaults.
        value_option: None: the arm's name takes no value.
        value_label: the label where there is a value, ``{value}``.
    """

    name: str
    label: str
    colour: str
    options: dict[str, Any] = field(default_factory=dict)
    value_option: str | None = None
    value_label: str = ""


@dataclass(frozen=True)
class Declaration:
    """A kind of schedule, declared beside its class and listed in :mod:`shift.schedules.registry`.

    Args:
        kind: its name in configs.
        schedule: the class.
        decided_by: what its number of loops depends on: ``nothing`` (it is constant), the ``time``,
            ``chance`` (it is drawn at every step), or a ``criterion`` that watches the training.
        baseline: True if it is there to be compared with; False for what we propose.
        families: its arms in comparisons.
        preset: arguments of the class that make it this kind.
        options_of: another kind whose options it takes over from a config, because it uses its criterion.
    """

    kind: str
    schedule: type[LoopSchedule]
    decided_by: Literal["nothing", "time", "chance", "criterion"]
    baseline: bool
    families: tuple[Family, ...]
    preset: dict[str, Any] = field(default_factory=dict)
    options_of: str | None = None


def doublings(max_loops: int) -> list[int]:
    """1, 2, 4, .. below ``max_loops``, and ``max_loops``."""
    return [2**i for i in range((max_loops - 1).bit_length())] + [max_loops]


def check(good: object, name: str, value: object, allowed: str) -> None:
    """Raise the error of a schedule's option unless ``good``."""
    if not good:
        raise input_error("make_schedule", name, value, allowed, "Change the schedule's options.")
