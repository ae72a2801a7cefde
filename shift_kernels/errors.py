"""Errors and warnings. An input error has five parts: function, argument, value, what is allowed, remedy."""

from __future__ import annotations


class ShiftInputError(ValueError):
    """An argument is not usable. Raised before any kernel runs."""


class ShiftTypeError(ShiftInputError, TypeError):
    """An argument has the wrong type or dtype. Also a :class:`TypeError`."""


class BackendFallbackWarning(UserWarning):
    """``backend="auto"`` took a slower path than the one this machine should have."""


def _text(function: str, argument: str, value: object, allowed: str, remedy: str) -> str:
    return f"{function}: argument '{argument}' = {value!r} is not supported; allowed: {allowed}. {remedy}"


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
