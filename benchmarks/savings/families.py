"""Arms under one name on every task, also where their own name holds a number that was measured there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shift.comparison.arms import MATCHED, SMALLEST, colours, split

Results = Mapping[str, Mapping[str, Any]]
"""Task -> ``results.json`` of its comparison, with ``used_for``."""

WORDS = {
    "looped": "Looped",
    SMALLEST: "Looped, smallest sufficient T",
    MATCHED: "1 or T at random, SHIFT's mean",
}


def arm_names(results: Results) -> list[str]:
    """All arms; ``looped:2``, ``looped:3``, .. are ``looped:smallest``, ``matched:2.1`` is ``matched``."""
    return list(dict.fromkeys(_name(own) for r in results.values() for own in r["arms"]))


def arm_of(r: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The arm that bears this name in one task's results; None: not run, or no T below Looped's did."""
    if name == SMALLEST:
        found = r["smallest_sufficient"]["arm"]
        return None if found in (None, "looped") else r["arms"][found]
    return next((arm for own, arm in r["arms"].items() if _name(own) == name), None)


def label(results: Results, name: str) -> str:
    """The arm in words that hold for all tasks."""
    return WORDS.get(name) or next(arm["label"] for r in results.values() if (arm := arm_of(r, name)))


def colour_of(results: Results) -> dict[str, str]:
    """A colour (``#rrggbb``) for each of :func:`arm_names`."""
    return colours(arm_names(results))


def _name(own: str) -> str:
    key, value, variant = split(own)
    return {"looped": SMALLEST, MATCHED: MATCHED}.get(key, own) if value and not variant else own
