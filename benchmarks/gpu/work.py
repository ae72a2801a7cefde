"""Units of work and what became of them: the words that all stages share. Plain Python: no GPU, no torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REHEARSAL = "SHIFT_GPU_REHEARSAL"
"""Environment variable: 1 where a fake device stands in for the GPU (rehearsal.py)."""
WORK = "SHIFT_GPU_WORK"
"""Environment variable: the folder that stays on the machine between calls."""

OK, WRONG, FAILED, CRASHED, TIMEOUT, REFUSED, SKIPPED, UNFINISHED = (
    "ok", "wrong", "failed", "crashed", "timeout", "refused", "skipped", "unfinished",
)  # fmt: skip
"""Outcomes. Failed: a Python error. Refused: a backend says in words that it does not serve this. Skipped: a
tool or module that is not on this machine. Unfinished: goes on in the next call."""
FAULTS = (WRONG, FAILED, CRASHED, TIMEOUT)


def rehearsing() -> bool:
    """Whether this is a rehearsal, without a GPU."""
    return os.environ.get(REHEARSAL) == "1"


def work_folder() -> Path:
    """For what a stage keeps between calls."""
    return Path(os.environ[WORK])


@dataclasses.dataclass(frozen=True)
class Case:
    """A piece of a stage that ends in one row.

    Args:
        stage: name of its stage.
        name: unique in its stage.
        limit_s: seconds after which it counts as hanging.
        arguments: for the stage's ``run``, as JSON knows them.
    """

    stage: str
    name: str
    limit_s: float
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a case came to.

    Args:
        outcome: one of :data:`OK`, :data:`WRONG` and so on.
        why: a line, empty if all is well.
        data: figures, as JSON knows them.
    """

    outcome: str = OK
    why: str = ""
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


Batch = Sequence[Case]
"""Cases that share a process, until one of them fails: the next then gets a fresh one."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Batches that may run side by side.

    Args:
        batches: in the order in which they start.
        workers: processes at once; 1 where times are taken.
        wrapper: a command in front of each process, which must then end with code 0 for its case to be good.
    """

    batches: Sequence[Batch]
    workers: int = 1
    wrapper: tuple[str, ...] = ()


def refused(error: BaseException) -> Finding:
    """A backend's refusal, without the words around its reason."""
    words = (str(error).strip().splitlines() or [""])[-1]
    return Finding(REFUSED, words.rpartition("what it serves: ")[2].partition(". Use ")[0][:160])


def lacking(missing: ModuleNotFoundError) -> Finding:
    """A module that is not on this machine: no fault."""
    return Finding(SKIPPED, f"needs {missing.name}: pip install '.[train,plots,data]'")


def a_line(error: BaseException) -> str:
    """An error's type and first line, shortened."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:160]
