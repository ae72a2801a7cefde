"""One argument at a time: is it of a type and in a range that a function takes? Else a five-part error."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shift_kernels.errors import input_error, near_miss, type_error
from shift_kernels.torch_internals import is_mapped

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_int(
    function: str, name: str, value: Any, low: int, high: int | None, allowed: str | None = None
) -> int:
    """The value as an int, if it is one (numpy's too) and within the bounds."""
    allowed = allowed or (f"an int >= {low}" if high is None else f"an int from {low} to {high}")
    if isinstance(value, (bool, np.bool_)):
        raise type_error(function, name, value, allowed, "Pass an int.")
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)
        except (TypeError, ValueError, RuntimeError):
            raise type_error(function, name, value, allowed, "Pass an int.") from None
    if value < low or (high is not None and value > high):
        raise input_error(
            function, name, value, allowed, f"Choose a {'larger' if value < low else 'smaller'} one."
        )
    return value


def check_bool(function: str, name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise type_error(function, name, value, "True or False", "Pass a bool.")


def check_choice(function: str, name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse what is none of the words."""
    allowed = "one of " + ", ".join(map(repr, choices))
    if not isinstance(value, str):
        raise type_error(function, name, value, allowed, "Pass a string.")
    if value not in choices:
        raise input_error(function, name, value, allowed, near_miss(value, choices, "Check the spelling."))


def check_positive(function: str, name: str, value: Any, allowed: str) -> float:
    """The value as a float, if it is a number (numpy's too), finite and above 0."""
    if not isinstance(value, numbers.Real) or isinstance(value, (bool, np.bool_)):
        raise type_error(function, name, value, allowed, "Pass a float.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:  # not isfinite, which torch.compile cannot trace
        raise input_error(function, name, value, allowed, "Choose a positive number that a float holds.")
    return number


def check_reals(function: str, name: str, values: Any, allowed: str) -> tuple[float, ...]:
    """The values as floats, if it is a sequence of finite numbers (an array or a tensor, too)."""
    try:
        numbers_ = tuple(map(float, values))
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise type_error(function, name, values, allowed, "Pass a tuple of floats.") from None
    if not all(map(math.isfinite, numbers_)):
        raise input_error(function, name, values, allowed, "Check how they were computed.")
    return numbers_


def check_device(function: str, name: str, value: Any) -> torch.device:
    """The device of this name, which need not exist on this machine."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise input_error(
            function, name, value, "a device's name, such as 'cpu' or 'cuda:0'", "Change it."
        ) from error


def check_usable_device(function: str, name: str, value: Any) -> None:
    """Refuse a device that is not one, or not on this machine."""
    device = check_device(function, name, value)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        allowed = "a device that torch can use here"
        raise input_error(function, name, str(device), allowed, "See torch.cuda.is_available().") from error


def check_dtype(function: str, name: str, value: Any) -> None:
    """Refuse what is none of :data:`DTYPES`."""
    if not isinstance(value, torch.dtype) or value not in DTYPES:
        allowed = "one of " + ", ".join(map(str, DTYPES))
        raise type_error(function, name, value, allowed, "Pass one of these.")


def is_floating(x: Tensor) -> bool:
    """Whether :func:`check_floating` accepts x."""
    return isinstance(x, Tensor) and x.dtype in DTYPES and x.layout is torch.strided and not x.is_nested


def check_floating(function: str, name: str, x: Tensor) -> None:
    """Refuse what is no dense tensor of a floating dtype."""
    if not isinstance(x, Tensor):
        raise type_error(function, name, type(x).__name__, "a torch.Tensor", "Convert it first.")
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise type_error(function, name, x.dtype, f"a tensor of dtype {allowed}", f"Cast it: {name}.float().")
    if x.is_nested or x.layout != torch.strided:
        given = "a nested tensor" if x.is_nested else x.layout
        raise type_error(function, name, given, "a dense tensor", "Pad it, and give its seq_lens.")


def refuse_mapped(function: str, name: str, x: Tensor) -> None:
    """Refuse a tensor whose values torch.vmap hides: they are read before anything is computed."""
    if is_mapped(x):
        allowed = "a tensor that torch.vmap does not map over"
        raise input_error(
            function, name, "mapped by vmap", allowed, "Make one batch of all: one entry a sample."
        )


def check_offsets(function: str, name: str, x: Tensor) -> None:
    """Refuse a tensor that does not hold plain int32 or int64 numbers."""
    if x.dtype not in (torch.int32, torch.int64):
        raise type_error(function, name, x.dtype, "int32 or int64", f"Cast it: {name}.long().")
    if x.is_nested or x.layout != torch.strided:
        given = "a nested tensor" if x.is_nested else x.layout
        raise type_error(function, name, given, "a dense tensor", "Use torch.tensor(...).")
    refuse_mapped(function, name, x)
