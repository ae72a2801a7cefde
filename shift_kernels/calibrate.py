"""Verify and time every backend on this device, so that ``auto`` can choose by measurement.

    for each problem:  for each backend that could serve it:  one child process with a time limit
        verify   its error against float64, result and all gradients, is at most twice that of PyTorch in the
                 same dtype: once plainly, once ragged, with NaN in the pads and samples' own numbers of loops
        time     the first call, then the median of repeated ones
    the verdicts become a row of the table of :mod:`shift_kernels.measured`

A candidate that crashes, hangs or is wrong costs its child process and is marked; the caller's goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from shift_kernels import dispatch, measured
from shift_kernels.backends import LOOPED_BLOCK
from shift_kernels.backends.base import Prepares
from shift_kernels.call import Problem
from shift_kernels.environment import word_of
from shift_kernels.errors import input_error
from shift_kernels.measured import CRASHED, TIMED_OUT, Verdict

LIMIT_S = 180.0
"""Seconds that a candidate may take, compiling included."""


def calibrate(
    problems: Sequence[Problem], *, limit_s: float = LIMIT_S, say: Callable[[str], object] = print
) -> dict[str, measured.Row]:
    """Measure problems and write them into this user's table.

    Args:
        problems: what to measure, with their sizes and n_loops; of each shape class the last one counts.
        limit_s: seconds that one backend may take for one problem; a slower one is marked "timed out".
        say: gets a line of progress for every verdict.

    Returns:
        The rows by shape class.

    Raises:
        ShiftInputError: ``limit_s`` is not positive.
    """
    if not limit_s > 0:
        raise input_error("shift_kernels.calibrate", "limit_s", limit_s, "a number > 0", "Leave it out.")
    rows: dict[str, measured.Row] = {}
    for i, problem in enumerate(problems):
        say(f"[{i + 1}/{len(problems)}] {measured.describe(problem)}")
        row: dict[str, Verdict] = {}
        for name in dispatch.candidates(problem):
            backend = LOOPED_BLOCK.get(name)
            if isinstance(backend, Prepares):
                backend.prepare(problem, say)
            row[name] = _in_child(problem, name, limit_s)
            say(f"  {name:<12}{row[name]}")
        rows[measured.shape_class(problem)] = row
        try:
            say(f"  written to {measured.record(problem, row)}")
        except OSError as error:
            measured.adopt(rows)
            say(f"  for this process alone, as the table cannot be written: {error}")
        dispatch.forget()
    return rows


def at_first_use(problem: Problem) -> None:
    """With ``SHIFT_KERNELS_CALIBRATE=first_use``: measure a problem of whose shape no table speaks.

    Not where several processes work together. They should choose alike, and ranks need not come to a shape at
    the same time, or at all: a broadcast here could wait for ever.
    """
    wanted = word_of("SHIFT_KERNELS_CALIBRATE") is not None
    speaks = problem.n_loops is not None and problem.cache_dtype is None  # only of such there are rows
    if wanted and speaks and measured.lookup(problem) is None:
        if _several_ranks():
            _say_that_ranks_only_look_up()
        else:
            calibrate([problem], say=_to_stderr)


def _several_ranks() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@functools.cache
def _say_that_ranks_only_look_up() -> None:
    _to_stderr(
        "shift_kernels: SHIFT_KERNELS_CALIBRATE=first_use measures nothing where several processes work "
        "together. Run shift-calibrate before; shift-train measures its shapes on rank 0 for all."
    )


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _in_child(problem: Problem, backend: str, limit_s: float) -> Verdict:
    """The verdict of a process that tries the backend, which may crash or hang."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "verdict.json"
        request = {
            "problem": _as_json(problem),
            "backend": backend,
            "module": type(LOOPED_BLOCK.get(backend)).__module__,
            "threads": torch.get_num_threads(),
            "answer": str(answer),
            "parent": os.getpid(),
        }
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        environment.pop("SHIFT_KERNELS_CALIBRATE", None)
        child = subprocess.Popen(
            [sys.executable, "-m", "shift_kernels.trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,  # a time-out or Ctrl-C ends what it started, too
        )
        try:
            _, words = child.communicate(json.dumps(request), timeout=limit_s)
        except subprocess.TimeoutExpired:
            return Verdict(TIMED_OUT, f"over {limit_s:g} s")
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
        if not answer.exists():
            last = (words.strip().splitlines() or ["without a word"])[-1]
            return Verdict(CRASHED, f"exit code {child.returncode}: {last[:200]}")
        return Verdict(**json.loads(answer.read_text(encoding="utf-8")))


def _as_json(problem: Problem) -> dict[str, Any]:
    fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    dtypes = {name: str(fields[name]).removeprefix("torch.") for name in ("dtype", "compute_dtype")}
    return {**fields, **dtypes, "spec": problem.spec.key, "device": str(problem.device)}
