"""Whether Triton interprets is decided when it is imported, which many things do: before all, then."""

import importlib.util

if importlib.util.find_spec("triton") is not None:
    import triton_interpreter  # noqa: F401

import pytest
from cuda_emulation import emulated


@pytest.fixture(params=[False, True], ids=["plain", "watched"])
def gpu(request):
    """An emulated GPU with the KERNELS of the test's module."""
    library = emulated(request.module.KERNELS, watched=request.param)
    yield library
    library.free()


@pytest.fixture
def watched(request):
    """The same, every access of which is watched."""
    library = emulated(request.module.KERNELS, watched=True)
    yield library
    library.free()
