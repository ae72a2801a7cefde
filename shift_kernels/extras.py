"""Which extra of this package installs what is missing, as the package's own metadata has it."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec

PACKAGE = "shift-kernels"
FOR_OURSELVES = "dev"
"""The extra that is for those who change this package."""


class MissingExtraError(ModuleNotFoundError):
    """What was asked for needs a package that an extra installs."""


def require(extra: str, who: str) -> None:
    """Raise unless everything that ``extra`` installs is there.

    Args:
        extra: one of this package's extras, such as ``"train"``.
        who: what needs it, as the message's subject.

    Raises:
        MissingExtraError: with the names of what is missing, and the remedy.
    """
    missing = [
        module for module, extras in _extras().items() if extra in extras and find_spec(module) is None
    ]
    if missing:
        raise MissingExtraError(_words(who, ", ".join(missing), extra), name=missing[0])


def explained(error: ModuleNotFoundError, who: str) -> MissingExtraError | None:
    """The error that names the extra with the module that ``error`` missed; None: no extra of ours has it."""
    if isinstance(error, MissingExtraError):
        return error
    module = (error.name or "").partition(".")[0]
    extras = _extras().get(module, ())
    return MissingExtraError(_words(who, module, extras[0]), name=module) if extras else None


def _words(who: str, missing: str, extra: str) -> str:
    return f"{who} needs {missing}, which the extra '{extra}' installs: pip install '{PACKAGE}[{extra}]'"


@cache
def _extras() -> dict[str, tuple[str, ...]]:
    """Modules that are imported under their distribution's name, and the extras that install them."""
    found: dict[str, tuple[str, ...]] = {}
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:  # run from a source tree that is not installed
        lines = []
    for line in lines:
        name, extra = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"](\w+)['\"]", line)
        # A condition on Python's version: what is part of newer Pythons is imported under another name there.
        if name and extra and extra[1] != FOR_OURSELVES and "python_version" not in line:
            module = name[0].replace("-", "_")
            found[module] = (*found.get(module, ()), extra[1])
    return found
