"""The ``cpu`` backend: all T loops in one C++ call (csrc/cpu), activations in the core's cache.

Keeps what the matrix products need again in the backward; of very large batches only the loop boundaries.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shift_kernels import compiled
from shift_kernels.backends.base import SERVED_BY_ALL, Kind, Served, WhyNot
from shift_kernels.cache import Step
from shift_kernels.call import CallOptions, Problem
from shift_kernels.environment import declare
from shift_kernels.rotary import rotary_table
from shift_kernels.spec import (
    ACTIVATIONS,
    INJECTIONS,
    NORM_WEIGHTS,
    PLACEMENTS,
    BlockSpec,
    spec_from_key,
)
from shift_kernels.torch_internals import constant_for_dynamo

MOST_KEPT_BYTES = 256 * 2**20
"""Activations of one loop up to this are kept for the backward (as a rule a seventh of what autograd keeps);
beyond it only the loop boundaries are, and the backward computes every loop again."""
WIDE, FEW_TOKENS = 512, 64
"""One loop over fewer tokens of a block so wide is slower than the torch backend (bfloat16: than d_model)."""
LINE = 64
"""Bytes of a cache line."""
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),  # autocast
    (torch.bfloat16, torch.bfloat16),
)
"""Of e and of the matrix products' operands. Residual stream, attention and all sums are float32."""
_HERE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Said of every tensor that the library writes to: torch's defaults belong to the user."""


# Asked once, here, so that torch.compile finds a constant where it traces the choice of a backend.
_NATIVE: Any
_NATIVE, _STATUS = compiled.load("_native")
if _NATIVE is not None:
    declare("SHIFT_KERNELS_CPU_ISA", _NATIVE.ISAS)  # the library reads it, and takes another word for none
_MOST_LAYERS = 0 if _NATIVE is None else _NATIVE.MOST_LAYERS


def _absent() -> str | None:
    """Why this backend cannot be used on this machine, or None."""
    return _STATUS if _NATIVE is None else None


def _foreign(problem: Problem) -> str | None:
    """Why the problem is of a kind that this backend is not for, or None."""
    if problem.device.type != "cpu":
        return f"is for CPU tensors, not {problem.device.type}"
    if torch.float64 in (problem.dtype, problem.compute_dtype):
        return "is for float32 and bfloat16, not float64"
    return None


def _unserved(problem: Problem) -> str | None:
    """Why this backend does not serve a problem that it is meant for, or None."""
    if (problem.dtype, problem.compute_dtype) not in DTYPES:
        products = problem.compute_dtype
        return f"{problem.dtype} with matrix products in {products} is not served, bfloat16 is"
    if (refusal := CpuBackend.served.refusal(problem)) is not None:
        return refusal
    if problem.cache_dtype not in (None, torch.float32):
        return f"keys and values in {problem.cache_dtype} are not served: build the LoopedCache in float32"
    if problem.spec.n_layers > _MOST_LAYERS:
        return f"n_layers = {problem.spec.n_layers} > {_MOST_LAYERS}"
    return None


def _slower(problem: Problem) -> str | None:
    """Why the torch backend is faster, as ``benchmarks.kernels.sizes`` measured, or None."""
    wide, n_loops = problem.spec.d_model >= WIDE, problem.n_loops
    if not wide or n_loops != 1 or problem.cache_dtype is not None:  # sizes last: they may be symbols
        return None
    half = problem.compute_dtype == torch.bfloat16
    few = problem.spec.d_model if half else FEW_TOKENS
    if problem.batch * problem.seq_len >= few:
        return None
    return f"packing weights of d_model >= {WIDE} for one loop over fewer than {few} tokens does not pay"


def _saved_shape(e: Tensor, spec: BlockSpec, n_loops: int, compute_dtype: torch.dtype) -> tuple[int, ...]:
    """Activations, or loop boundaries where those are many. 16 numbers are slack for vector loads."""
    rows, width = e.shape[0] * e.shape[1], _kept_floats(spec, compute_dtype)
    return (n_loops, rows * width + 16) if _keeps(rows, width) else (n_loops, *e.shape)


