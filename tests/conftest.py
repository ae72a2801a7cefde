"""Whether Triton interprets is decided when it is imported, which many things do: before all, then."""

import importlib.util

if importlib.util.find_spec("triton") is not None:
    import triton_interpreter  # noqa: F401
