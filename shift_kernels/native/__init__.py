"""The compiled libraries, which speak plain C: they know nothing of torch's version or ABI.

Each is built by setup.py where there is a compiler for it, and has a module here that mirrors its ``Call``.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

INT, FLOAT, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


def fields(*groups: tuple[type, str]) -> list[tuple[str, type]]:
    """Fields of a ``ctypes.Structure``: each group is a type and the names that have it, in order."""
    return [(name, kind) for kind, names in groups for name in names.split()]


def open_library(
    name: str, prefix: str, call: type[ctypes.Structure], compiler: str, path: Path | None = None
) -> tuple[ctypes.CDLL | None, str]:
    """The library, or None; and what it was built by, or why there is none.

    Args:
        name: ``cpu`` or ``cuda``.
        prefix: of what it exports.
        call: the mirror of its ``struct Call``.
        compiler: what builds it, in words.
        path: the file, instead of the one that was installed.
    """
    path = path or Path(__file__).parent / f"libshift_{name}.so"
    if not path.exists():
        return (
            None,
            f"not built: there was no {compiler}, or its build failed, when shift-kernels was installed",
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"built, but cannot be loaded: {error}"
    call_size, build_info = (getattr(library, f"{prefix}_{what}") for what in ("call_size", "build_info"))
    call_size.restype, build_info.restype = INT, ctypes.c_char_p
    if call_size() != ctypes.sizeof(call):
        return None, "built from other sources than these: install shift-kernels again"
    return library, f"built by {build_info().decode()}"
