"""The tests with marker ``gpu``, shared out among eight processes, which compile the kernels side by side.

A row a test, or one for a file of them that cannot be imported here. After a failure the rest of a share goes
on in a fresh process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.gpu.isolate import Report
from benchmarks.gpu.work import FAILED, OK, SKIPPED, Case, Finding, Group, rehearsing

ROOT = Path(__file__).parents[2]
LIMIT_S = 180.0
WORKERS = 8
OPTIONS = ("-m", "gpu", "-p", "no:cacheprovider")
REHEARSED = (
    "attention_is_right[small-causal-whole-torch.bf",
    "block_is_right[small-whole-torch.bfloat16-cuda",
)
"""Parts of the names of the tests that a rehearsal runs."""


def groups() -> list[Group]:
    """The tests, dealt out one by one."""
    found, broken = tests()
    cases = [Case("contract", name, LIMIT_S) for name in found]
    cases += [Case("contract", file, LIMIT_S, dict(error=error)) for file, error in broken.items()]
    n = 2 if rehearsing() else WORKERS
    return [Group([share for i in range(n) if (share := cases[i::n])], workers=n)]


def tests() -> tuple[list[str], dict[str, str]]:
    """Ids of the tests; files that cannot be imported here, with the error."""
    files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "--collect-only", *OPTIONS, *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    listed, *sections = re.split(r"^_+ ERROR collecting (.+?) _+$", done.stdout, flags=re.MULTILINE)
    found = [line for line in listed.splitlines() if "::" in line]
    broken = {file: _error(words) for file, words in zip(sections[::2], sections[1::2], strict=True)}
    if rehearsing():
        found = [name for name in found if any(part in name for part in REHEARSED)]
    if not found and not broken:
        raise RuntimeError(
            f"pytest found no test with marker gpu:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return found, broken


def _error(traceback: str) -> str:
    """The line of pytest's traceback that names the error."""
    found = re.findall(r"^E +([\w.]+(?:Error|Exception).*)", traceback, re.MULTILINE)
    return found[-1] if found else "it cannot be imported"


def run_batch(cases: Sequence[Case], report: Report) -> None:
    """Run the tests; leaves the process after the first that fails."""
    for case in cases:
        if error := case.arguments.get("error"):
            outcome = SKIPPED if error.startswith("ModuleNotFoundError") else FAILED
            report.begin(case)
            report.end(case, Finding(outcome, error[:160]))
    by_name = {case.name: case for case in cases if "error" not in case.arguments}
    if not by_name:
        return
    pytest.main([*OPTIONS, *by_name], plugins=[_Reporter(by_name, report)])
    for case in by_name.values():  # still there: pytest did not get to it
        report.begin(case)
        report.end(case, Finding(FAILED, "pytest did not run it"))


class _Reporter:
    """Tells of every test; what it has told of leaves ``left``."""

    def __init__(self, left: dict[str, Case], report: Report) -> None:
        self.left, self.report = left, report
        self.finding = Finding()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.finding = Finding(OK)
        self.report.begin(self.left[nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            words = str(crash.message if crash is not None else report.longrepr).splitlines()
            self.finding = Finding(FAILED, (words or [""])[0][:160])
            print(report.longreprtext, flush=True)  # pytest prints it at its end, which a crash may forestall
        elif report.skipped and self.finding.outcome == OK:
            self.finding = Finding(SKIPPED, _reason(report)[:160])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.report.end(self.left.pop(nodeid), self.finding)
        if self.finding.outcome == FAILED:
            sys.stdout.flush()
            os._exit(1)  # a sticky CUDA error would fail all that follow


def _reason(report: pytest.TestReport) -> str:
    """Why a test was skipped: the last of file, line and words."""
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
