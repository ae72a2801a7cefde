"""Calls into csrc/cpu."""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

from shift_kernels.native import FLOAT, INT, POINTER, fields, open_library

ISAS = ("portable", "avx2", "avx512", "avx512bf16")
"""Instruction sets that are in the library; the best that the processor has is used."""


class Call(ctypes.Structure):
    """``struct Call`` of csrc/cpu/call.h, field by field."""

    _fields_ = fields(
        (INT, "batch seq_len d_model n_heads n_kv_heads head_dim n_layers d_ff"),
        (INT, "most_loops n_slices n_threads"),
        (INT, "activation norm placement causal rope injection loop_norm"),
        (INT, "return_all n_grad_loops halting bf16"),
        (FLOAT, "eps residual_scale halt_threshold"),
        (POINTER, "e loops lengths rotary weights out boundaries kept used"),
        (POINTER, "grad_out grad_e grad_weights"),
    )


@lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None; and what it is and uses, or why there is none."""
    chosen = os.environ.get("SHIFT_KERNELS_CPU_LIBRARY")  # for builds with sanitizers
    library, status = open_library("cpu", "shift", Call, "C++ compiler", Path(chosen) if chosen else None)
    if library is None:
        return None, status
    library.shift_run.argtypes = [ctypes.POINTER(Call), ctypes.c_int, ctypes.c_int, INT]
    return library, f"using {ISAS[library.shift_best_isa()]}; {status}"


def run(call: Call, *, backward: bool, rows_per_tile: int, isa: str | None = None) -> None:
    """Run a forward or backward call.

    Args:
        call: all fields set; the tensors must outlive the call.
        backward: which of the two.
        rows_per_tile: tokens that a thread takes through all loops together.
        isa: one of :data:`ISAS` that the processor has; default the best.

    Raises:
        MemoryError: no room for the workspace.
    """
    library, _ = load()
    assert library is not None, "checked by the backend"
    chosen = library.shift_best_isa() if isa is None else ISAS.index(isa)
    if library.shift_run(ctypes.byref(call), int(backward), chosen, rows_per_tile):
        raise MemoryError("shift_kernels: no memory for the looped block's workspace")
