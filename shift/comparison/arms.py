"""The arms of a comparison: each is a schedule, in a variant where it names one.

``climb``, ``fixed:0.25`` (a family and its value), ``climb@scaled`` (in the variant ``scaled``). But for the
schedule, the variant and tuned learning rates, two arms differ in nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shift.config import ScheduleConfig, TrainConfig, merged
from shift.schedules import SCHEDULES, Declaration, Family
from shift_kernels.errors import input_error

SMALLEST = "looped:smallest"
"""Stands for looped:2, looped:3, ... up to the first T that reaches the target on all seeds."""

MATCHED = "matched"
"""Stands for ``matched:<SHIFT's mean number of loops>``: does the criterion matter, or only the average?"""

DERIVED = (SMALLEST, MATCHED)
"""Arms that are known only after others have run."""

AGAIN = "again"
"""Looped on other data: what tells it from Looped is chance, and so may be as much between other arms."""

OTHER_DATA = 1_000_000
"""Added to the data seed there."""


KIND_OF = {family.name: kind for kind, declared in SCHEDULES.items() for family in declared.families} | {
    MATCHED: "random",
    AGAIN: "constant",
}
"""Name of a family of arms -> kind of its schedule."""

FAMILIES = {family.name: family for declared in SCHEDULES.values() for family in declared.families} | {
    MATCHED: Family(
        MATCHED, "", "#882255", {"distribution": "two_point"}, "mean", "1 or T at random, mean {value}"
    ),
    AGAIN: Family(AGAIN, "Looped on other data", "#56B4E9"),
}
"""Those that the schedules declare, and two that only a comparison has. Colours: Okabe-Ito, Tol's muted."""


def split(name: str) -> tuple[str, str, str]:
    """Family, value and variant of an arm; the last two may be empty."""
    schedule, _, variant = name.partition("@")
    family, _, value = schedule.partition(":")
    return family, value, variant


def declared(arm: str) -> Declaration:
    """The declaration of the schedule of the arm of that name."""
    return SCHEDULES[KIND_OF[split(arm)[0]]]


@dataclass(frozen=True)
class Arm:
    """One of those compared. ``config`` is what the trainer is given but for the seeds."""

    name: str
    label: str
    config: TrainConfig

    @property
    def directory(self) -> str:
        """The arm's name as part of a path."""
        return self.name.replace(":", "-")


Rates = Mapping[str, float]
"""Name of an arm -> its learning rate; arms that are not named have that of the config they share."""

Variants = Mapping[str, Mapping[str, Any]]
"""Name of a variant -> its changes of the config that all arms share, in tables as a config's."""

SCALED = {"residual_scale": "1/T"}
VARIANTS: Variants = {
    "scaled": {"model": SCALED},
    "later": {"model": SCALED, "schedule": {"options": {"shares": [0.15, 0.45]}}},
}
"""Those that every comparison knows; a suite declares others. ``later`` is for ``climb`` alone: longer with
one loop."""

VARIED = ("model", "optimiser", "n_grad_loops", "loop_loss", "schedule")
"""Keys of a config that a variant may change: data, weights' seeds, steps and evaluations stay the same. Of
the schedule, which is the arm's, its options alone."""


def used_variants(names: Iterable[str], variants: Variants | None) -> Variants:
    """The variants that some arms name."""
    known = {**VARIANTS, **(variants or {})}
    return {variant: known[variant] for name in names if (variant := split(name)[2])}


def check_variants(variants: Variants) -> None:
    """Refuse changes of what all arms must share.

    Raises:
        ShiftInputError: it names the variant and the key.
    """
    for name, changes in variants.items():
        wrong = [key for key in changes if key not in VARIED]
        wrong += [f"schedule.{key}" for key in changes.get("schedule", {}) if key != "options"]
        if wrong:
            allowed = ", ".join(VARIED).replace("schedule", "schedule.options")
            raise input_error(
                "shift-compare", f"variants.{name}", wrong[0], allowed, "Drop it: arms share it."
            )


def rate_name(name: str) -> str:
    """Where :data:`Rates` hold an arm: all fewer loops share a rate; Looped on other data has Looped's."""
    family, value, variant = split(name)
    if value and not variant:
        return {"looped": SMALLEST, MATCHED: MATCHED}.get(family, name)
    return "looped" if name == AGAIN else name


def make_arm(
    name: str, base: TrainConfig, rates: Rates | None = None, variants: Variants | None = None
) -> Arm:
    """The arm of that name.

    Args:
        name: a key of :data:`FAMILIES`, or ``key:value`` where the family takes one (``looped:2``,
            ``fixed:0.25`` as a fraction of all steps, ``fixed:200`` as a step); then ``@variant`` for one.
        base: all but the schedule. Options of its schedule are kept where the
            arm is of that kind, or uses its criterion.
        rates: learning rates of arms that have one of their own.
        variants: that there are besides :data:`VARIANTS`.

    Raises:
        ShiftInputError: no such arm.
    """
    key, value, variant = split(name)
    family, known = FAMILIES.get(key), {"": {}, **VARIANTS, **(variants or {})}
    wrong = family is None or variant not in known or name != _joined(key, value, variant)
    if family is None or wrong or (value and family.value_option is None):
        with_value = ", ".join(f"{k}:<{f.value_option}>" for k, f in FAMILIES.items() if f.value_option)
        in_variant = "".join(f", and any of these @{v}" for v in known if v)
        raise input_error(
            "shift-compare", "arms", name, f"{', '.join(FAMILIES)}, {with_value} or {SMALLEST}{in_variant}",
            "Check the spelling.",
        )  # fmt: skip
    schedule = declared(name)
    inherits = base.schedule.kind in (schedule.kind, schedule.options_of)
    options = {**(base.schedule.options if inherits else {}), **family.options}
    changes = dict(known[variant])
    options |= changes.pop("schedule", {}).get("options", {})
    if family.value_option and value:
        options[family.value_option] = _number(value)
    label = (family.value_label if value else family.label).format(T=base.model.n_loops, value=value)
    config = TrainConfig.from_dict(merged(base.to_dict(), changes), f"variants.{variant}")
    lr = (rates or {}).get(rate_name(name), config.optimiser.lr)
    config = dataclasses.replace(
        config,
        schedule=ScheduleConfig(schedule.kind, options),
        optimiser=dataclasses.replace(config.optimiser, lr=lr),
    )
    return Arm(name, f"{label}, {variant}" if variant else label, config)


def _joined(family: str, value: str, variant: str) -> str:
    return family + f":{value}" * bool(value) + f"@{variant}" * bool(variant)


def seeded(arm: Arm, seed: int) -> TrainConfig:
    """The arm's config with this seed for the weights and, but for :data:`AGAIN`, for the data."""
    task = dataclasses.replace(arm.config.task, seed=seed + OTHER_DATA if arm.name == AGAIN else seed)
    return dataclasses.replace(arm.config, task=task, seed=seed)


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour (``#rrggbb``) for each arm: its family's, and lighter for the family's further members."""
    families = [split(name)[0] for name in names]
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
