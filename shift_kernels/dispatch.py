"""Which backend runs a call, and why. Decided by arithmetic and the measured table, never by trying.

a name    that backend, or an error with its reason
auto      where the shape was measured on this device: the fastest that was verified; elsewhere the first
          of the registry that serves it and needs no verification
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import warnings
from typing import Any

import torch

from shift_kernels import measured
from shift_kernels.backends import ATTENTION, LOOPED_BLOCK
from shift_kernels.backends.base import Backend, ExtendsCache, Kind, Registry, WhyNot
from shift_kernels.call import AttentionProblem, Problem
from shift_kernels.checks import check_choice
from shift_kernels.environment import check_words, word_of
from shift_kernels.errors import BackendFallbackWarning, input_error
from shift_kernels.torch_internals import constant_for_dynamo


@dataclasses.dataclass(frozen=True)
class Plan:
    """The backend chosen for a problem.

    Args:
        backend: its name.
        why: one sentence.
        refused: backends asked before it, with their reasons.
    """

    backend: str
    why: str
    refused: tuple[tuple[str, WhyNot], ...]


def backends() -> dict[str, str]:
    """Every backend by name, with ``"available"`` or the reason why it is not."""
    reasons = {b.name: b.why_not(None) for b in LOOPED_BLOCK}
    return {name: "available" if no is None else no.words for name, no in reasons.items()}


def register(backend: Backend) -> None:
    """Make a backend of your own a candidate: ``auto`` asks it before all others.

    Args:
        backend: an object with the methods of :class:`shift_kernels.backends.base.Backend`.

    Raises:
        ShiftTypeError: it lacks one of them.
    """
    LOOPED_BLOCK.register(backend)
    forget()


def plan(problem: Problem, backend: str = "auto") -> Plan:
    """Choose the backend for a looped block.

    Raises:
        ShiftInputError: an explicit ``backend`` is unknown, not available, or does not serve the problem; an
            environment variable is misspelt.
    """
    check_choice(LOOPED_BLOCK.function, "backend", backend, ["auto", *LOOPED_BLOCK.names()])
    if torch.compiler.is_compiling():  # sizes may be symbols, and a cache is nothing to trace
        return _plan(problem, backend)
    return _cached_plan(problem, backend, torch.get_num_threads())  # which the measured table speaks of


def _plan(problem: Problem, backend: str) -> Plan:
    check_words()  # once for each problem: a call in a loop has no time for it
    if backend == "auto" and problem.cache_dtype is None:  # which no table speaks of
        for name in measured.fastest_first(problem):
            if name in candidates(problem):
                return Plan(name, "the fastest that was verified on this device", ())
    return _choose(LOOPED_BLOCK, problem, backend)


@functools.lru_cache(maxsize=1024)
def _cached_plan(problem: Problem, backend: str, n_threads: int) -> Plan:
    return _plan(problem, backend)


def forget() -> None:
    """Plan every problem anew: after a registration or a measurement."""
    _cached_plan.cache_clear()
    measured.forget()


def plan_attention(problem: AttentionProblem, backend: str = "auto") -> Plan:
    """As :func:`plan`, for :func:`shift_kernels.attention`."""
    check_choice(ATTENTION.function, "backend", backend, ["auto", *ATTENTION.names()])
    return _choose(ATTENTION, problem, backend)


def _choose(registry: Registry[Any], problem: Any, backend: str) -> Plan:
    """The backend of that name; for "auto" the first of the registry with nothing in its way."""
    if backend != "auto":
        no = _why_not(registry.get(backend), problem)
        if no is None or no.runs:
            return Plan(backend, "asked for", ())
        raise input_error(
            registry.function,
            "backend",
            backend,
            f"what it serves: {no.words}",
            "Use backend='auto' or 'torch'.",
        )
    refused: list[tuple[str, WhyNot]] = []
    for candidate in registry:
        no = _why_not(candidate, problem)
        if no is None:
            why = "first of " + ", ".join(registry.names()) + " that serves this"
            return Plan(candidate.name, why, tuple(refused))
        refused.append((candidate.name, no))
    raise AssertionError("the torch backend serves everything")


def _why_not(backend: Any, problem: Any) -> WhyNot | None:
    """As a backend says; one that is no :class:`ExtendsCache` serves no cache."""
    no = backend.why_not(problem)
    if (
        (no is None or no.runs)
        and getattr(problem, "cache_dtype", None) is not None
        and not isinstance(backend, ExtendsCache)
    ):
        return WhyNot(Kind.FOREIGN, "is for calls without a cache")
    return no


def candidates(problem: Problem) -> list[str]:
    """Backends that could run a problem, whether verified on this device or not."""
    reasons = {b.name: _why_not(b, problem) for b in LOOPED_BLOCK}
    return [name for name, no in reasons.items() if no is None or no.runs]


def plan_and_warn(problem: Problem, backend: str) -> Plan:
    """As :func:`plan`; says once for each reason when ``auto`` takes a slower path than it should.

    Raises:
        ShiftInputError: as :func:`plan`; or ``auto`` would take a slow path while ``SHIFT_KERNELS_STRICT=1``.
    """
    chosen = plan(problem, backend)
    if backend == "auto" and chosen.refused:
        _say_slow(problem, chosen)
    return chosen


_SAID: set[str] = set()


def _say_slow(problem: Problem, chosen: Plan) -> None:
    slow = "; ".join(f"{name}: {no.words}" for name, no in chosen.refused if no.kind is Kind.UNSERVED)
    unverified = [name for name, no in chosen.refused if no.kind is Kind.UNVERIFIED]
    if slow and word_of("SHIFT_KERNELS_STRICT") == "1":
        raise input_error(
            LOOPED_BLOCK.function,
            "backend",
            "auto",
            f"problems that a fast backend serves while SHIFT_KERNELS_STRICT=1 ({slow})",
            "Change the block, or unset SHIFT_KERNELS_STRICT.",
        )
    if slow:
        _say_once(
            f"{LOOPED_BLOCK.function}: slow path, running on '{chosen.backend}' because {slow}. "
            "shift_kernels.explain(...) tells more; pass backend= to choose and silence this."
        )
    elif unverified and problem.device.type != "cpu":  # there only Triton's interpreter would be one
        _say_once(
            f"{LOOPED_BLOCK.function}: running on '{chosen.backend}': {' and '.join(unverified)} were not "
            "measured on this device for this shape. Run shift-calibrate, or pass backend= to choose."
        )


@constant_for_dynamo
def _say_once(text: str) -> None:
    """Warn where the user's code called torch or us."""
    if text in _SAID:
        return
    _SAID.add(text)
    frame, level, ours = sys._getframe(), 1, ("shift_kernels", "torch")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, BackendFallbackWarning, stacklevel=level)
