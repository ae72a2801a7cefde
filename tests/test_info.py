"""shift-info names what a bug report needs."""

import subprocess
import sys

import torch

from shift_kernels import backends
from shift_kernels.info import report


def test_report_names_versions_and_every_backend():
    text = report()
    assert torch.__version__ in text
    for name, status in backends().items():
        assert any(name in line and status in line for line in text.splitlines())


def test_it_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "shift.info"], capture_output=True, text=True, check=True)
    assert "shift_kernels" in run.stdout
