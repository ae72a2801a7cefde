"""A batch of cases in a process of its own: a crash, a hang or a sticky CUDA error costs one case.

    parent   writes the cases to a file, starts ``python -m benchmarks.gpu.isolate CASES ROWS``, reads ROWS
             while it grows, ends the process when a case is over its limit, and starts another for the rest
    child    appends a line to ROWS when a case begins and when it ends; after a failure it exits, since what
             shares its CUDA context can no longer be trusted

Whatever else the child prints goes to its log. Rows go by a file, which passes through any wrapper
(compute-sanitizer) and outlives any death.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from benchmarks.gpu.work import CRASHED, FAILED, FAULTS, TIMEOUT, Batch, Case, Finding, a_line, rehearsing

START_S = 90.0
"""Seconds that a process may take to import and to reach its device, beside the limit of its first case."""
POLL_S = 0.05
ROOT = Path(__file__).parents[2]

Sink = Callable[[Case, Finding, float], object]
"""Takes a case, what it came to and the seconds that took."""


class Report(Protocol):
    """How a stage's ``run_batch`` tells of its cases, in their order."""

    def begin(self, case: Case) -> None:
        """The case begins; from now on its limit counts."""

    def end(self, case: Case, finding: Finding) -> None:
        """The case came to this."""


@dataclasses.dataclass
class Clock:
    """When all must be over, in ``time.monotonic()``; whoever wants the end sooner sets it."""

    end: float

    def left(self) -> float:
        """Seconds, none once it is over."""
        return max(0.0, self.end - time.monotonic())


def run(
    batch: Batch, module: str, sink: Sink, folder: Path, clock: Clock, wrapper: tuple[str, ...] = ()
) -> None:
    """Run all cases of a batch, in as many processes as their failures make necessary.

    Args:
        batch: cases.
        module: of their stage, with ``run(case)`` or ``run_batch(cases, report)``.
        sink: called once for each case, but for those that the clock left undone.
        folder: for the processes' files; the logs stay there.
        clock: when to stop.
        wrapper: see :class:`benchmarks.gpu.work.Group`.
    """
    left = list(batch)
    while left and clock.left():
        known = {case.name for case in left}

        def record(case: Case, finding: Finding, seconds: float, known: set[str] = known) -> None:
            known.discard(case.name)
            sink(case, finding, seconds)

        _Child(left, module, folder, wrapper).watch(record, clock)
        rest = [case for case in left if case.name in known]
        if len(rest) == len(left):
            return  # only the clock ends a process without a row
        left = rest


class Process(Protocol):
    """What is asked of a child process; :class:`subprocess.Popen` has it."""

    pid: int

    @property
    def returncode(self) -> Any:
        """None while it runs."""

    def poll(self) -> int | None:
        """The same."""

    def wait(self) -> int | None:
        """The same, when it has ended."""


class _Child:
    """The parent's end of a process."""

    def __init__(self, cases: list[Case], module: str, folder: Path, wrapper: tuple[str, ...]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{cases[0].stage}-{cases[0].name}".replace("/", "_").replace(" ", "_")[:120]
        self.cases = {case.name: case for case in cases}
        self.rows, self.log, request = (folder / f"{stem}.{kind}" for kind in ("rows", "log", "cases"))
        self.rows.unlink(missing_ok=True)
        request.write_text(json.dumps([module, [dataclasses.asdict(case) for case in cases]]))
        files = [str(request), str(self.rows)]
        self.wrapped = bool(wrapper)
        self.read_to = 0
        self.process: Process
        if rehearsing() and not wrapper:
            self.process = importlib.import_module("benchmarks.gpu.rehearsal").Forked(main, files, self.log)
            return
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, "-m", "benchmarks.gpu.isolate", *files],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
                start_new_session=True,  # ended with all that it started
            )

    def watch(self, sink: Sink, clock: Clock) -> None:
        """Pass rows on until the process is over, then say how it ended if that was not well."""
        current, began = next(iter(self.cases.values())), time.monotonic()
        limit = began + START_S + current.limit_s
        held: list[tuple[Case, Finding, float]] = []
        underway = True
        ended = False
        try:
            while not ended:
                ended = self.process.poll() is not None  # before reading: what it wrote last is not missed
                for line in self._new_lines():
                    case, now = self.cases[line["name"]], time.monotonic()
                    if line["what"] == "begin":
                        current, began, underway, limit = case, now, True, now + case.limit_s
                        continue
                    finding = Finding(line["outcome"], line["why"], line["data"])
                    held.append((case, finding, now - began))
                    underway, limit = False, now + START_S
                    if not self.wrapped:
                        sink(*held.pop())
                if ended:
                    break
                if not clock.left():
                    return  # the case under way is as good as not begun
                if time.monotonic() > limit:
                    if underway or held:  # else it only took too long to exit
                        sink(current, Finding(TIMEOUT, f"over {current.limit_s:.0f} s"), current.limit_s)
                    return
                time.sleep(POLL_S)
            self._close(sink, current if underway else None, held, time.monotonic() - began)
        finally:
            self.kill()

    def _new_lines(self) -> list[dict[str, Any]]:
        if not self.rows.exists():
            return []
        text = self.rows.read_text()[self.read_to :]
        whole = text[: text.rfind("\n") + 1]  # the last line may still be being written
        self.read_to += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _close(self, sink: Sink, underway: Case | None, held: list, seconds: float) -> None:
        code = self.process.returncode
        for case, finding, took in held:  # of a wrapped process, whose exit code is part of the answer
            if code and finding.outcome not in FAULTS:
                finding = Finding(FAILED, f"exit code {code}: {self._last_words()}", finding.data)
            sink(case, finding, took)
        if underway is not None:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            sink(underway, Finding(CRASHED, f"{how}: {self._last_words()}"), seconds)

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        summaries = [line for line in lines if "ERROR SUMMARY" in line]
        return (summaries or lines or ["without a word"])[-1][:160]

    def kill(self) -> None:
        """End the process and all that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()


class _Lines:
    """The child's end: a line a beginning and a line an end, on the disk at once."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")

    def begin(self, case: Case) -> None:
        self._write(what="begin", name=case.name)

    def end(self, case: Case, finding: Finding) -> None:
        self._write(what="end", name=case.name, **dataclasses.asdict(finding))

    def _write(self, **line: Any) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def main(request: str, rows: str) -> int:
    """The child."""
    name, cases = json.loads(Path(request).read_text())
    if rehearsing():
        importlib.import_module("benchmarks.gpu.rehearsal").install()
    module = importlib.import_module(name)
    batch, report = [Case(**case) for case in cases], _Lines(Path(rows))
    if hasattr(module, "run_batch"):
        module.run_batch(batch, report)
        return 0
    for case in batch:
        report.begin(case)
        try:
            finding = module.run(case)
        except Exception as error:  # whatever it is, it is this case's answer
            report.end(case, Finding(FAILED, a_line(error)))
            raise  # for the log; what comes next gets a fresh process
        report.end(case, finding)
        if finding.outcome in FAULTS:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
