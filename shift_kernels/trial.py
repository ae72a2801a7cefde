"""One backend tried on one problem, in a process of its own: is it right, and how fast?

:mod:`shift_kernels.calibrate` starts it and says what to try; this process may crash or hang without harm.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shift_kernels.accuracy import ALLOWED, error_ratio
from shift_kernels.api import looped_block
from shift_kernels.call import Problem
from shift_kernels.measured import UNCHECKED, VERIFIED, WRONG, Verdict
from shift_kernels.spec import spec_from_key

BUDGET_S, FEWEST, MOST = 1.0, 5, 50
"""Seconds to repeat calls for, and the bounds of their number."""
PR_SET_PDEATHSIG = 1
"""Of <linux/prctl.h>."""


def trial(problem: Problem, backend: str) -> Verdict:
    """Verify and time one backend on one problem, in this process.

    Returns:
        "verified" with figures, "wrong" with the tensor that is, or "unchecked".
    """
    worst = 1.0  # PyTorch's own, to which the others are held
    for case in () if backend == "torch" else (_plain, _ragged):
        ours = _runner(problem, backend, case, problem.dtype)()
        try:
            plain = _runner(problem, "torch", case, problem.dtype)()
            truth = _runner(problem, "torch", case, torch.float64)()
        except torch.OutOfMemoryError:
            return Verdict(UNCHECKED, "no memory for PyTorch in float64, which it would be held against")
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


def _end_with(parent: int) -> None:
    """Have Linux kill this process as soon as its parent has ended, in whatever way.

    It has a session of its own, so that nothing else would: it would keep the device busy.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it had ended before
            sys.exit("the process that asked for this trial has ended")


def _child() -> None:
    """A trial asked for on stdin as JSON, answered in the file that it names."""
    request = json.load(sys.stdin)
    _end_with(request["parent"])
    importlib.import_module(request["module"])  # a backend of a third party is registered by its import
    torch.set_num_threads(request["threads"])
    verdict = trial(_from_json(request["problem"]), request["backend"])
    answer = Path(request["answer"])
    new = answer.with_suffix(".new")
    new.write_text(json.dumps(dataclasses.asdict(verdict)), encoding="utf-8")
    os.replace(new, answer)


def _from_json(fields: dict[str, Any]) -> Problem:
    dtypes = {name: getattr(torch, fields[name]) for name in ("dtype", "compute_dtype")}
    return Problem(
        **{
            **fields,
            **dtypes,
            "spec": spec_from_key(fields["spec"]),
            "device": torch.device(fields["device"]),
            "options": tuple(fields["options"]),
        }
    )


if __name__ == "__main__":
    _child()
