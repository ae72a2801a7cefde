"""Says, before anything else is imported, which packages of the extra ``train`` are missing."""

from __future__ import annotations

from importlib.util import find_spec

NEEDED = ("safetensors", "tomli_w", "tqdm", "tyro")


def check() -> None:
    """Raise a ModuleNotFoundError that names what is missing and the remedy."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        words = f"shift needs {', '.join(missing)}, which its extra 'train' installs: "
        raise ModuleNotFoundError(words + "pip install 'shift-kernels[train]'", name=missing[0])


check()
