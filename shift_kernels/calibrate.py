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
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shift_kernels import dispatch, measured
from shift_kernels.accuracy import ALLOWED, error_ratio
from shift_kernels.backends import LOOPED_BLOCK
from shift_kernels.call import Problem
from shift_kernels.errors import input_error
from shift_kernels.measured import CRASHED, TIMED_OUT, VERIFIED, WRONG, Verdict
from shift_kernels.spec import spec_from_key

LIMIT_S = 180.0
"""Seconds that a candidate may take, compiling included."""
BUDGET_S, FEWEST, MOST = 1.0, 5, 50
"""Seconds to repeat calls for, and the bounds of their number."""


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
            if prepare := getattr(LOOPED_BLOCK.get(name), "prepare", None):
                prepare(problem, say)
            row[name] = _in_child(problem, name, limit_s)
            say(f"  {name:<8}{row[name]}")
        measured.record(problem, row)
        dispatch.forget()
        rows[measured.shape_class(problem)] = row
    return rows


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
        }
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        environment.pop("SHIFT_KERNELS_CALIBRATE", None)
        child = subprocess.Popen(
            [sys.executable, "-m", "shift_kernels.calibrate"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,  # a time-out ends what it started, too
        )
        try:
            _, words = child.communicate(json.dumps(request), timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            return Verdict(TIMED_OUT, f"over {limit_s:g} s")
        if not answer.exists():
            last = (words.strip().splitlines() or ["without a word"])[-1]
            return Verdict(CRASHED, f"exit code {child.returncode}: {last[:200]}")
        return Verdict(**json.loads(answer.read_text(encoding="utf-8")))


def _as_json(problem: Problem) -> dict[str, Any]:
    fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    dtypes = {name: str(fields[name]).removeprefix("torch.") for name in ("dtype", "compute_dtype")}
    return {**fields, **dtypes, "spec": problem.spec.key, "device": str(problem.device)}


def _from_json(fields: dict[str, Any]) -> Problem:
    dtypes = {name: getattr(torch, fields[name]) for name in ("dtype", "compute_dtype")}
    return Problem(
        **{
            **fields,
            **dtypes,
            "spec": spec_from_key(fields["spec"]),
            "device": torch.device(fields["device"]),
        }
    )


def trial(problem: Problem, backend: str) -> Verdict:
    """Verify and time one backend on one problem, in this process.

    Returns:
        "verified" with figures, or "wrong" with the tensor that is.
    """
    worst = 1.0  # PyTorch's own, to which the others are held
    for case in () if backend == "torch" else (_plain, _ragged):
        ours = _runner(problem, backend, case, problem.dtype)()
        plain = _runner(problem, "torch", case, problem.dtype)()
        truth = _runner(problem, "torch", case, torch.float64)()
        ratios = {name: error_ratio(ours[name], plain[name], truth[name]) for name in truth}
        name = max(ratios, key=ratios.__getitem__)
        if ratios[name] > ALLOWED:
            kind = case.__name__.removeprefix("_")
            why = f"{name} is off by {ratios[name]:.3g} times the error of PyTorch ({kind} call)"
            return Verdict(WRONG, why, ratios[name])
        worst = max(worst, ratios[name])
    run = _runner(problem, backend, _plain, problem.dtype)
    first = _seconds(run)
    seconds: list[float] = []
    while len(seconds) < FEWEST or (len(seconds) < MOST and sum(seconds) < BUDGET_S):
        seconds.append(_seconds(run))
    median = statistics.median(seconds)
    return Verdict(VERIFIED, "", worst, 1e3 * median, max(first - median, 0.0))


Inputs = tuple[Tensor, dict[str, Tensor], dict[str, Any]]
"""e, the weights, and the options of the call."""
Case = Callable[[Problem], Inputs]


def _inputs(problem: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """Seeded e [batch, seq_len, d_model] and weights, float32 on the CPU: each dtype rounds the same ones."""
    source = torch.Generator().manual_seed(0)
    spec = problem.spec
    e = torch.randn(problem.batch, problem.seq_len, spec.d_model, generator=source)
    weights = {
        name: torch.randn(shape, generator=source) / shape[-1] ** 0.5
        if len(shape) == 2
        else float(name.endswith("weight")) + 0.1 * torch.randn(shape, generator=source)
        for name, shape in spec.weight_shapes().items()
    }
    return e, weights


def _plain(problem: Problem) -> Inputs:
    """All samples whole, all with the same number of loops."""
    return *_inputs(problem), _options(problem, n_loops=problem.n_loops)


def _options(problem: Problem, **options: Any) -> dict[str, Any]:
    """A call's keywords; a problem that halts gets a threshold that no sample reaches."""
    return {**options, "halt_threshold": 1e-12} if problem.halting else options


def _ragged(problem: Problem) -> Inputs:
    """Lengths from 0 to seq_len with NaN in the pads, loops from 0 to n_loops."""
    assert problem.n_loops is not None, "a shape class knows its T"
    e, weights = _inputs(problem)
    source = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, problem.seq_len + 1, (problem.batch,), generator=source)
    lengths[0] = problem.seq_len
    loops = torch.randint(0, problem.n_loops + 1, (problem.batch,), generator=source)
    loops[-1] = problem.n_loops
    e[torch.arange(problem.seq_len) >= lengths[:, None]] = torch.nan
    return e, weights, _options(problem, n_loops=loops, seq_lens=lengths)


def _runner(
    problem: Problem, backend: str, case: Case, dtype: torch.dtype
) -> Callable[[], dict[str, Tensor]]:
    """A call that gives the result and, if the problem has them, all gradients of a fixed projection of it.

    In float64 it is the truth for the numbers that the problem's dtype rounds the inputs to.
    """
    from shift_kernels.api import looped_block

    device, grad = problem.device, problem.grad
    stored = torch.float64 if dtype == torch.float64 else problem.dtype
    e, weights, call = case(problem)

    def held(x: Tensor) -> Tensor:
        return x.to(problem.dtype).to(device, stored).requires_grad_(grad)

    e, weights = held(e), {name: held(w) for name, w in weights.items()}
    call = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in call.items()}
    autocasts = dtype != torch.float64 and problem.compute_dtype != problem.dtype
    projection = torch.linspace(-1, 1, problem.spec.d_model, dtype=stored, device=device).expand_as(e)
    names = ["the gradient of e", *(f"the gradient of {name}" for name in weights)]

    def run() -> dict[str, Tensor]:
        with (
            torch.autocast(device.type, problem.compute_dtype, enabled=autocasts),
            torch.set_grad_enabled(grad),
        ):
            h = looped_block(e, weights, problem.spec, backend=backend, **call)
        h = h[0] if isinstance(h, tuple) else h  # halting also returns the loops used
        grads = torch.autograd.grad(h, [e, *weights.values()], projection) if grad else ()
        return {"h": h.detach(), **dict(zip(names, grads, strict=grad))}

    return run


def _seconds(run: Callable[[], dict[str, Tensor]]) -> float:
    start = time.perf_counter()
    h = run()["h"]
    if h.is_cuda:
        torch.cuda.synchronize(h.device)
    return time.perf_counter() - start


def _child() -> None:
    """A trial asked for on stdin as JSON, answered in the file that it names."""
    request = json.load(sys.stdin)
    importlib.import_module(request["module"])  # a backend of a third party is registered by its import
    torch.set_num_threads(request["threads"])
    verdict = trial(_from_json(request["problem"]), request["backend"])
    answer = Path(request["answer"])
    new = answer.with_suffix(".new")
    new.write_text(json.dumps(dataclasses.asdict(verdict)), encoding="utf-8")
    os.replace(new, answer)


if __name__ == "__main__":
    _child()
