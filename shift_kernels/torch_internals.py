"""Torch's private names, all in one place: what a new torch version may move is mended here."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable)

outside_of_dynamo = torch._disable_dynamo


def constant_for_dynamo(function: F) -> F:
    """torch.compile calls the function where it traces and keeps the result.

    This is what torch.compiler.assume_constant_result does, which takes seconds to import.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_for_dynamo
def is_exporting() -> bool:
    """Whether torch.export traces; torch.compile of torch 2.11 takes torch's own question for a yes."""
    return torch.compiler.is_exporting()


def transforms_are_active(tensors: tuple[Tensor, ...]) -> bool:
    """True under torch.func and in forward-mode differentiation of these tensors."""
    level = forward_ad._current_level  # asked first, for what it spares every other call
    tangents = level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    return tangents or torch._C._are_functorch_transforms_active()


def is_mapped(x: Tensor) -> bool:
    """True of a tensor that torch.vmap maps over, whose values nobody can read."""
    if torch.compiler.is_compiling():  # reads none, and can't trace the question
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x) and not functorch.is_batchedtensor(x):
        x = functorch.get_unwrapped(x)  # of torch.func.grad, say, within vmap
    return functorch.is_batchedtensor(x)


@constant_for_dynamo
def exports_to_onnx() -> bool:
    """True while torch.onnx traces."""
    # torch imports it late, and so it stays.
    return is_exporting() and "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


_PLAIN = frozenset((Tensor, nn.Parameter))


def must_be_observed(tensors: tuple[Tensor, ...]) -> bool:
    """True if a tracer, dispatch mode or tensor subclass must observe the call.

    It then goes through the operator: kernels read memory by its address, which these do not notice, or do
    not have.
    """
    return (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or not _PLAIN.issuperset(map(type, tensors))
    )


def has_no_values(x: Tensor) -> bool:
    """True of fake and meta tensors."""
    return isinstance(x, torch._subclasses.FakeTensor) or x.is_meta


def without_negations(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same values, and none that autograd has left a negation to do."""
    return tuple(x.resolve_neg() for x in tensors) if any(map(Tensor.is_neg, tensors)) else tensors


def in_memory(x: Tensor) -> Tensor:
    """The same values where kernels find them: autograd may leave a negation to do, or store no zeros."""
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if x._is_zerotensor() else x.resolve_neg()


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Let autograd record inside an operator's implementation, which runs below it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def without_autocast_key(key: str) -> contextlib.AbstractContextManager[object]:
    """Below an autocast rule: the operator's next implementation, not the rule again."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)))
