"""Language models at the field's smallest setting, d6: what each way to train needs for the same loss.

    shift-data TEXT... --tokenizer gpt2.json --out SHARDS
    while python -m benchmarks.gpu.lm --data SHARDS --out runs/lm-d6; [ $? = 75 ]; do :; done

``benchmarks.lm`` on one device: its suites, a rate tuned for every arm, its multipliers and report. Each call
trains for ``--seconds`` at most and leaves a checkpoint; it ends with code 75 while there is work left, and
with 0 when the report is written. A finished run's checkpoint is deleted: at d6 it is more than a gigabyte.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.fan import train as train_for_a_while
from benchmarks.gpu.work import SKIPPED, UNFINISHED, Case, Finding, Group, lacking, rehearsing, work_folder
from benchmarks.lm import run as lm
from benchmarks.lm.suite import Suite, load_suite
from benchmarks.lm.text import make_shards
from shift.config import TrainConfig
from shift.run.directory import CHECKPOINTS
from shift.tasks.shards import INDEX
from shift_kernels.console import INTERRUPTED, command

D6 = Path(__file__).with_name("d6.toml")
SECONDS = 500.0
CASE_S = 240.0
"""Of the stage's training in one call of the GPU script; it goes on in the next."""
MARGIN_S = 120.0
"""Beside that, for a start, an evaluation and a checkpoint."""
TOKENS = "tokens"
"""Folder of shards in the work folder, that the stage reads."""


class TimeIsUp(Exception):
    """There is work left for the next call."""


def study(suite: Suite, data: Path, out: Path, seconds: float, command: str) -> Path:
    """Train what is left, run by run; returns the report.

    Raises:
        TimeIsUp: after so many seconds; a checkpoint was saved.
    """
    deadline = time.monotonic() + seconds

    def train(runs: Mapping[Path, TrainConfig]) -> None:
        for path, config in runs.items():
            print(path, flush=True)
            if not train_for_a_while(config, path, deadline):
                raise TimeIsUp
            shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)

    return lm.run(suite, data, out, train, command)


@command("lm")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="?", default=str(D6), help="a name of benchmarks.lm or a TOML file")
    parser.add_argument("--data", type=Path, required=True, help="a folder of token shards")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    args = parser.parse_args(argv)
    command_line = f"python -m benchmarks.gpu.lm {shlex.join(argv)}"
    try:
        print(study(load_suite(args.suite), args.data, args.out, args.seconds, command_line))
    except TimeIsUp:
        return INTERRUPTED
    return 0


# The stage of the GPU script.


def groups() -> list[Group]:
    """One case, which takes many calls."""
    return [Group([[Case("lm", "d6", CASE_S + MARGIN_S)]])]


def run(case: Case) -> Finding:
    """Train what is left, for a while."""
    suite, data, out = load_suite(str(D6)), work_folder() / TOKENS, work_folder() / case.stage
    if rehearsing():
        suite = in_miniature(suite)
        make_shards(data, suite.text, jobs=1)
    if not (data / INDEX).is_file():
        return Finding(
            SKIPPED, f"no token shards in {data}: make them with shift-data, then call with --again"
        )
    try:
        report = study(suite, data, out, CASE_S, "benchmarks/gpu/run.sh report lm")
    except TimeIsUp:
        return Finding(UNFINISHED, "goes on in the next call")
    except ModuleNotFoundError as missing:
        return lacking(missing)
    return Finding(data={"report": str(report.relative_to(work_folder()))})


def in_miniature(suite: Suite) -> Suite:
    """The suite with all of its parts, and runs of a step or two."""
    config: dict[str, Any] = {
        **suite.config,
        "batch_size": 2,
        "micro_batch": 1,
        "eval_samples": 2,
        "task": {"name": "tokens", "options": {"seq_len": 8}},
        "model": {**suite.config["model"], "d_model": 16, "n_heads": 2, "d_ff": 16},
        "optimiser": {**suite.config["optimiser"], "rewarm": 1},
    }
    return dataclasses.replace(
        suite,
        arms=("looped:2", "grow"),
        budgets=(4e6, 8e6, 12e6),
        rates=(0.5, 1.0, 2.0),
        text={"megabytes": 2.0, "tokenizer": "bytes"},
        config=config,
    )


if __name__ == "__main__":
    sys.exit(main())
