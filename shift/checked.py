"""Dataclasses whose fields are checked: by their type, and by a rule that stands beside the default.

    steps: int = whole(600, 1)        # in a class derived from Checked, which names the field in errors

Values come from Python, a TOML table or a flag alike.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from shift_kernels.errors import input_error, near_miss, type_error

Options = dict[str, int | float | bool | str | list[int]]
"""A table of constructor arguments of something chosen by name."""

MAX_COUNT = 2**53
"""Of steps, samples and intervals: a float holds every int up to here."""


@dataclass(frozen=True)
class Rule:
    """What a field of a config may hold beyond its type."""

    allowed: str
    """In words, for the error."""
    holds: Callable[[Any], bool]
    choices: Sequence[str] = ()
    """Of a field that is a word."""


def wholes(default: tuple[int, ...], low: int, high: int = MAX_COUNT) -> Any:
    """A field that holds several ints from ``low`` to ``high``."""
    return ruled(default, Rule(f"ints from {low} to {high}", lambda value: low <= value <= high))


def whole(default: int | None, low: int, high: int = MAX_COUNT) -> Any:
    """A field that holds an int from ``low`` to ``high``."""
    return ruled(default, Rule(f"an int from {low} to {high}", lambda value: low <= value <= high))


def real(default: float | tuple[float, ...] | None, allowed: str, holds: Callable[[float], bool]) -> Any:
    """A field that holds a float, or several, for each of which ``holds``."""
    return ruled(default, Rule(allowed, holds))


def word(default: str, choices: Sequence[str], meaning: str | None = None) -> Any:
    """A field that holds one of a few words; with a ``meaning`` its help is that and the words."""
    rule = Rule("one of " + ", ".join(map(repr, choices)), choices.__contains__, choices)
    text = None if meaning is None else f"{meaning}: {', '.join(choices[:-1])} or {choices[-1]}."
    return field(default=default, metadata={"rule": rule, "help": text})


def positive(value: float) -> bool:
    """Whether a number is finite and above 0."""
    return 0 < value < math.inf


def ruled(default: Any, rule: Rule) -> Any:
    """A field whose values must obey a rule."""
    return field(default=default, metadata={"rule": rule})


class Checked:
    """A config whose fields are checked by type and :class:`Rule` when it is made.

    numpy's numbers become Python's, an int becomes a float where one is declared, a list a tuple.

    Raises:
        ShiftInputError: a value outside what is allowed; ShiftTypeError for a wrong type.
    """

    _table: ClassVar[str] = ""

    def __init_subclass__(cls, table: str = "") -> None:
        """``table``: the table of a TOML file that a subclass is, with its dot; errors name fields by it."""
        cls._table = table

    def __post_init__(self) -> None:
        for f, kind in _fields(type(self)):
            value, name = getattr(self, f.name), self._table + f.name
            value = _convert(kind, value, type(self).__name__, name, f.metadata.get("rule"))
            object.__setattr__(self, f.name, value)


def refuse_unknown_options(function: str, owner: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Refuse options of something chosen by name that are not among its own.

    Raises:
        ShiftInputError: there is such a one; the nearest of its own is named.
    """
    for name in options:
        if name not in known:
            allowed = f"the options of {owner!r}: {', '.join(known) or 'none'}"
            raise input_error(function, "options", name, allowed, near_miss(name, known, "Leave it out."))


