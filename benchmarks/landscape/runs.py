"""The study's runs: two tasks, three arms, some seeds; each trained with snapshots, then surveyed.

    python -m benchmarks.landscape.runs --work runs/landscape --seeds 0 1 2 3 4

Seeds take turns, so that an interrupted study is whole for the seeds it reached; what is done is kept.
About 30 s of one core a run, 15 minutes for all on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from shift.arms import make_arm
from shift.config import LandscapeConfig, TaskConfig, TrainConfig, load_config
from shift.files import replace_atomically
from shift.landscape.survey import SurveyConfig, survey
from shift.trainer import Trainer

ARMS = ("single", "looped", "shift")
SWITCHES = ("fixed:50", "fixed:100", "fixed:200", "fixed:300")
"""Trained but not surveyed: when would a switch have been good?"""
SURVEY = SurveyConfig(points=8, samples=32, leading=6, lanczos_steps=40, lanczos_vectors=1)


def tasks() -> dict[str, TrainConfig]:
    """The paper's toy on a Markov language (d_model 32: 5,896 weights) and the demo's model on hop d12."""
    toy, demo = load_config("paper_toy"), load_config("demo")
    toy = dataclasses.replace(toy, steps=650, model=dataclasses.replace(toy.model, d_model=32))
    hop = dataclasses.replace(demo, steps=500, task=TaskConfig("hop", options={"n_nodes": 12, "max_hops": 4}))
    shared = {
        "eval_samples": 256,
        "checkpoint_every": 0,
        "log_every": 50,
        "landscape": LandscapeConfig(every=50),
    }
    return {
        "markov": dataclasses.replace(toy, eval_every=50, **shared),
        "hop": dataclasses.replace(hop, eval_every=25, **shared),
    }


def run(work: Path, task: str, arm: str, seed: int, surveyed: bool) -> None:
    """Train and survey one run, unless that is done."""
    path = work / task / arm.replace(":", "-") / f"seed-{seed}"
    config = make_arm(arm, tasks()[task]).config
    config = dataclasses.replace(config, seed=seed, task=dataclasses.replace(config.task, seed=seed))
    if not surveyed:
        config = dataclasses.replace(config, landscape=LandscapeConfig())
    if not (path / "result.json").is_file():
        Trainer(config, path, resume=True).fit()
    if surveyed and not (path / "survey.json").is_file():
        found = survey(path, SURVEY)
        replace_atomically(path / "survey.json", json.dumps(found, allow_nan=False).encode())
    print(path, flush=True)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/landscape"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tasks", nargs="+", default=list(tasks()))
    parser.add_argument("--switches", action="store_true", help="the fixed switches on hop instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        for task in ["hop"] if args.switches else args.tasks:
            for arm in SWITCHES if args.switches else ARMS:
                run(args.work, task, arm, seed, surveyed=not args.switches)


if __name__ == "__main__":
    main()
