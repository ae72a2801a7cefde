"""Calls into csrc/cuda."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch

from shift_kernels.native import FLOAT, INT, POINTER, fields, open_library

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""In the order of ``enum Dtype``."""


class Call(ctypes.Structure):
    """``struct Call`` of csrc/cuda/call.h, field by field."""

    _fields_ = fields(
        (INT, "batch seq_len d_model n_heads n_kv_heads head_dim n_layers d_ff"),
        (INT, "most_loops low high"),
        (INT, "activation norm placement causal rope injection loop_norm"),
        (INT, "return_all n_grad_loops halting own_loops ragged save"),
        (INT, "dtype compute_dtype weight_dtype"),
        (FLOAT, "eps residual_scale halt_threshold"),
        (INT, "shared_bytes n_sms sm90a"),
        (POINTER, "e loops lengths rotary weights out boundaries used workspace"),
        (POINTER, "grad_out dh de dv xn dqkv o dy xn2 dpre act dy2"),
    )


class Plan(ctypes.Structure):
    """``struct Plan`` of csrc/cuda/call.h: what the planner decided."""

    _fields_ = fields(
        (INT, "refusal rows sequences split programs threads kv_heads ff_pad ff_chunk stages tiles cluster"),
        (INT, "tile_in_shared shared_bytes workspace_bytes"),
    )


class Library:
    """The compiled kernels; or their emulation, which runs on CPU tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for name in ("reason", "run", "archs"):
            getattr(library, f"shift_cuda_{name}").restype = ctypes.c_char_p
        library.shift_cuda_plan.argtypes = [ctypes.POINTER(Call), ctypes.c_int, ctypes.POINTER(Plan)]
        library.shift_cuda_run.argtypes = [
            ctypes.POINTER(Call),
            ctypes.POINTER(Plan),
            ctypes.c_int,
            ctypes.c_void_p,
        ]
        self.archs: tuple[str, ...] = tuple(library.shift_cuda_archs().decode().split())
        """What it is compiled for, as nvcc names it; nothing for the emulation."""
        self.driver_is_too_old = bool(library.shift_cuda_driver_is_too_old())

    def runs_on(self, major: int, minor: int) -> bool:
        """Whether there is code for a device of this compute capability."""
        own = 10 * major + minor
        return any(
            int(arch[3:-1]) == own if arch[-1].isalpha() else int(arch[3:]) <= own for arch in self.archs
        )

    def plan(self, call: Call, *, backward: bool) -> Plan:
        """What the planner decides for the sizes and options of a call."""
        plan = Plan()
        self._library.shift_cuda_plan(ctypes.byref(call), int(backward), ctypes.byref(plan))
        return plan

    def reason(self, plan: Plan) -> str | None:
        """Why the planner refuses, or None."""
        return self._library.shift_cuda_reason(plan.refusal).decode() if plan.refusal else None

    def run(self, call: Call, plan: Plan, *, backward: bool, stream: int) -> None:
        """Launch a forward or backward call as planned; the tensors must outlive it on the stream.

        Raises:
            RuntimeError: the launch failed.
        """
        error = self._library.shift_cuda_run(ctypes.byref(call), ctypes.byref(plan), int(backward), stream)
        if error is not None:
            raise RuntimeError(f"shift_kernels: the cuda backend's launch failed: {error.decode()}")


@lru_cache
def load(path: Path | None = None) -> tuple[Library | None, str]:
    """The library, or None; and what it was built by, or why there is none.

    Args:
        path: another file than the installed one: an emulation, for tests.
    """
    library, status = open_library("cuda", "shift_cuda", Call, "nvcc (or no device)", path)
    return (None if library is None else Library(library)), status