def _keeps(rows: int, width: int) -> bool:
    return 4 * rows * width <= MOST_KEPT_BYTES


def _kept_floats(spec: BlockSpec, compute_dtype: torch.dtype) -> int:
    """Floats kept of a token in a loop, two bfloat16 being one."""
    return _ask_kept_floats(spec.key, compute_dtype == torch.bfloat16)


@constant_for_dynamo
def _ask_kept_floats(spec_key: str, bf16: bool) -> int:
    """Asks the library, which torch.compile cannot trace."""
    return _NATIVE.kept_floats(compiled.block(_NATIVE, spec_from_key(spec_key)), bf16=bf16)


def _call(
    e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, rotary: Tensor | None = None
) -> tuple[Any, tuple[object, ...]]:
    """The part of a call that forward and backward share, and what must live as long as it.

    Args:
        rotary: the table, where it is not that of the first seq_len positions.
    """
    batch, seq_len, _ = e.shape
    loops, lengths = (
        torch.as_tensor(x, dtype=torch.int64, device="cpu").expand(batch).contiguous()
        for x in (options.n_loops, seq_len if options.seq_lens is None else options.seq_lens)
    )
    most = max(int(loops.max()), 0) if isinstance(options.n_loops, Tensor) else options.n_loops
    if spec.position == "rope" and rotary is None:
        rotary = rotary_table(seq_len, spec, e.device).to(torch.float32).contiguous()
    e = e.to(torch.float32).contiguous()
    h0 = None if options.h0 is None else options.h0.to(torch.float32).contiguous()
    scale = options.branch_scale(spec)
    scales = scale.to("cpu", torch.float32).contiguous() if isinstance(scale, Tensor) else None
    matrices = {name for name, w in weights.items() if w.ndim == 2 and name.startswith("layers.")}
    bf16_weights = all(weights[name].dtype == torch.bfloat16 for name in matrices)
    as_they_are = matrices if bf16_weights else set()  # a copy would take as long as small products do
    values = {
        name: (w if name in as_they_are else w.to(torch.float32)).contiguous() for name, w in weights.items()
    }
    call = _NATIVE.Call(
        compiled.block(_NATIVE, spec),
        batch=batch,
        seq_len=seq_len,
        most_loops=most,
        n_threads=torch.get_num_threads(),
        return_all=options.return_all_loops,
        n_grad_loops=min(options.n_grad_loops or 0, most),
        halting=options.halt_threshold is not None,
        halt_threshold=options.halt_threshold or 0.0,
        bf16=options.compute_dtype == torch.bfloat16,
        bf16_weights=bf16_weights,
        residual_scale=1.0 if scales is not None else scale,
        e=e.data_ptr(),
        loops=loops.data_ptr(),
        lengths=lengths.data_ptr(),
        weights=compiled.addresses(_NATIVE, values, spec),
    )
    if rotary is not None:
        call.rotary, call.rotary_rows = rotary.data_ptr(), rotary.shape[1]
    if h0 is not None:
        call.h0 = h0.data_ptr()
    if scales is not None:
        call.scales = scales.data_ptr()
    return call, (e, h0, loops, lengths, scales, rotary, values)


def _rotary_of_step(spec: BlockSpec, options: CallOptions, step: Step) -> tuple[Tensor | None, Tensor]:
    """The table of a step's rotary positions, and the row of each sample's first token, int64 [batch]."""
    if spec.position != "rope":
        return None, step.before
    if options.position_offset is None:  # as a rule: one table for all steps
        return _rotary_rows(spec.key, step.cache.max_len), step.before.contiguous()
    first = step.before + options.position_offset.cpu()
    rows = int(first.max() - first.min() + step.n_new.max())
    table = rotary_table(max(rows, 1), spec, torch.device("cpu"), first.min()[None])
    return table[:, 0, 0].to(torch.float32).contiguous(), (first - first.min()).contiguous()


