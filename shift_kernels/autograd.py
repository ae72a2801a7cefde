"""The looped block for autograd: an eager function, and an operator for compilers, tracers and modes.

``shift_kernels::looped_block`` takes the number of loops as data: a compiled model that passes it as a
tensor is never recompiled when it changes, one that passes an int is compiled once more at most.
Its autocast rule: matmul operands in autocast's dtype, the residual stream and the result in e's.
Outside torch.compile the eager function makes the same backend calls without the operator's overhead, over a
millisecond a step in Python, where a small block's whole step takes five.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from shift_kernels.backends import LOOPED_BLOCK
from shift_kernels.backends.base import Backend
from shift_kernels.call import CallOptions, named_again
from shift_kernels.errors import input_error
from shift_kernels.measured import kernels_hash
from shift_kernels.spec import BlockSpec, spec_from_key
from shift_kernels.torch_internals import (
    constant_for_dynamo,
    in_memory,
    outside_of_dynamo,
    without_autocast_key,
)


def _refuse_second_derivative(backend: str) -> NoReturn:
    raise input_error(
        "shift_kernels.looped_block",
        "backend",
        backend,
        "backend='torch' outside torch.compile for second derivatives",
        "Call looped_block(..., backend='torch').",
    )


class EagerLoopedBlock(torch.autograd.Function):
    """``apply(backend, spec, options, *inputs)`` returns h and the loops used.

    The inputs are what :func:`shift_kernels.call.differentiable` lists; the options hold no h0.
    """

    @staticmethod
    def forward(
        ctx: Any, backend: Backend, spec: BlockSpec, options: CallOptions, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        e, weights, call = named_again(inputs, spec, options)
        h, used, saved = backend.forward(e, weights, spec, call, for_backward=True)
        ctx.backend, ctx.spec, ctx.options, ctx.n_inputs = backend, spec, options, len(inputs)
        ctx.save_for_backward(*inputs, *saved)
        ctx.mark_non_differentiable(used)
        return h, used

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            _refuse_second_derivative(ctx.backend.name)
        tensors = ctx.saved_tensors  # once: a checkpoint computes them when asked
        inputs, saved = tensors[: ctx.n_inputs], tensors[ctx.n_inputs :]
        e, weights, call = named_again(inputs, ctx.spec, ctx.options)
        grad_e, grads = ctx.backend.backward(in_memory(grad_h), e, weights, ctx.spec, call, list(saved))
        return None, None, None, grad_e, *grads


_LIB = torch.library.Library("shift_kernels", "DEF")
# sample_loops: one T per sample, n_loops is then ignored. weights: in the order of weight_shapes().
# residual_scale: [] a number, [batch] one per sample. build: of build_of(). grads: those of the weights, then
# of h0 if it is given.
_LIB.define(
    "looped_block(Tensor e, Tensor[] weights, str spec, SymInt n_loops, Tensor? sample_loops, "
    "Tensor? seq_lens, Tensor? h0, Tensor? residual_scale, Tensor? position_offset, bool return_all_loops, "
    "SymInt? n_grad_loops, float? halt_threshold, ScalarType? compute_dtype, bool for_backward, str build)"
    " -> (Tensor h, Tensor loops_used, Tensor[] saved)"
)
_LIB.define(
    "looped_block_backward(Tensor grad_h, Tensor e, Tensor[] weights, Tensor[] saved, str spec, "
    "SymInt n_loops, Tensor? sample_loops, Tensor? seq_lens, Tensor? h0, Tensor? residual_scale, "
    "Tensor? position_offset, bool return_all_loops, SymInt? n_grad_loops, ScalarType? compute_dtype, "
    "str build) -> (Tensor grad_e, Tensor[] grads)"
)
_LIB.define("own_copy(Tensor x, ScalarType dtype) -> Tensor")


# An operator, since torch.compile may compute a copy again in the backward, from memory that is the caller's.
@torch.library.impl(_LIB, "own_copy", "CompositeExplicitAutograd")
def _own_copy(x, dtype):
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


@torch.library.register_fake("shift_kernels::own_copy", lib=_LIB)
def _own_copy_fake(x, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@constant_for_dynamo
def build_of(backend: str) -> str:
    """The operators' last argument: a backend's name, and which build of the kernels is installed.

    Sizes of what a build keeps for its backward are constants of a compiled graph. With the build among its
    arguments a graph that torch has cached on disk is not taken for another one.
    """
    return f"{backend} {kernels_hash()}"


def _backend(build: str) -> Backend:
    return LOOPED_BLOCK.get(build.partition(" ")[0])


def _named(weights: list[Tensor], spec_key: str) -> dict[str, Tensor]:
    return dict(zip(spec_from_key(spec_key).weight_shapes(), weights, strict=True))


def _options(e, compute_dtype, *call) -> CallOptions:
    """``call`` as in the schemas, from n_loops on."""
    n_loops, sample_loops, seq_lens, h0, scale, offset, all_loops, n_grad_loops, *rest = call
    return CallOptions(
        n_loops if sample_loops is None else sample_loops,
        compute_dtype or e.dtype,
        seq_lens,
        all_loops,
        n_grad_loops,
        rest[0] if rest else None,  # a backward knows no halt_threshold
        h0,
        float(scale) if scale is not None and scale.ndim == 0 else scale,
        offset,
    )


# Where outputs' sizes depend on data, torch.compile may leave the operator outside its graph, and would then
# look for something to compile inside.
@torch.library.impl(_LIB, "looped_block", "CompositeExplicitAutograd")
@outside_of_dynamo
def _forward(e, weights, spec, *options):
    *call, compute_dtype, for_backward, build = options
    return _backend(build).forward(
        e, _named(weights, spec), spec_from_key(spec), _options(e, compute_dtype, *call), for_backward
    )


@torch.library.impl(_LIB, "looped_block_backward", "CompositeExplicitAutograd")
@outside_of_dynamo
def _backward(grad_h, e, weights, saved, spec, *options):
    *call, compute_dtype, build = options
    return _backend(build).backward(
        grad_h, e, _named(weights, spec), spec_from_key(spec), _options(e, compute_dtype, *call), saved
    )


@torch.library.register_fake("shift_kernels::looped_block", lib=_LIB)
def _forward_fake(e, weights, spec, n_loops, sample_loops, *options):
    *_, return_all_loops, _, _, compute_dtype, for_backward, build = options
    module = _backend(build)
    saves = for_backward and module.saves
    if sample_loops is not None and (return_all_loops or saves):
        n_loops = torch.library.get_ctx().new_dynamic_size()  # the largest entry: known only when it runs
    h = e.new_empty((n_loops, *e.shape) if return_all_loops else e.shape)
    saved = module.saved_like(e, spec_from_key(spec), n_loops, compute_dtype) if saves else []
    return h, e.new_empty(e.shape[0], dtype=torch.int64), saved


@torch.library.register_fake("shift_kernels::looped_block_backward", lib=_LIB)
def _backward_fake(grad_h, e, weights, saved, spec, n_loops, sample_loops, seq_lens, h0, *_):
    inputs = weights if h0 is None else [*weights, h0]
    return torch.empty_like(e), [torch.empty_like(x) for x in inputs]


def _setup_context(ctx, inputs, output):
    e, weights, spec, n_loops, sample_loops, seq_lens, h0, scale, offset, *others = inputs
    all_loops, n_grad_loops, _, compute_dtype, _, build = others
    saved = output[2]
    ctx.n_weights = len(weights)
    ctx.save_for_backward(e, sample_loops, seq_lens, h0, scale, offset, *weights, *saved)
    ctx.options = (spec, n_loops, all_loops, n_grad_loops, compute_dtype, build)
    ctx.mark_non_differentiable(output[1], *saved)


def _autograd(ctx, grad_h, grad_used, grad_saved):
    e, sample_loops, seq_lens, h0, scale, offset, *tensors = ctx.saved_tensors
    spec, n_loops, *options = ctx.options
    weights, saved = tensors[: ctx.n_weights], tensors[ctx.n_weights :]
    grad_e, grads = torch.ops.shift_kernels.looped_block_backward(
        grad_h, e, weights, saved, spec, n_loops, sample_loops, seq_lens, h0, scale, offset, *options
    )
    grad_h0 = None if h0 is None else grads[-1]
    return grad_e, grads[: ctx.n_weights], None, None, None, None, grad_h0, *[None] * 8


torch.library.register_autograd(
    "shift_kernels::looped_block", _autograd, setup_context=_setup_context, lib=_LIB
)


def _no_second_derivative(ctx, *grads):
    _refuse_second_derivative(ctx.backend)


def _remember_backend(ctx, inputs, output):
    ctx.backend = _backend(inputs[-1]).name


torch.library.register_autograd(
    "shift_kernels::looped_block_backward", _no_second_derivative, setup_context=_remember_backend, lib=_LIB
)


def _autocast_rule(device_type: str, key: str) -> None:
    def rule(*args):
        *head, compute_dtype, for_backward, build = args
        with without_autocast_key(key):
            return torch.ops.shift_kernels.looped_block(
                *head, compute_dtype or torch.get_autocast_dtype(device_type), for_backward, build
            )

    _LIB.impl("looped_block", rule, key)


_autocast_rule("cpu", "AutocastCPU")
_autocast_rule("cuda", "AutocastCUDA")
