"""From states to a loss: logits a chunk at a time, so that T x positions x classes of them never stand.

    logits z = W h + b, soft-capped to c tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2)
    loss     sum over read positions of log sum exp z - z[target]

Where all logits fit a chunk it is plain PyTorch. Else the forward computes each chunk's gradients while its
logits are there, and keeps those of states and weights alone: the backward only scales them (the idea of
Liger-Kernel, arXiv 2410.10989). Every logit is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shift.tasks.base import IGNORE

CHUNK = {"cpu": 2**22, "cuda": 2**26}
"""Logits that stand in memory at once, by kind of device. Every chunk adds to the weights' gradient: few
are fast: on one CPU thread 2**20 took twice as long as 2**22 at 50,304 classes."""


def logits_of(h: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Logits [..., n_classes] of states [..., d_model]."""
    logits = F.linear(h, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def summed_loss(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    softcap: float | None = None,
    loop_weights: Sequence[float] = (),
) -> Tensor:
    """The cross-entropy, summed over the positions that are read; 0-d, float32 (float64 of float64).

    Args:
        h: states [batch, seq_len, d_model]; with ``loop_weights`` those after every loop, [T, ...].
        weight, bias: of the read-out, [n_classes, d_model] and [n_classes].
        targets: int64 [batch, seq_len]; :data:`shift.tasks.base.IGNORE` where nothing is read.
        softcap: see above.
        loop_weights: of the losses after loop 1, 2, ..; the last one counts for all further loops. They are
            scaled to a sum of 1 over the T loops.
    """
    rows, targets = h.flatten(0, -2), targets.flatten()
    at_once = max(1, CHUNK.get(h.device.type, CHUNK["cuda"]) // len(weight))
    if not loop_weights and len(rows) <= at_once:
        logits = logits_of(rows, weight, bias, softcap)
        return F.cross_entropy(_full(logits), targets, ignore_index=IGNORE, reduction="sum")
    of_rows = None
    if loop_weights:
        own = [loop_weights[min(t, len(loop_weights) - 1)] for t in range(len(h))]
        of_rows = torch.tensor(own, device=h.device).div_(sum(own)).repeat_interleave(len(targets))
        targets = targets.repeat(len(h))
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(h.device.type, enabled=False):
        return _ChunkedLoss.apply(rows, weight, bias, targets, of_rows, softcap, at_once)


def _full(logits: Tensor) -> Tensor:
    """In the dtype in which losses are summed."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _ChunkedLoss(torch.autograd.Function):
    """The loss of states [rows, d_model]; ``of_rows`` weighs them."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        of_rows: Tensor | None,
        softcap: float | None,
        at_once: int,
    ) -> Tensor:
        grad = any(ctx.needs_input_grad[:3])
        sums = torch.float64 if h.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=sums, device=h.device)
        grad_h = torch.empty_like(h) if grad else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if grad else None
        grad_bias = torch.zeros_like(bias, dtype=sums) if grad and bias is not None else None
        for start in range(0, len(h), at_once):
            part = slice(start, start + at_once)
            z = _full(F.linear(h[part], weight, bias))
            if softcap is not None:
                z.div_(softcap).tanh_()
                slope = 1 - z.square()
                z.mul_(softcap)
            read = targets[part] != IGNORE
            scale = read.to(sums) if of_rows is None else read * of_rows[part]
            target = targets[part].clamp(min=0)[:, None]
            log_p = z.log_softmax(-1)
            loss -= (log_p.gather(-1, target)[:, 0] * scale).masked_fill(~read, 0).sum()
            if grad_h is None or grad_weight is None:
                continue
            # d loss / d z = (softmax(z) - one_hot(target)) times the row's weight; no gradient where unread.
            dz = log_p.exp_()
            dz.scatter_add_(-1, target, -torch.ones_like(target, dtype=sums))
            dz.mul_(scale[:, None]).masked_fill_(~read[:, None], 0)
            if softcap is not None:
                dz.mul_(slope)
            dz = dz.to(h.dtype)
            torch.mm(dz, weight, out=grad_h[part])
            grad_weight += dz.t() @ h[part]
            if grad_bias is not None:
                grad_bias += dz.sum(0)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(grad_h, grad_weight, grad_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_h, grad_weight, grad_bias = ctx.saved_tensors
        of_bias = None if grad_bias is None else (grad_bias * grad_loss).to(ctx.dtypes[1])
        scaled = (grad_h * grad_loss).to(grad_h.dtype), (grad_weight * grad_loss).to(ctx.dtypes[0])
        return *scaled, of_bias, None, None, None, None
