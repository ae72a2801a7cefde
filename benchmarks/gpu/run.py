"""The GPU run: the stages asked for, as far as the time reaches, and a report at the end. See README.md."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu import build, isolate
from benchmarks.gpu.results import ARCHIVE, ROOT, Results, unpack
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.work import FAILED, WORK, Case, Finding, Group, a_line, lacking, rehearsing

SECONDS = 460.0
WORK_LEFT, FAULTY = 75, 1
"""Exit codes: call again; all was tried, and something is wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    default = [name for name, stage in STAGES.items() if rehearsing() or not stage.by_name]
    parser = argparse.ArgumentParser(
        "benchmarks/gpu/run.sh",
        description="Build, verify, time, tune and train on this machine's GPU, and report. Call it until "
        "its exit code is not 75; then send OUT/results.tar.gz.",
        epilog="Stages: " + "; ".join(f"{name}: {stage.what}" for name, stage in STAGES.items()) + ".",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the report")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"default: {', '.join(default)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which it ends (%(default)g)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "gpu", help="what is kept between calls"
    )
    parser.add_argument("--resume", type=Path, metavar="ARCHIVE", help="go on from an earlier results.tar.gz")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="cases whose 'stage: name' it is found in"
    )
    parser.add_argument("--again", action="store_true", help="also what has a row already")
    parser.add_argument("--list", action="store_true", help="name the cases, run nothing")
    args = parser.parse_args(argv)
    for name in args.stages:
        if name not in STAGES:
            parser.error(f"no stage {name!r}: {', '.join(STAGES)}")
    started = time.monotonic()
    work = args.work.resolve()
    os.environ[WORK] = str(work)
    os.environ.setdefault("SHIFT_KERNELS_CACHE", str(work / "measured"))
    if args.resume is not None:
        unpack(args.resume, work)
    from benchmarks.gpu import (
        device,
    )  # torch takes seconds, which an error in the arguments need not wait for

    if not device.exists():
        print("No CUDA device: nothing is built, tested or timed. See benchmarks/gpu/README.md; stages:")
        print("\n".join(f"  {name}: {stage.what}" for name, stage in STAGES.items()))
        return 0
    results = Results(work, args.out, device.machine())
    clock = isolate.Clock(started + args.seconds)
    signal.signal(signal.SIGTERM, lambda *_: setattr(clock, "end", 0.0))
    signal.signal(signal.SIGINT, lambda *_: setattr(clock, "end", 0.0))
    if not build.stands():
        results.forget([build.CASE])
    left = 0
    try:
        for name in dict.fromkeys(["build", *(args.stages or default)]):
            left += run_stage(name, results, clock, args)
    finally:
        report = results.publish()
    faults = [row for row in results.faults if not args.stages or row["stage"] in args.stages]
    print(f"\n{report}")
    print(f"Written: {args.out / ARCHIVE}. " + (f"{left} cases left: call again." if left else "All done."))
    return 0 if args.list else WORK_LEFT if left else FAULTY if faults else 0


def run_stage(name: str, results: Results, clock: isolate.Clock, args: argparse.Namespace) -> int:
    """Run what a stage has left; returns the number of cases that are still left."""
    if not clock.left():
        print(f"{name}: not begun, the time is over", flush=True)
        return 1
    plan = Case(name, "plan", 0.0)
    try:
        module = importlib.import_module(STAGES[name].module)
        pattern = args.only if name != "build" else ""  # the others need it
        groups = [_chosen(group, pattern) for group in module.groups()]
    except ModuleNotFoundError as missing:
        results.add(plan, lacking(missing), 0.0)
        return 0
    except Exception as error:  # a stage that cannot even begin is a row; the others go on
        traceback.print_exc()
        results.add(plan, Finding(FAILED, a_line(error)), 0.0)
        return 0
    results.forget([plan])
    cases = [case for group in groups for batch in group.batches for case in batch]
    if args.list:
        print("\n".join(f"{case.stage}: {case.name}" for case in cases))
        return 0
    if args.again:
        results.forget(cases)
    for group in [_together(groups)] if rehearsing() else groups:
        run_group(group, STAGES[name].module, results, clock)
    if hasattr(module, "finish"):
        try:
            module.finish(results.of(name))
        except Exception as error:
            traceback.print_exc()
            results.add(Case(name, "finish", 0.0), Finding(FAILED, a_line(error)), 0.0)
    return sum(not results.knows(case) for case in cases)


def run_group(group: Group, module: str, results: Results, clock: isolate.Clock) -> None:
    """Run the batches of a group side by side."""
    batches = [left for batch in group.batches if (left := [c for c in batch if not results.knows(c)])]
    workers = min(group.workers, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        folder = results.work / "logs"
        jobs = [
            pool.submit(isolate.run, batch, module, results.add, folder, clock, group.wrapper)
            for batch in batches
        ]
        for job in jobs:
            job.result()


def _chosen(group: Group, pattern: str) -> Group:
    batches = [[c for c in batch if re.search(pattern, f"{c.stage}: {c.name}")] for batch in group.batches]
    return Group([batch for batch in batches if batch], group.workers, group.wrapper)


def _together(groups: Sequence[Group]) -> Group:
    """All cases in one process, since importing takes a rehearsal most of its time."""
    cases = [case for group in groups for batch in group.batches for case in batch]
    return Group([cases], 1, next((group.wrapper for group in groups), ()))


if __name__ == "__main__":
    sys.exit(main())