def _fields(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a config dataclass with their types."""
    hints = typing.get_type_hints(cls)
    return [(f, hints[f.name]) for f in dataclasses.fields(cls)]


def build(cls: type, table: Mapping[str, Any], source: str, prefix: str) -> Any:
    """An instance of a config dataclass from a TOML table."""
    fields = {f.name: (kind, f.metadata.get("rule")) for f, kind in _fields(cls)}
    values = {}
    for key, value in table.items():
        if key not in fields:
            raise input_error(
                source, f"{prefix}{key}", value, "the keys " + ", ".join(prefix + f for f in fields),
                near_miss(key, fields, "Check the spelling, and the [table] it stands in."),
            )  # fmt: skip
        kind, rule = fields[key]
        values[key] = _convert(kind, value, source, prefix + key, rule)
    return cls(**values)


def _convert(kind: Any, value: Any, source: str, name: str, rule: Rule | None = None) -> Any:
    """A value of a table, a flag or Python code as the type that a field declares, if its rule holds.

    Args:
        kind: the declared type.
        value: what was given.
        source: who refuses it.
        name: of the field, with those of the tables around it.
        rule: of the field.
    """
    if isinstance(kind, types.UnionType):  # X | None, or X | Y
        *kinds, last = typing.get_args(kind)
        if last is type(None):
            return None if value is None else _convert(kinds[0], value, source, name, rule)
        kind = next((kind for kind in kinds if as_plain(kind, value) is not None), last)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, Mapping):
            return build(typing.cast(type, kind), value, source, name + ".")
        converted = value if isinstance(value, typing.cast(type, kind)) else None
        if converted is None:
            raise type_error(source, name, value, "a table", f"Write [{name}], and its keys below.")
    elif kind == Options:
        return _options(value, source, name)
    elif typing.get_origin(kind) is tuple:
        return _tuple(typing.get_args(kind), value, source, name, rule)
    else:
        converted = as_plain(kind, value)
    if converted is None:
        allowed = rule.allowed if rule else f"a value of type {kind.__name__}"
        raise type_error(source, name, value, allowed, f"Give a value of type {kind.__name__}.")
    if rule is not None and not rule.holds(converted):
        remedy = near_miss(value, rule.choices, "Check the spelling.") if rule.choices else "Choose another."
        raise input_error(source, name, value, rule.allowed, remedy)
    return converted


def as_plain(kind: type, value: Any) -> Any:
    """A bool, int, float or str, as Python's own; None if the value is of another type."""
    is_bool = isinstance(value, (bool, np.bool_))
    if kind is bool:
        return bool(value) if is_bool else None
    if kind is str:
        return str(value) if isinstance(value, str) else None
    if is_bool or not isinstance(value, numbers.Real):
        return None
    if kind is int:
        return operator.index(value) if isinstance(value, numbers.Integral) else None
    try:
        return float(value)
    except OverflowError:
        return math.inf if operator.gt(value, 0) else -math.inf


def _tuple(kinds: tuple[Any, ...], value: Any, source: str, name: str, rule: Rule | None) -> tuple[Any, ...]:
    good = isinstance(value, (list, tuple))
    if good and kinds[1:] == (...,):
        kinds = kinds[:1] * len(value)
    if not good or len(value) != len(kinds):
        allowed = rule.allowed if rule else f"a list of {len(kinds)} values"
        raise type_error(source, name, value, allowed, "Give a tuple, in TOML a list.")
    return tuple(_convert(k, v, source, name, rule) for k, v in zip(kinds, value, strict=True))


def _options(value: Any, source: str, name: str) -> Options:
    """A table of options as plain Python values; what they mean is for the task or schedule to check."""
    if not isinstance(value, Mapping):
        raise type_error(source, name, value, "a table of options", "Give KEY = VALUE pairs.")
    plain = {}
    for key, option in value.items():
        converted = _option(option)
        if not isinstance(key, str) or converted is None:
            allowed = "a number, bool, string or list of these, under a string"
            raise type_error(source, f"{name}.{key}", option, allowed, "Change it.")
        plain[key] = converted
    return plain


def _option(value: Any) -> Any:
    """An option as plain Python values; None if it is of another type."""
    if isinstance(value, (list, tuple)):
        items = [None if isinstance(item, (list, tuple)) else _option(item) for item in value]
        return None if None in items else items
    kinds = (bool, int, float, str)
    return next((plain for kind in kinds if (plain := as_plain(kind, value)) is not None), None)
