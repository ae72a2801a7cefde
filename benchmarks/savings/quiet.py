"""Seconds of a suite's runs, as a quiet machine would take: measured steps times the steps that were run.

    python -m benchmarks.savings.run full --out runs/savings      # on any machine, busy or not
    python -m benchmarks.savings.quiet full --out runs/savings    # on a quiet one: about a minute a task

Every kind of step that an arm of the suite takes (its loops, and those that carry gradient) is timed, all
kinds in turn; a run's seconds are the sum over its steps.
Evaluations are left out: all arms have the same. Writes ``ms.json`` into ``--out``, and its reports anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.savings.suite import Case, load_suite
from shift.build import build_schedule
from shift.comparison.arms import make_arm, split
from shift.config import ScheduleConfig, TrainConfig
from shift.run.files import json_bytes, replace_atomically
from shift.run.trainer import Trainer
from shift.schedules import Decision

MS = "ms.json"
REPEATS = 21
"""Times that every kind of step is timed; the median counts."""

Rates = Mapping[str, Mapping[str, float]]
"""Variant of the model ("" is the plain one) -> kind of step (:func:`kind_of`) -> milliseconds."""


def kind_of(decision: Decision) -> str:
    """What decides how long a step takes, as a key."""
    n_grad_loops = decision.n_grad_loops
    return str(decision.n_loops) + ("" if n_grad_loops is None else f", gradient through {n_grad_loops}")


def decisions(config: TrainConfig, loops: list[list[int]], n_steps: int) -> Iterator[Decision]:
    """What each step of a run was, from its record.

    Args:
        config: of the run.
        loops: [first step, loops] of each stretch of its steps, the first one being step 1.
        n_steps: of the run.
    """
    schedule = build_schedule(config)
    ends = [first for first, _ in loops[1:]] + [n_steps + 1]
    recorded = [n_loops for (first, n_loops), end in zip(loops, ends, strict=True) for _ in range(first, end)]
    for step, n_loops in enumerate(recorded[:n_steps]):
        # Of a schedule with a criterion the record says what that saw.
        yield schedule.step(step, None) if schedule.scp is None else Decision(n_loops)


def measured(config: TrainConfig, kinds: Mapping[str, Decision]) -> dict[str, float]:
    """Milliseconds of a training step of each kind, all kinds in turn."""
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder) / "run")
        for _ in range(REPEATS + 1):
            for kind, decision in kinds.items():
                begin = time.perf_counter()
                trainer._train_step(decision)
                times[kind].append(1e3 * (time.perf_counter() - begin))
    return {kind: statistics.median(each[1:]) for kind, each in times.items()}


class RunSteps(NamedTuple):
    """What a run did: its variant and config, what is known of it, what each of its steps was."""

    variant: str
    config: TrainConfig
    facts: dict[str, Any]
    steps: list[Decision]


def runs_of(case: Case, r: Mapping[str, Any]) -> Iterator[RunSteps]:
    """All runs that took any steps."""
    for name, arm in r["arms"].items():
        config = make_arm(name, case.config, variants=case.variants).config
        for facts in arm["seeds"]:
            if facts["loops"]:
                own, n_steps = dataclasses.replace(config, seed=facts["seed"]), facts["curve"]["step"][-1]
                yield RunSteps(split(name)[2], own, facts, list(decisions(own, facts["loops"], n_steps)))


def rates_of(case: Case, r: Mapping[str, Any]) -> Rates:
    """The milliseconds of all kinds of steps of a task."""
    kinds: dict[str, dict[str, Decision]] = {}
    configs: dict[str, TrainConfig] = {}
    for run in runs_of(case, r):
        kinds.setdefault(run.variant, {}).update({kind_of(decision): decision for decision in run.steps})
        # The steps are taken one by one, whatever the schedule would have.
        configs.setdefault(
            run.variant, dataclasses.replace(run.config, schedule=ScheduleConfig("constant", {}))
        )
    return {variant: measured(configs[variant], own) for variant, own in kinds.items()}


def with_seconds(case: Case, r: Mapping[str, Any], rates: Rates) -> None:
    """Enter ``quiet_s``, of the whole run, and ``quiet_s_to_target`` into the facts of every run."""
    for variant, _, facts, steps in runs_of(case, r):
        spent = list(itertools.accumulate(rates[variant][kind_of(decision)] / 1e3 for decision in steps))
        at = facts["steps_to_target"]
        facts["quiet_s"] = spent[-1]
        facts["quiet_s_to_target"] = None if at is None else spent[at - 1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", help="as for benchmarks.savings.run")
    parser.add_argument("--out", type=Path, required=True, help="of benchmarks.savings.run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from benchmarks.savings.report import write_suite_report

    results, found = {}, {}
    for case in load_suite(args.suite).cases:
        path = args.out / case.name / "results.json"
        if not path.is_file():
            continue
        r = json.loads(path.read_text())
        found[case.name] = rates_of(case, r)
        with_seconds(case, r, found[case.name])
        results[case.name] = r | {"used_for": case.used_for}
        print(case.name, {v: dict(own) for v, own in found[case.name].items()}, flush=True)
    replace_atomically(args.out / MS, json_bytes(found))
    print(*write_suite_report(results, args.out), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
