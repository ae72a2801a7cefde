"""The rule of every measurement: a kernel's error is at most twice plain PyTorch's in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

ALLOWED = 2.0
"""The largest :func:`error_ratio` of a right result."""
ORDER = 1e-6
"""Of the largest number: what float32 sums over thousands of rows differ by in another order."""


def error_ratio(ours: Tensor, plain: Tensor, truth: Tensor) -> float:
    """The largest error of a result over the largest of plain PyTorch's.

    A rounding of the largest number is added to the latter, which may be right by luck.

    Args:
        ours: the result; infinite is returned where it is not finite.
        plain: that of plain PyTorch in the same dtype.
        truth: that of float64.
    """
    if not ours.isfinite().all():
        return float("inf")
    rounding = max(torch.finfo(ours.dtype).eps, ORDER) * truth.abs().max().clamp(min=1e-3)
    ours_off, plain_off = ((x.double() - truth).abs().max() for x in (ours, plain))
    return float(ours_off / (plain_off + rounding))
