"""Errors and warnings. An input error has five parts: function, argument, value, what is allowed, remedy."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
LONGEST_VALUE = 300
"""Characters shown of a value that is refused."""


class ShiftInputError(ValueError):
    """An argument is not usable. Raised before any kernel runs."""


class ShiftTypeError(ShiftInputError, TypeError):
    """An argument has the wrong type or dtype. Also a :class:`TypeError`."""


class BackendFallbackWarning(UserWarning):
    """``backend="auto"`` took a slower path than the one this machine should have."""


def _text(function: str, argument: str, value: object, allowed: str, remedy: str) -> str:
    try:
        shown = repr(value)
    except Exception:  # such as an int of more digits than Python prints
        shown = f"a {type(value).__name__}"
    if len(shown) > LONGEST_VALUE:
        shown = f"{shown[:LONGEST_VALUE]}..."
    return f"{function}: argument '{argument}' = {shown} is not supported; allowed: {allowed}. {remedy}"


def near_miss(name: object, known: Iterable[str], otherwise: str) -> str:
    """A remedy: the known name that is most like this one, or ``otherwise``."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"Perhaps {close[0]!r} is meant." if close else otherwise


def refuses_unknown_keywords(
    function: str, keywords: type | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function: a keyword that it does not have is an input error, which names the nearest one.

    Args:
        function: as the user calls it.
        keywords: the TypedDict of what it takes as ``**keywords``.
    """

    def decorate(f: Callable[P, R]) -> Callable[P, R]:
        named = [p.name for p in inspect.signature(f).parameters.values() if p.kind is not p.VAR_KEYWORD]
        known = dict.fromkeys([*named, *(keywords.__annotations__ if keywords else ())])

        @functools.wraps(f)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name, value in kwargs.items():
                if name not in known:
                    names = [k for k in known if k != "self"]
                    raise type_error(
                        function,
                        name,
                        value,
                        f"the keywords {', '.join(names)}",
                        near_miss(name, names, "Check the spelling."),
                    )
            return f(*args, **kwargs)

        return checked

    return decorate


def input_error(function: str, argument: str, value: object, allowed: str, remedy: str) -> ShiftInputError:
    """The :class:`ShiftInputError` to raise for a bad value.

    Args:
        function: who refuses, as the user called it (``"shift_kernels.looped_block"``).
        argument: name of the argument.
        value: what was given (its ``repr`` is shown; pass a shape rather than a large tensor).
        allowed: what is accepted, as a noun phrase.
        remedy: what to do about it, as a sentence.
    """
    return ShiftInputError(_text(function, argument, value, allowed, remedy))


def type_error(function: str, argument: str, value: object, allowed: str, remedy: str) -> ShiftTypeError:
    """As :func:`input_error`, for a wrong type or dtype."""
    return ShiftTypeError(_text(function, argument, value, allowed, remedy))
