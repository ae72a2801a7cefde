"""Tasks by name. Every one is generated on the fly, from a seed and a step."""

from __future__ import annotations

from typing import Any

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
from shift.tasks.unique_set import UniqueSet
from shift_kernels.errors import input_error

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        *(Hop, PHop, Markov, PrefixProducts, Text),
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
    "UniqueSet",
    "make_task",
]


def make_task(name: str, *, seed: int = 0, **options: Any) -> Task:
    """The task of that name.

    Args:
        name: a key of :data:`TASKS`.
        seed: of the data.
        options: arguments of its class.

    Raises:
        ShiftInputError: an unknown task or option, or a value outside what is allowed.
    """
    if name not in TASKS:
        raise input_error("make_task", "name", name, "one of " + ", ".join(TASKS), "Check the spelling.")
    try:
        return TASKS[name](seed=seed, **options)
    except TypeError as error:
        raise input_error(
            "make_task", "options", options, f"the options of {name!r} ({error})", "Check their names."
        ) from None
