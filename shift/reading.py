"""Reading what anybody may have written: regular files only, UTF-8 text, strict JSON, TOML; kinds of values.

The low functions raise what Python raises (OSError, ValueError with one line of reason); :func:`read_json`
and :func:`read_toml` raise the input error of whoever asked.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from shift_kernels.errors import input_error

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEEPEST = 50
"""Levels of nesting in JSON. Ours has five."""

T = TypeVar("T")


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is an int >= 0 that fits 63 bits."""
    return is_int(value) and 0 <= value < 2**63


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def read_regular(path: Path, size: int | None = None) -> bytes:
    """The content of a regular file; anything else (FIFO, device, directory, socket) is refused at once.

    Args:
        path: of the file.
        size: bytes that it must have; None: any number.

    Raises:
        OSError: no such file, not a regular one, or not of that size.
    """
    # Non-blocking: opening a FIFO that nobody writes to would wait for ever.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if size is not None and status.st_size != size:
            raise OSError(errno.EINVAL, f"{status.st_size} bytes that are not the {size} saved", str(path))
        return file.readall()


def parse_text(data: bytes) -> str:
    """UTF-8, with or without a byte order mark.

    Raises:
        ValueError: another encoding.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("it is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8; save it as UTF-8") from None


def parse_json(data: bytes, *, finite: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        data: UTF-8.
        finite: refuse NaN and Infinity, which Python writes and JSON does not have.

    Raises:
        ValueError: broken JSON, a key that occurs twice, a number beyond what Python holds, or nesting beyond
            :data:`DEEPEST` levels.
    """
    try:
        value = (_STRICT if finite else _LENIENT).decode(parse_text(data))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
        level = [item for items in inner for item in items]
    if level:
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    return value


def parse_toml(data: bytes) -> dict[str, Any]:
    """The table of a TOML text.

    Raises:
        ValueError: broken TOML.
    """
    try:
        return tomllib.loads(parse_text(data))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, function: str, argument: str) -> Any:
    """The value in a JSON file.

    Raises:
        ShiftInputError: it can't be read; the message names ``argument`` of ``function`` and the file.
    """
    return _read(path, parse_json, function, argument, "a JSON file")


def read_toml(path: Path, function: str, argument: str) -> dict[str, Any]:
    """As :func:`read_json`, for TOML."""
    return _read(path, parse_toml, function, argument, "a TOML file")


def _read(path: Path, parse: Callable[[bytes], T], function: str, argument: str, allowed: str) -> T:
    try:
        return parse(read_regular(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise input_error(function, argument, str(path), allowed, f"Mend it: {reason}.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _finite(text: str) -> float:
    number = float(text)
    if number - number != 0:
        raise ValueError(f"the number {text} is beyond what a float holds")
    return number


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


_LENIENT = json.JSONDecoder(object_pairs_hook=_once, parse_float=_finite)
_STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_float=_finite, parse_constant=_no_constant)
