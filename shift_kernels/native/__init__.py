"""Loads the compiled CPU library, which speaks plain C: it knows nothing of torch's version or ABI.

The library is built by setup.py where there is a C++ compiler.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

LIBRARY = Path(os.environ.get("SHIFT_KERNELS_CPU_LIBRARY", Path(__file__).parent / "libshift_cpu.so"))
"""The environment variable is for builds with sanitizers."""
ISAS = ("portable", "avx2", "avx512", "avx512bf16")
"""Instruction sets that are in the library; the best that the processor has is used."""

_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class Call(ctypes.Structure):
    """``struct Call`` of csrc/cpu/call.h, field by field."""

    _fields_ = [
        (name, kind)
        for kind, names in (
            (_INT, "batch seq_len d_model n_heads n_kv_heads head_dim n_layers d_ff"),
            (_INT, "most_loops n_slices n_threads"),
            (_INT, "activation norm placement causal rope injection loop_norm"),
            (_INT, "return_all n_grad_loops halting bf16"),
            (_FLOAT, "eps residual_scale halt_threshold"),
            (_POINTER, "e loops lengths rotary weights out boundaries kept used"),
            (_POINTER, "grad_out grad_e grad_weights"),
        )
        for name in names.split()
    ]


@lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None; and what it is and uses, or why there is none."""
    if not LIBRARY.exists():
        return (
            None,
            "not built: there was no C++ compiler, or its build failed, when shift-kernels was installed",
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"built, but cannot be loaded: {error}"
    library.shift_call_size.restype = _INT
    if library.shift_call_size() != ctypes.sizeof(Call):
        return None, "built from other sources than these: install shift-kernels again"
    library.shift_run.argtypes = [ctypes.POINTER(Call), ctypes.c_int, ctypes.c_int, _INT]
    library.shift_build_info.restype = ctypes.c_char_p
    built = library.shift_build_info().decode()
    return library, f"using {ISAS[library.shift_best_isa()]}; built by {built}"


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
