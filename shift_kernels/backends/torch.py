"""The ``torch`` backend: the reference behind the backend interface. It serves every call.

Its backward recomputes the forward under autograd, so nothing is kept between the two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from shift_kernels import reference
from shift_kernels.asked import Asked
from shift_kernels.problem import Problem
from shift_kernels.spec import BlockSpec

NAME = "torch"
SAVES = False  # forward keeps nothing for backward
ONLY_BY_NAME = None


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine, or None."""
    return None


def meant_for(problem: Problem) -> str | None:
    """Why the problem is of a kind that this backend is not for, or None."""
    return None


def refusal(problem: Problem) -> str | None:
    """Why this backend does not serve a problem that it is meant for, or None."""
    return None


def how(problem: Problem) -> str:
    """In a phrase."""
    return "plain PyTorch, an operation at a time"


def saved_bytes(problem: Problem) -> int:
    """Bytes kept for the backward pass, per loop: every activation that autograd records (estimate)."""
    s = problem.spec
    hidden = 2 * s.d_ff if s.activation == "swiglu" else s.d_ff
    per_token = s.n_layers * (4 * s.d_model + 2 * s.qkv_dim + 2 * hidden + s.n_heads * problem.seq_len)
    return problem.batch * problem.seq_len * per_token * problem.dtype.itemsize


def forward(
    e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, asked: Asked, for_backward: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """h_T (or all h_t), the loops used, and what :func:`backward` needs besides the inputs (nothing)."""
    return *reference.looped_block(e, weights, spec, **vars(asked)), []


def backward(
    grad_h: Tensor, e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, asked: Asked, saved: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of e and of the weights, in the order of ``weights``."""

    with _recording():
        inputs = [x.detach().requires_grad_() for x in (e, *weights.values())]
        h, _ = reference.looped_block(
            inputs[0], dict(zip(weights, inputs[1:], strict=True)), spec, **vars(asked)
        )
        grad_e, *grad_weights = torch.autograd.grad(h, inputs, grad_h)
    return grad_e, grad_weights


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Let autograd record inside an operator's implementation, which runs below it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
