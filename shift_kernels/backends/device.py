"""What the GPU backends have in common: which problems they are for, and what they ask of the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from shift_kernels.backends.base import UNVERIFIED, Kind, WhyNot
from shift_kernels.call import CallOptions, Problem
from shift_kernels.errors import input_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(
    problem: Problem | None,
    *,
    absent: str | None,
    emulated: bool,
    unserved: Callable[[Problem], str | None],
) -> WhyNot | None:
    """A GPU backend's answer: absent, for other tensors, does not serve them, or not verified on the device.

    Args:
        problem: see :meth:`shift_kernels.backends.base.Backend.why_not`.
        absent: why the backend cannot be used on this machine.
        emulated: CPU tensors are served, too: for tests.
        unserved: why it does not serve a problem that it is meant for.
    """
    found = WhyNot.of(Kind.ABSENT, absent)
    if found is None and problem is not None:
        foreign = foreign_device(problem.device, emulated) or _foreign_dtype(problem)
        # On CPU tensors, which tests alone bring here, no user waits for a faster path.
        kind = Kind.UNSERVED if problem.device.type == "cuda" else Kind.FOREIGN
        found = (
            WhyNot.of(Kind.FOREIGN, foreign) or WhyNot.of(kind, foreign or unserved(problem)) or UNVERIFIED
        )
    return found


def no_device(emulated: bool) -> str | None:
    """Why nothing runs here, or None."""
    return None if emulated or torch.cuda.is_available() else "no CUDA device"


def foreign_device(device: torch.device, emulated: bool) -> str | None:
    """Why a backend is not for tensors of this device, or None."""
    served = device.type == "cuda" or (emulated and device.type == "cpu")
    return None if served else f"is for CUDA tensors, not {device.type}"


def _foreign_dtype(problem: Problem) -> str | None:
    found = next((d for d in (problem.dtype, problem.compute_dtype) if d not in DTYPES), None)
    if found is None:
        return None
    return f"is for float32, float16 and bfloat16, not {str(found).removeprefix('torch.')}"


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels start on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether the caller makes a CUDA graph of what is launched now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_in_capture(e: Tensor, options: CallOptions, *, asks_for_loops: bool) -> None:
    """A CUDA graph can hold neither a copy from pageable memory nor a question to the device.

    Args:
        e: whose device captures.
        options: of the call.
        asks_for_loops: the host must know the largest T.

    Raises:
        ShiftInputError: the call needs one of them.
    """
    if not capturing(e.device):
        return
    function = "shift_kernels.looped_block"
    for name in ("n_loops", "seq_lens"):
        x = getattr(options, name)
        if isinstance(x, Tensor) and x.device.type == "cpu":
            allowed = f"a tensor on {e.device} while a CUDA graph is captured"
            raise input_error(function, name, "a tensor on the CPU", allowed, "Move it before the capture.")
    if asks_for_loops and isinstance(options.n_loops, Tensor):
        allowed = "an int while a CUDA graph is captured, where all states are kept or returned"
        raise input_error(
            function, "n_loops", f"a tensor on {e.device}", allowed, "Capture it with a T for all samples."
        )


def matmul_precision() -> str:
    """``ieee`` or ``tf32``: float32 products follow torch's own switches.

    ``torch.get_float32_matmul_precision`` raises where the newer of the two was used.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
