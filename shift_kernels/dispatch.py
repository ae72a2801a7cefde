"""Which backend runs a looped block, and why. Decided by arithmetic on sizes, never by try and except."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from types import ModuleType

import torch

from shift_kernels.backends import cpu as cpu_backend
from shift_kernels.backends import cuda as cuda_backend
from shift_kernels.backends import torch as torch_backend
from shift_kernels.backends.triton import backend as triton_backend
from shift_kernels.errors import (
    BackendFallbackWarning,
    input_error,
    refuses_unknown_keywords,
    type_error,
)
from shift_kernels.problem import Problem
from shift_kernels.spec import (
    MAX_LOOPS,
    MAX_TOKENS,
    BlockSpec,
    check_bool,
    check_choice,
    check_device,
    check_dtype,
    check_int,
)

# In the order in which "auto" asks them; the last one serves everything. Each is a module with NAME,
# unavailable, meant_for, refusal, how (in a phrase), saved_bytes,
#     forward(e, weights, spec, asked: Asked, for_backward) -> h, loops used, saved
#     backward(grad_h, e, weights, spec, asked, saved) -> gradients of e and of the weights, in their order
# and SAVES: if true, forward returns tensors for backward and saved_like(e, spec, n_loops, compute_dtype)
# gives their shapes. ONLY_BY_NAME: why "auto" leaves it alone, or None.
BACKENDS: tuple[ModuleType, ...] = (triton_backend, cuda_backend, cpu_backend, torch_backend)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The backend chosen for a problem.

    Args:
        backend: its name.
        why: one sentence.
        saved_bytes_per_loop: bytes kept for the backward pass for each loop (0 without gradients).
        refused: backends asked before it, with their reasons.
    """

    backend: str
    why: str
    saved_bytes_per_loop: int
    refused: tuple[tuple[str, str], ...]


def backends() -> dict[str, str]:
    """Every backend by name, with ``"available"`` or the reason why it is not."""
    return {b.NAME: b.unavailable() or "available" for b in BACKENDS}


def module_of(name: str) -> ModuleType:
    """The module that implements the backend of this name."""
    return next(b for b in BACKENDS if name == b.NAME)


def plan(problem: Problem, backend: str = "auto") -> Plan:
    """Choose the backend for a problem.

    Raises:
        ShiftInputError: an explicit ``backend`` is unknown, not available, or does not serve the problem;
            or ``auto`` would fall back while ``SHIFT_KERNELS_STRICT=1``.
    """
    names = [b.NAME for b in BACKENDS]
    check_choice("shift_kernels.looped_block", "backend", backend, ["auto", *names])
    refused: list[tuple[str, str]] = []
    for candidate in BACKENDS:
        if backend not in ("auto", candidate.NAME):
            continue
        reason = _reason_against(candidate, problem, backend)
        if reason is None:
            saved = candidate.saved_bytes(problem) if problem.grad else 0
            why = "asked for" if backend != "auto" else "first of " + ", ".join(names) + " that serves this"
            return Plan(candidate.NAME, why, saved, tuple(refused))
        if backend != "auto":
            raise input_error(
                "shift_kernels.looped_block",
                "backend",
                backend,
                f"what it serves: {reason}",
                "Use backend='auto' or 'torch'.",
            )
        refused.append((candidate.NAME, reason))
    raise AssertionError("the torch backend serves everything")


def _reason_against(candidate: ModuleType, problem: Problem, backend: str) -> str | None:
    return _not_asked(candidate, problem, backend) or candidate.refusal(problem)


def _not_asked(candidate: ModuleType, problem: Problem, backend: str) -> str | None:
    """Why a backend is no candidate: not on this machine, for other tensors, or only by name."""
    by_name = candidate.ONLY_BY_NAME if backend == "auto" else None
    return candidate.unavailable() or candidate.meant_for(problem) or by_name


def plan_and_warn(problem: Problem, backend: str) -> Plan:
    """As :func:`plan`; says once for each reason when ``auto`` takes a slower path than it should."""
    chosen = plan(problem, backend)
    if backend == "auto" and chosen.refused:
        _say_slow(problem, chosen)
    return chosen


_SAID: set[str] = set()


def _say_slow(problem: Problem, chosen: Plan) -> None:
    # Only a backend that refuses a problem of its own kind is a surprise.
    reasons = "; ".join(
        f"{name}: {why}"
        for name, why in chosen.refused
        if _not_asked(module_of(name), problem, "auto") is None
    )
    if not reasons:
        return
    if os.environ.get("SHIFT_KERNELS_STRICT") == "1":
        raise input_error(
            "shift_kernels.looped_block",
            "backend",
            "auto",
            f"problems that a fast backend serves while SHIFT_KERNELS_STRICT=1 ({reasons})",
            "Change the block, or unset SHIFT_KERNELS_STRICT.",
        )
    _say_once(
        f"shift_kernels.looped_block: slow path, running on '{chosen.backend}' because {reasons}. "
        "shift_kernels.explain(...) tells more; pass backend= to choose and silence this."
    )


def _say_once(text: str) -> None:
    """Warn where the user's code called torch or us."""
    if text in _SAID:
        return
    _SAID.add(text)
    frame, level, ours = sys._getframe(), 1, ("shift_kernels", "torch")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, BackendFallbackWarning, stacklevel=level)


# torch.compile calls it where it traces; as in cuda_backend.
_say_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


@refuses_unknown_keywords("shift_kernels.explain")
def explain(
    spec: BlockSpec,
    batch: int,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    grad: bool = True,
    n_loops: int = 1,
    backend: str = "auto",
) -> str:
    """Say in words which backend would run this looped block, why, and what it keeps for the backward.

    Args:
        spec: the block.
        batch, seq_len: shape of e, [batch, seq_len, d_model].
        dtype: dtype of e.
        device: where e would live; it need not exist on this machine.
        grad: whether a backward pass follows.
        n_loops: T, for the memory figures.
        backend: as for ``looped_block``.

    Raises:
        ShiftInputError: no such block can be called, or the named backend does not serve it.
    """
    if not isinstance(spec, BlockSpec):
        raise type_error(
            "shift_kernels.explain", "spec", type(spec).__name__, "a BlockSpec", "Build one: BlockSpec(...)."
        )
    me = "shift_kernels.explain"
    batch = check_int(me, "batch", batch, 1, MAX_TOKENS)
    seq_len = check_int(me, "seq_len", seq_len, 1, MAX_TOKENS)
    n_loops = check_int(me, "n_loops", n_loops, 0, MAX_LOOPS)
    check_dtype(me, "dtype", dtype)
    place = check_device(me, "device", device)
    check_bool(me, "grad", grad)
    problem = Problem(spec, batch, seq_len, dtype, dtype, place, grad)
    chosen = plan(problem, backend)
    lines = [
        f"looped_block [{batch}, {seq_len}, {spec.d_model}] {str(dtype).removeprefix('torch.')} on {device}, "
        f"{n_loops} loop{'s' if n_loops != 1 else ''}, {'with' if grad else 'without'} gradients",
        f"  runs on   {chosen.backend}: {chosen.why}",
        f"  how       {module_of(chosen.backend).how(problem)}",
    ]
    if grad:
        mib = n_loops * chosen.saved_bytes_per_loop / 2**20
        lines.append(f"  backward  keeps about {mib:.1f} MiB ({n_loops} x {mib / max(n_loops, 1):.2f})")
    lines += [f"  not       {name}: {why}" for name, why in chosen.refused]
    return "\n".join(lines)
