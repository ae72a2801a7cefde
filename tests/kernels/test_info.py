"""shift-info names what a bug report needs."""

import subprocess
import sys

import pytest
import torch

from shift_kernels import backends, compiled
from shift_kernels.info import report

NATIVE, _ = compiled.load("_native")
CUDA, _ = compiled.load("_native_cuda")


def test_report_names_versions_and_every_backend():
    text = report()
    assert torch.__version__ in text
    for name, status in backends().items():
        assert any(name in line and status in line for line in text.splitlines())


@pytest.mark.skipif(NATIVE is None, reason="needs the CPU library")
def test_report_says_how_the_cpu_library_was_built_and_what_it_uses():
    (line,) = (line for line in report().splitlines() if line.startswith("cpu library"))
    assert any(f"using {isa}" in line for isa in NATIVE.ISAS)
    assert "g++" in line or "clang" in line


@pytest.mark.skipif(CUDA is None, reason="needs the CUDA library")
def test_report_says_for_what_the_cuda_library_was_built():
    (line,) = (line for line in report().splitlines() if line.startswith("cuda library"))
    assert all(arch in line for arch in ("nvcc", *CUDA.archs))


def test_it_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "shift.info"], capture_output=True, text=True, check=True)
    assert "shift_kernels" in run.stdout
