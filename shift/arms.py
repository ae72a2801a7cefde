"""The arms of a comparison: each is a schedule, and that is all in which two arms differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from shift.build import build_model, build_task
from shift.config import Options, ScheduleConfig, TrainConfig
from shift.flops import train_step_flops
from shift_kernels.errors import input_error

SMALLEST = "looped:smallest"
"""Stands for looped:2, looped:3, ... up to the first T that reaches the target on all seeds."""

MATCHED = "matched"
"""Stands for ``matched:<SHIFT's mean number of loops>``: does the criterion matter, or only the average?"""

DERIVED = (SMALLEST, MATCHED)
"""Arms that are known only after others have run."""

LONGER = "longer"
"""Single for as many steps as Looped's compute pays for."""


@dataclass(frozen=True)
class Family:
    """Arms that share a schedule kind; ``name:value`` sets the option ``value_option``."""

    kind: str
    label: str
    colour: str  # tells it from the others for colour-blind eyes too (Okabe-Ito, and Tol's muted scheme)
    options: Options = dataclasses.field(default_factory=dict)
    value_option: str | None = None
    value_label: str = ""


FAMILIES = {
    "single": Family("constant", "Single (never looped)", "#767676", {"n_loops": 1}),
    "looped": Family("constant", "Looped, T = {T}", "#0072B2", {}, "n_loops", "Looped, T = {value}"),
    "shift": Family("shift", "SHIFT", "#D55E00"),
    "ramp": Family("linear", "Linear ramp", "#009E73"),
    "sqrt_ramp": Family("sqrt", "Square-root ramp", "#117733"),
    "staged_ramp": Family("staged", "Staged ramp", "#8C6D1F"),
    "ladder": Family("ladder", "SHIFT ladder", "#E69F00"),
    "climb": Family("climb", "Climb", "#000000"),
    "fixed": Family("fixed", "Fixed switch", "#CC79A7", {"at": 0.5}, "at", "Fixed switch at {value}"),
    MATCHED: Family(
        "random", "", "#882255", {"distribution": "two_point"}, "mean", "1 or T at random, mean {value}"
    ),
    LONGER: Family("constant", "Single, Looped's compute", "#999933", {"n_loops": 1}),
    "random": Family("random", "Random T", "#332288", {}, "distribution", "Random T, {value}"),
}

CRITERION_OF = {"ladder": "shift"}
"""Kinds that use the criterion of another kind, and so its options."""


@dataclass(frozen=True)
class Arm:
    """One schedule among those compared. ``config`` is what the trainer is given but for the seeds."""

    name: str
    label: str
    config: TrainConfig

    @property
    def directory(self) -> str:
        """The arm's name as part of a path."""
        return self.name.replace(":", "-")


def make_arm(name: str, base: TrainConfig) -> Arm:
    """The arm of that name.

    Args:
        name: a key of :data:`FAMILIES`, or ``key:value`` where the family takes one (``looped:2``,
            ``fixed:0.25`` as a fraction of all steps, ``fixed:200`` as a step).
        base: all but the schedule. Options of its schedule are kept where the
            arm is of that kind, or uses its criterion.

    Raises:
        ShiftInputError: no such arm.
    """
    key, colon, value = name.partition(":")
    family = FAMILIES.get(key)
    if family is None or (colon and family.value_option is None) or (colon and not value):
        with_value = ", ".join(f"{k}:<{f.value_option}>" for k, f in FAMILIES.items() if f.value_option)
        raise input_error(
            "shift-compare", "arms", name, f"{', '.join(FAMILIES)}, {with_value} or {SMALLEST}",
            "Check the spelling.",
        )  # fmt: skip
    inherits = base.schedule.kind in (family.kind, CRITERION_OF.get(family.kind))
    options = {**(base.schedule.options if inherits else {}), **family.options}
    if family.value_option and value:
        options[family.value_option] = _number(value)
    label = (family.value_label if value else family.label).format(T=base.model.n_loops, value=value)
    config = dataclasses.replace(base, schedule=ScheduleConfig(family.kind, options))
    if key == LONGER:
        config = dataclasses.replace(config, steps=_steps_of_looped_compute(base))
    return Arm(name, label, config)


def seeded(arm: Arm, seed: int) -> TrainConfig:
    """The arm's config with this seed for the weights and for the data."""
    task = dataclasses.replace(arm.config.task, seed=seed)
    return dataclasses.replace(arm.config, task=task, seed=seed)


def _steps_of_looped_compute(base: TrainConfig) -> int:
    """Steps of Single that cost what all steps of Looped do."""
    task = build_task(base)
    model = build_model(base, task)
    looped, single = (
        train_step_flops(model, base.batch_size, task.max_seq_len, n_loops, base.n_grad_loops)
        for n_loops in (base.model.n_loops, 1)
    )
    return round(base.steps * looped / single)


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour (``#rrggbb``) for each arm: its family's, and lighter for the family's further members."""
    families = [name.partition(":")[0] for name in names]
    found: dict[str, str] = {}
    for i, (name, key) in enumerate(zip(names, families, strict=True)):
        # Half white, no more: the last one must still be seen.
        whiteness = 1 / 2 * families[:i].count(key) / max(1, families.count(key) - 1)
        parts = [int(FAMILIES[key].colour[i : i + 2], 16) for i in (1, 3, 5)]
        found[name] = "#" + "".join(f"{round(part + (255 - part) * whiteness):02x}" for part in parts)
    return found


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