@functools.lru_cache(maxsize=16)
def _rotary_rows(spec_key: str, rows: int) -> Tensor:
    return rotary_table(rows, spec_from_key(spec_key), torch.device("cpu")).to(torch.float32).contiguous()


def _allocate(new: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
    """``new(shape)``, or MemoryError where torch knows only a RuntimeError."""
    try:
        return new(shape, **_HERE)
    except RuntimeError as error:
        raise _no_memory(shape) from error


def _no_memory(shape: tuple[int, ...]) -> MemoryError:
    return MemoryError(f"shift_kernels: no memory for {list(shape)} numbers, {4 * math.prod(shape):,} bytes")


_FREE: dict[int, np.ndarray] = {}
"""By their id, buffers that no step uses: one for each part of a model (prelude, core, coda), one more."""
MOST_FREE = 4


def _buffer(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised float32 tensor, in the smallest memory given back by earlier steps that is enough.

    Fresh memory of this size comes from the system page by page, which took as long as the forward itself. It
    begins on a cache line: numpy's does not, and a vector that lies on two lines costs twice.
    """
    n = math.prod(shape)
    memory = _take(n + LINE // 4)
    if memory is None:
        try:
            memory = np.empty(n + LINE // 4, dtype=np.float32)
        except (MemoryError, ValueError) as error:  # ValueError: more than an address can be
            raise _no_memory(shape) from error
    start = -memory.ctypes.data % LINE // 4
    part = memory[start : start + n]
    weakref.finalize(part, _give_back, memory)
    return torch.from_numpy(part).view(shape)


def _take(n: int) -> np.ndarray | None:
    for _, key in sorted((len(memory), key) for key, memory in list(_FREE.items()) if len(memory) >= n):
        if (memory := _FREE.pop(key, None)) is not None:  # another thread may have taken it
            return memory
    return None


def _give_back(memory: np.ndarray) -> None:
    _FREE[id(memory)] = memory
    while len(_FREE) > MOST_FREE:
        _FREE.pop(min(list(_FREE), key=lambda key: len(_FREE.get(key, ()))), None)


def _set_saved(call: Any, saved: list[Tensor]) -> None:
    for x in saved:
        assert x.is_contiguous()
        setattr(call, "kept" if x.ndim == 2 else "boundaries", x.data_ptr())


class CpuBackend:
    """All loops in one C++ call; see the top of this file."""

    name, saves = "cpu", True
    served = Served(
        {
            **SERVED_BY_ALL,
            "activation": ACTIVATIONS,
            "norm_placement": PLACEMENTS,
            "norm_weight": NORM_WEIGHTS,
            "injection": INJECTIONS,
            "residual_scale": (float, str),
            "qkv_bias": (bool,),
            "window": (int,),
            "softcap": (float,),
            "attn_scale": (float,),
            "qk_norm": (bool,),
            "rope_freqs": (tuple,),
        },
        call=("h0", "residual_scale"),
    )

    def why_not(self, problem: Problem | None) -> WhyNot | None:
        """A library that was not built is a slow path to be told of: every machine with a compiler has it."""
        missing = _absent()
        if problem is None:
            return WhyNot.of(Kind.ABSENT, missing)
        return (
            WhyNot.of(Kind.FOREIGN, _foreign(problem))
            or WhyNot.of(Kind.UNSERVED, missing or _unserved(problem))
            or WhyNot.of(Kind.SLOWER, _slower(problem))
        )

    def describe(self, problem: Problem) -> str:
        """In a phrase, with what the backward reads."""
        kept = _keeps(problem.batch * problem.seq_len, _kept_floats(problem.spec, problem.compute_dtype))
        backward = f"; the backward {'reads kept activations' if kept else 'recomputes each loop'}"
        return f"one C++ call for all loops{backward if problem.grad else ''}"

    def saved_bytes(self, problem: Problem) -> int:
        """Bytes kept for the backward pass, per loop."""
        rows, spec = problem.batch * problem.seq_len, problem.spec
        width = _kept_floats(spec, problem.compute_dtype)
        return 4 * rows * (width if _keeps(rows, width) else spec.d_model)

    def saved_like(
        self, e: Tensor, spec: BlockSpec, n_loops: int, compute_dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Empty tensors shaped as what :func:`forward` saves."""
        return [e.new_empty(_saved_shape(e, spec, n_loops, compute_dtype or e.dtype), dtype=torch.float32)]

    def forward(
        self,
        e: Tensor,
        weights: dict[str, Tensor],
        spec: BlockSpec,
        options: CallOptions,
        for_backward: bool,
        isa: str | None = None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """h_T (or all h_t), the loops used, and what the backward reads, if one follows."""
        call, keep = _call(e, weights, spec, options)
        shape = (call.most_loops, *e.shape) if options.return_all_loops else e.shape
        new = torch.empty if options.seq_lens is None else torch.zeros  # pads are never written
        out, used = _allocate(new, shape), torch.empty(e.shape[0], dtype=torch.int64, device="cpu")
        to_save = _saved_shape(e, spec, call.most_loops, options.compute_dtype)
        saved = [_buffer(to_save)] if for_backward else []
        call.out, call.used = out.data_ptr(), used.data_ptr()
        _set_saved(call, saved)
        _NATIVE.run(call, backward=False, isa=isa)
        del keep
        return out.to(e.dtype), used, saved

    def extend(
        self,
        e: Tensor,
        weights: dict[str, Tensor],
        spec: BlockSpec,
        options: CallOptions,
        step: Step,
    ) -> Tensor:
        """h_T (or all h_t) of the tokens e, which see those in the step's cache and are appended to it."""
        before, cache = step.before.contiguous(), step.cache
        rotary, positions = _rotary_of_step(spec, options, step)
        lengths = dataclasses.replace(options, seq_lens=step.n_new)
        call, keep = _call(e, weights, spec, lengths, rotary)
        shape = (call.most_loops, *e.shape) if options.return_all_loops else e.shape
        out, used = _allocate(torch.zeros, shape), torch.empty(e.shape[0], dtype=torch.int64, device="cpu")
        call.out, call.used = out.data_ptr(), used.data_ptr()
        call.cache, call.cache_len, call.cache_loops = (
            cache.memory.data_ptr(),
            cache.max_len,
            cache.keep_loops,
        )
        call.before, call.positions = before.data_ptr(), positions.data_ptr()
        _NATIVE.run(call, backward=False)
        del keep
        return out.to(e.dtype)

    def backward(
        self,
        grad_h: Tensor,
        e: Tensor,
        weights: dict[str, Tensor],
        spec: BlockSpec,
        options: CallOptions,
        saved: list[Tensor],
        isa: str | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of e, of the weights, in the order of ``weights``, and of h0 if it is given."""
        call, keep = _call(e, weights, spec, options)
        call.most_loops = len(saved[0])  # of the forward: more are not there to be read
        grad_h = grad_h.to(torch.float32).contiguous()
        grad_e = torch.zeros(e.shape, **_HERE)
        grads = {  # matrices are overwritten
            name: (torch.zeros if w.ndim < 2 else torch.empty)(w.shape, **_HERE)
            for name, w in weights.items()
        }
        grad_h0 = None if options.h0 is None else torch.zeros(e.shape, **_HERE)
        _set_saved(call, saved)
        call.grad_out, call.grad_e = grad_h.data_ptr(), grad_e.data_ptr()
        if grad_h0 is not None:
            call.grad_h0 = grad_h0.data_ptr()
        call.grad_weights = compiled.addresses(_NATIVE, grads, spec)
        _NATIVE.run(call, backward=True, isa=isa)
        del keep
        found = [g.to(weights[name].dtype) for name, g in grads.items()]
        return grad_e.to(e.dtype), found if grad_h0 is None else [*found, grad_h0.to(e.dtype)]


CPU = CpuBackend()
