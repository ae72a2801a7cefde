"""The compiled modules ``_native`` (csrc/cpu) and ``_native_cuda`` (csrc/cuda), or why there is none.

They take addresses and sizes, never tensors: a module knows no torch version. What a block is, they and
Python say in the words of csrc/block.h.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from shift_kernels.spec import ONE_OVER_T, BlockSpec

PATHS = {"_native": "SHIFT_KERNELS_CPU_LIBRARY"}
"""Environment variables that name another file than the installed one: a build with sanitizers."""


@lru_cache
def load(name: str, path: Path | None = None) -> tuple[ModuleType | None, str]:
    """The module, or None; and what it was built by, or why there is none.

    Args:
        name: ``_native`` or ``_native_cuda``.
        path: another file than the installed one.
    """
    chosen = path or os.environ.get(PATHS.get(name, ""))
    # By another name it is another module, beside the installed one.
    full_name = f"{path}.{name}" if path else f"shift_kernels.{name}"
    if chosen:
        found = importlib.util.spec_from_file_location(full_name, chosen)
    else:
        found = importlib.util.find_spec(full_name)
    if found is None or found.loader is None:
        return None, f"not built: {_first_error(reason(name))}"
    try:
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    except ImportError as error:
        return None, f"built, but cannot be loaded: {error}"
    if not path:
        sys.modules[full_name] = module  # the same for whoever imports it by name
    return module, f"built by {module.build_info()}"


def reason(name: str) -> str:
    """What the compiler said where a module was not built when shift-kernels was installed, or nothing."""
    file = Path(__file__).with_name(f"{name}.reason.txt")
    return file.read_text(errors="replace").strip() if file.exists() else ""


def _first_error(words: str) -> str:
    """The line of a compiler's that says most."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() and not line.startswith("FAILED")]
    return next(iter(errors + lines), "shift-kernels was not installed by pip, or for another Python")


@lru_cache(maxsize=256)
def block(module: ModuleType, spec: BlockSpec) -> Any:
    """``Block`` of csrc/block.h."""
    fields = {name: getattr(spec, name) or 0 for name in module.Block.FIELDS}
    if spec.residual_scale == ONE_OVER_T:  # a call says what it is
        fields["residual_scale"] = 1.0
    return module.Block(**fields)


def addresses(module: ModuleType, tensors: dict[str, Tensor], spec: BlockSpec) -> list[int | None]:
    """Where the weights are, in the order of ``Weight`` in csrc/block.h; None for one that is absent."""
    return [tensors[n].data_ptr() if n in tensors else None for n in weight_names(module, spec.n_layers)]


@lru_cache(maxsize=256)
def weight_names(module: ModuleType, n_layers: int) -> tuple[str, ...]:
    """Names of all weights of a block, in the order of ``Weight`` in csrc/block.h."""
    layers = [f"layers.{i}.{name}" for i in range(n_layers) for name in module.LAYER_WEIGHTS]
    return (*layers, *module.LOOP_WEIGHTS)
