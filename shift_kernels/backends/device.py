"""What the GPU backends ask of the device before a launch."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels start on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def matmul_precision() -> str:
    """``ieee`` or ``tf32``: float32 products follow torch's own switches.

    ``torch.get_float32_matmul_precision`` raises where the newer of the two was used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
