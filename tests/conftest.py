"""Whether Triton interprets is decided when it is imported, which many things do: before all, then."""

import gc
import importlib.util
import os

# Inductor tries each instruction set of the CPU by compiling for it, once in every new cache folder.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"

if importlib.util.find_spec("triton") is not None:
    import triton_interpreter  # noqa: F401

import pytest
from cuda_emulation import emulated

# Imports and collection make millions of objects that stay: to look through them for garbage again and again
# takes two fifths of their time, and a part of every test's.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


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
