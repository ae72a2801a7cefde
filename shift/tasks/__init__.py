"""Tasks by name: the registry, those that other packages declare, and ``module:Class``.

A package declares tasks as entry points of the group ``shift.tasks``, name = "module:Class".
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from typing import Any

from shift.checked import refuse_unknown_options
from shift.tasks.addition import Addition
from shift.tasks.base import IGNORE, Batch, Task
from shift.tasks.binary_sum import BinarySum
from shift.tasks.copy import Copy
from shift.tasks.hop import Hop
from shift.tasks.markov import Markov
from shift.tasks.multiplication import Multiplication
from shift.tasks.p_hop import PHop
from shift.tasks.parity import Parity
from shift.tasks.prefix_products import PrefixProducts
from shift.tasks.text import Text
from shift.tasks.tokens import Tokens
from shift.tasks.unique_set import UniqueSet
from shift_kernels.errors import input_error

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        *(Hop, PHop, Markov, PrefixProducts, Text, Tokens),
        *(Parity, Copy, Addition, BinarySum, Multiplication, UniqueSet),
    )
}

__all__ = [
    "IGNORE",
    "TASKS",
    "Addition",
    "Batch",
    "BinarySum",
    "Copy",
    "Hop",
    "Markov",
    "Multiplication",
    "PHop",
    "Parity",
    "PrefixProducts",
    "Task",
    "Text",
    "Tokens",
    "UniqueSet",
    "find_task",
    "make_task",
]

GROUP = "shift.tasks"
"""Of entry points."""


def make_task(name: str, *, seed: int = 0, **options: Any) -> Task:
    """The task of that name.

    Args:
        name: see :func:`find_task`.
        seed: of the data.
        options: arguments of its class.

    Raises:
        ShiftInputError: an unknown task or option, or a value outside what is allowed.
    """
    task = find_task(name)
    parameters = inspect.signature(task).parameters.values()
    if all(p.kind is not p.VAR_KEYWORD for p in parameters):  # one of another package may take any
        own = [p.name for p in parameters if p.name != "seed"]
        refuse_unknown_options("make_task", name, options, own)
    try:
        return task(seed=seed, **options)
    except TypeError as error:
        raise input_error(
            "make_task", "options", options, f"the options of {name!r} ({error})", "Check their names."
        ) from None


def find_task(name: str) -> type[Task]:
    """The class of a task.

    Args:
        name: a key of :data:`TASKS`, an entry point of the group ``shift.tasks``, or ``module:Class`` of a
            module that Python can import.

    Raises:
        ShiftInputError: there is none of that name, or it is no :class:`Task`.
    """
    if name in TASKS:
        return TASKS[name]
    declared = {entry.name: entry.value for entry in importlib.metadata.entry_points(group=GROUP)}
    module, colon, attribute = declared.get(name, name).partition(":")
    if not colon:
        names = ", ".join([*TASKS, *declared])
        raise input_error(
            "make_task", "name", name, f"one of {names}, or module:Class", "Check the spelling."
        )
    try:
        task = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise input_error(
            "make_task", "name", name, f"a class in a module that can be imported ({error})",
            "Install the module, or add its folder to PYTHONPATH.",
        ) from error  # fmt: skip
    if not (isinstance(task, type) and issubclass(task, Task)):
        raise input_error("make_task", "name", name, "a subclass of shift.Task", "See shift/tasks/base.py.")
    return task
