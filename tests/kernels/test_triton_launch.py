"""Triton's compiled path as far as the driver, without a GPU: its C launcher gets our arguments."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None or not hasattr(
    pytest.importorskip("triton.backends.nvidia.driver", reason="needs Triton for NVIDIA"), "CudaLauncher"
):
    pytest.skip("needs Triton's launcher for CUDA", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a GPU: tests/gpu launches on it", allow_module_level=True)

COMPILER = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
ROOT = Path(__file__).parents[2]

# As much of the driver as the launcher calls; every launch is a line.
LIBCUDA = r"""
#include <stdint.h>
#include <stdio.h>
typedef struct { unsigned grid[3], block[3], shared; } Launch;  // how CUlaunchConfig begins
int cuLaunchKernelEx(const Launch *l, void *kernel, void **arguments, void **extra) {
    printf("launch %u %u %u %u %u\n", l->grid[0], l->grid[1], l->grid[2], l->block[0], l->shared);
    return fflush(stdout);
}
int cuPointerGetAttribute(uint64_t *found, int attribute, uint64_t pointer) { *found = pointer; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuFuncSetAttribute(void *kernel, int attribute, int value) { return 0; }
int cuGetErrorString(int error, const char **words) { *words = "no driver"; return 0; }
"""

CALLS = {
    "resident": "cases.block(16, 32, bf16, d_ff=32, ragged=True, own_loops=True, grad={grad})",
    "attention": "cases.attention(16, bf16, ragged=True)",
    "streamed": "cases.layer(64, bf16)",
}

CHILD = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from unittest import mock
from benchmarks.offline import cases
from shift_kernels.backends.triton import backend

class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": cases.SHARED_LIMIT[90], "warpSize": 32}
    def load_binary(self, name, kernel, shared, device):
        return 1, 2, 100, 0, 1024  # module, function, registers, spills, threads at most

class Driver:
    launcher_cls, utils = CudaLauncher, Utils()
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

triton.runtime.driver.set_active(Driver())
bf16 = torch.bfloat16
with mock.patch.object(backend, "_chip", return_value=cases.chip(90)), torch.no_grad():
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of a process whose libcuda is ours, and whose Triton compiles."""
    if COMPILER is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    command = [COMPILER, "-shared", "-fPIC", "-xc", "-", "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, input=LIBCUDA, text=True, check=True)
    found = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_LIBCUDA_PATH": str(folder)}
    found["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(folder), found.get("LD_LIBRARY_PATH")]))
    found.pop("TRITON_INTERPRET", None)
    return found


@pytest.mark.parametrize(
    "calls",
    [
        [CALLS["resident"].format(grad=grad) for grad in (False, True)],
        [CALLS["attention"]],
        [CALLS["streamed"]],
    ],
    ids=CALLS,
)
def test_every_launch_reaches_the_driver_within_its_limits(calls, environment):
    code = CHILD + "".join(f"    {call}\n" for call in calls)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    launches = [[int(n) for n in line.split()] for line in re.findall(r"^launch (.*)$", done.stdout, re.M)]
    assert len(launches) > 2
    for *grid, threads, shared in launches:
        assert all(0 < n < 2**16 for n in grid)
        assert threads in (32, 64, 128, 256)
        assert shared <= 232_448
