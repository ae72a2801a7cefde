"""Compile the libraries in place, for this device alone, before anything is tried."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.results import ROOT, sources_hash
from benchmarks.gpu.work import FAILED, OK, Case, Finding, Group, rehearsing, work_folder

CASE = Case("build", "build", 300.0)


def groups() -> list[Group]:
    """One case."""
    return [Group([[CASE]])]


def stands() -> bool:
    """Whether it was built on this machine; a row may come from another one."""
    return _mark().exists()


def _mark() -> Path:
    return work_folder() / f"built-{sources_hash()}"


def run(case: Case) -> Finding:
    """Build; fine if the cuda backend then serves this device."""
    done = subprocess.run(_command(), cwd=ROOT, env=os.environ | _archs(), stderr=subprocess.STDOUT)
    # A fresh process: this one has looked for the library before it was there.
    ask = "from shift_kernels import backends, info; print(info.report()); print(backends()['cuda'])"
    status = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    print(status.stdout + status.stderr)
    words = (status.stdout.strip().splitlines() or ["the package cannot be imported"])[-1]
    _mark().touch()
    if done.returncode or not (words == "available" or rehearsing()):
        return Finding(FAILED, f"exit code {done.returncode}; backend cuda: {words}")
    return Finding(OK, "", dict(cuda=words))


def _command() -> list[str]:
    setup = [sys.executable, "setup.py"]
    return [*setup, "--version"] if rehearsing() else [*setup, "build_ext", "--inplace"]


def _archs() -> dict[str, str]:
    if rehearsing():
        return {}
    import torch

    major, minor = torch.cuda.get_device_capability()
    return {"CUDA_ARCHS": "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"}
