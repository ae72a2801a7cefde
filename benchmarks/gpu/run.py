"""The whole GPU run inside a budget of time: build, tests, sanitizer, cases, table. See run.sh."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import build_native
from benchmarks.gpu import table
from benchmarks.gpu.cases import CASES

SANITIZERS = {"memcheck": "sanitize", "racecheck": "sanitize and cuda", "synccheck": "sanitize and cuda"}
SLOPES = ("block-b512-n64-d128-h4-T12", "trm-b256-n97-d512-h8-T6")
BUDGET_S = 520  # of the nine minutes, the rest is for starting and for the table


@dataclasses.dataclass
class Budget:
    """Seconds until the run must be over."""

    total: float
    start: float = dataclasses.field(default_factory=time.monotonic)

    def left(self) -> float:
        return max(0.0, self.total - (time.monotonic() - self.start))

    def share(self, parts: int, at_most: float) -> float:
        """What one of ``parts`` equal pieces of the rest may take."""
        return min(self.left() / max(parts, 1), at_most)


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step of the run came to: ``ok``, ``failed``, ``skipped`` or ``timeout``, and why."""

    name: str
    outcome: str
    why: str
    seconds: float


def run(name: str, command: list[str], limit: float, out: Path) -> Step:
    """Run a command for at most ``limit`` seconds; its stdout goes to ``out``, its stderr next to it."""
    if limit < 5:
        return Step(name, "skipped", "the budget of time is spent", 0.0)
    start = time.monotonic()
    with out.open("w") as stdout, out.with_suffix(".log").open("w") as stderr:
        # A session of its own, so that a timeout ends what the command started, too.
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Step(name, "timeout", f"over {limit:.0f} s", time.monotonic() - start)
    seconds = time.monotonic() - start
    return Step(name, "ok" if code == 0 else "failed", f"exit code {code}" if code else "", seconds)


def gpu() -> str | None:
    """Name of the GPU, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def build(budget: Budget, out: Path) -> Step:
    """The compiled backends, CUDA for this device alone, where there is a compiler."""
    import torch

    if build_native.nvcc() is None:
        return Step("build", "skipped", "no nvcc on PATH", 0.0)
    arch = "sm_90a" if torch.cuda.get_device_capability() == (9, 0) else "sm_80"
    command = ["env", f"CUDA_ARCHS={arch}", sys.executable, "setup.py", "build_ext", "--inplace"]
    return run("build", command, budget.share(1, 150), out / "build.txt")


def sanitize(budget: Budget, out: Path) -> list[Step]:
    """compute-sanitizer over few tests: every kernel's accesses, races and barriers of the CUDA kernels."""
    if shutil.which("compute-sanitizer") is None:
        return [Step("sanitizer", "skipped", "no compute-sanitizer on PATH", 0.0)]
    steps = []
    for i, (tool, tests) in enumerate(SANITIZERS.items()):
        pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *pytest, "-k", tests]
        limit = budget.share(len(SANITIZERS) - i, 45)
        steps.append(run(tool, command, limit, out / f"{tool}.txt"))
    return steps


def main() -> int:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    device = gpu()
    if device is None:
        print("No CUDA device: nothing is built, tested or timed. The table, with no rows:")
        print(table.markdown([]))
        print("Cases: " + ", ".join(CASES))
        return 0
    budget = Budget(BUDGET_S)
    for old in out.glob("*.jsonl"):
        old.unlink()  # a table must not mix two runs
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider", "-rs"]
    steps = [build(budget, out)]
    steps.append(run("tests", pytest, budget.share(1, 150), out / "tests.txt"))
    steps += sanitize(budget, out)
    for i, name in enumerate(CASES):
        command = [sys.executable, "-m", "benchmarks.gpu.bench", name]
        limit = budget.share(len(CASES) + 1 - i, 90)
        steps.append(run(name, command, limit, out / f"{name}.jsonl"))
        print(f"{name}: {steps[-1].outcome} {steps[-1].why}", flush=True)
    slope = [sys.executable, "-m", "benchmarks.gpu.slope", *SLOPES]
    steps.append(run("slope", slope, budget.share(1, 60), out / "slope.txt"))
    measurements = table.read(out)
    text = table.markdown(measurements)
    (out / "table.md").write_text(f"{device}\n\n{text}\n")
    summary = dict(device=device, steps=[dataclasses.asdict(s) for s in steps], measurements=measurements)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    print(text)
    for step in steps:
        print(f"{step.name}: {step.outcome} {step.why} ({step.seconds:.0f} s)")
    return int(any(step.outcome in ("failed", "timeout") for step in steps))


if __name__ == "__main__":
    sys.exit(main())
