"""Which backend runs a call, and why. Decided by arithmetic and the measured table, never by trying.

a name    that backend, or an error with its reason
auto      where the shape was measured on this device: the fastest that was verified; elsewhere the first
          of the registry that serves it and needs no verification
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from shift_kernels import measured
from shift_kernels.backends import ATTENTION, LOOPED_BLOCK
from shift_kernels.backends.base import Backend, ExtendsCache, Kind, Registry, WhyNot
from shift_kernels.cache import LoopedCache
from shift_kernels.call import OWN_ATTENTION_OPTIONS, AttentionProblem, Problem
from shift_kernels.checks import check_bool, check_choice, check_device, check_dtype, check_int
from shift_kernels.errors import BackendFallbackWarning, input_error, refuses_unknown_keywords, type_error
from shift_kernels.spec import MAX_LOOPS, MAX_TOKENS, BlockSpec
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
        ShiftInputError: an explicit ``backend`` is unknown, not available, or does not serve the problem.
    """
    check_choice(LOOPED_BLOCK.function, "backend", backend, ["auto", *LOOPED_BLOCK.names()])
    if torch.compiler.is_compiling():  # sizes may be symbols, and a cache is nothing to trace
        return _plan(problem, backend)
    return _cached_plan(problem, backend, torch.get_num_threads())  # which the measured table speaks of


def _plan(problem: Problem, backend: str) -> Plan:
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
    if slow and os.environ.get("SHIFT_KERNELS_STRICT") == "1":
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
    cache: LoopedCache | None = None,
) -> str:
    """Say in words which backend would run this looped block, why, and what it keeps for the backward.

    Args:
        spec: the block.
        batch, seq_len: shape of e, [batch, seq_len, d_model].
        dtype: dtype of e.
        device: where e would live; it need not exist on this machine.
        grad: whether a backward pass follows.
        n_loops: T, for the memory figures and the measured table.
        backend: as for ``looped_block``.
        cache: that the tokens would be appended to; its bytes are told, and nothing is allocated.

    Raises:
        ShiftInputError: no such block can be called, or the named backend does not serve it.
    """
    function = "shift_kernels.explain"
    if not isinstance(spec, BlockSpec):
        raise type_error(function, "spec", type(spec).__name__, "a BlockSpec", "Build one: BlockSpec(...).")
    batch = check_int(function, "batch", batch, 1, MAX_TOKENS)
    seq_len = check_int(function, "seq_len", seq_len, 1, MAX_TOKENS)
    n_loops = check_int(function, "n_loops", n_loops, 0, MAX_LOOPS)
    check_dtype(function, "dtype", dtype)
    place = check_device(function, "device", device)
    check_bool(function, "grad", grad)
    if cache is not None and not isinstance(cache, LoopedCache):
        given = type(cache).__name__
        raise type_error(function, "cache", given, "a LoopedCache", "Build one: LoopedCache(spec, ...).")
    grad = grad and cache is None
    cache_dtype = None if cache is None else cache.dtype
    problem = Problem(
        spec, batch, seq_len, dtype, dtype, place, grad, n_loops=n_loops, cache_dtype=cache_dtype
    )
    chosen = plan(problem, backend)
    running = LOOPED_BLOCK.get(chosen.backend)
    lines = [
        f"looped_block [{batch}, {seq_len}, {spec.d_model}] {str(dtype).removeprefix('torch.')} on {device}, "
        f"{n_loops} loop{'s' if n_loops != 1 else ''}, {'with' if grad else 'without'} gradients",
        *_choice_lines(chosen, running.describe(problem)),
    ]
    if grad:
        mib = n_loops * running.saved_bytes(problem) / 2**20
        lines.insert(3, f"  backward  keeps about {mib:.1f} MiB ({n_loops} x {mib / max(n_loops, 1):.2f})")
    if cache is not None:
        lines.append(f"  cache     {cache.describe()}")
    row = (measured.lookup(problem) if cache is None else None) or {}
    lines += [f"  measured  {name}: {verdict}" for name, verdict in row.items()]
    return "\n".join(lines)


@refuses_unknown_keywords("shift_kernels.explain_attention")
def explain_attention(
    batch: int,
    n_heads: int,
    seq_len: int,
    head_dim: int,
    *,
    n_kv_heads: int | None = None,
    k_len: int | None = None,
    options: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    grad: bool = True,
    backend: str = "auto",
) -> str:
    """Say in words which backend would run :func:`shift_kernels.attention`, and why.

    Args:
        batch, n_heads, seq_len, head_dim: shape of q.
        n_kv_heads: heads of k and v; default ``n_heads``.
        k_len: length of k and v; default ``seq_len``.
        options: names of the keywords that the call gives, of ``k_seq_lens``, ``window``, ``softcap`` and
            ``scale``.
        dtype, device: of q, k and v; the device need not exist on this machine.
        grad: whether a backward pass follows.
        backend: as for ``attention``.

    Raises:
        ShiftInputError: no such attention can be called, or the named backend does not serve it.
    """
    function = "shift_kernels.explain_attention"
    shape = dict(batch=batch, n_heads=n_heads, seq_len=seq_len, head_dim=head_dim)
    shape |= {"n_kv_heads": n_heads if n_kv_heads is None else n_kv_heads}
    shape |= {"k_len": seq_len if k_len is None else k_len}
    for name in options:
        check_choice(function, "options", name, OWN_ATTENTION_OPTIONS)
    sizes: dict[str, Any]
    sizes = {name: check_int(function, name, size, 1, MAX_TOKENS) for name, size in shape.items()}
    if sizes["n_heads"] % sizes["n_kv_heads"]:
        raise input_error(
            function, "n_kv_heads", n_kv_heads, f"a divisor of n_heads = {n_heads}", "Change either."
        )
    check_dtype(function, "dtype", dtype)
    check_bool(function, "grad", grad)
    place = check_device(function, "device", device)
    problem = AttentionProblem(**sizes, dtype=dtype, device=place, grad=grad, options=tuple(options))
    chosen = plan_attention(problem, backend)
    how = ATTENTION.get(chosen.backend).describe(problem)
    shown = f"{str(dtype).removeprefix('torch.')} on {device}"
    keys = "" if problem.k_len == seq_len else f" over {k_len} keys"
    head = f"attention [{batch}, {n_heads}, {seq_len}, {head_dim}]{keys} {shown}"
    return "\n".join([head, *_choice_lines(chosen, how)])


def _choice_lines(chosen: Plan, how: str) -> list[str]:
    lines = [f"  runs on   {chosen.backend}: {chosen.why}", f"  how       {how}"]
    return lines + [f"  not       {name}: {no.words}" for name, no in chosen.refused]
