"""Compile the libraries in place, for this device alone, before anything is tried."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
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
    if not rehearsing():  # which compiles the kernels for the CPU instead, as the tests do
        _build()
    # A fresh process: this one has looked for the library before it was there.
    ask = "from shift_kernels import backends, info; print(info.report()); print(backends()['cuda'])"
    status = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    print(status.stdout + status.stderr)
    words = (status.stdout.strip().splitlines() or ["the package cannot be imported"])[-1]
    _mark().touch()
    if words != "available" and not rehearsing():
        return Finding(FAILED, f"backend cuda: {words}"[:160])
    return Finding(OK, "", dict(cuda=words))


def _build() -> None:
    """Both libraries, side by side. Without setup.py: an old setuptools does not read pyproject.toml."""
    import build_native

    os.environ["CUDA_ARCHS"] = _arch()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    targets = [ROOT / "shift_kernels" / f"{name}{suffix}" for name in build_native.LIBRARIES]
    with ThreadPoolExecutor() as pool:
        for reason in pool.map(build_native.build, build_native.LIBRARIES, targets):
            print(reason or "built")


def _arch() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"
