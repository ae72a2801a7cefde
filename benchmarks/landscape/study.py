"""The study's runs: two tasks, three arms, five seeds, each surveyed; and switches at fixed steps.

A work directory holds ``task/arm/seed-N``, each with the run's own files and ``survey.json``; what is done
is kept, so that an interrupted study goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from shift.comparison.arms import make_arm
from shift.comparison.pool import train_all
from shift.config import LandscapeConfig, TaskConfig, TrainConfig, load_config
from shift.landscape.hessian import Hessian
from shift.landscape.recording import open_recording
from shift.landscape.spectrum import exact_spectrum
from shift.landscape.survey import SurveyConfig, survey
from shift.landscape.upstream import stage_one
from shift.run.files import replace_atomically

ARMS = ("single", "looped", "shift")
SWITCHES = {"markov": (100, 200, 300, 400), "hop": (50, 100, 200, 300)}
"""Steps at which further runs switch, trained but not surveyed: when would a switch have been good?"""
EVERY = 50
"""Steps between recorded bursts; the switches are multiples, so that the weights there are recorded."""

_LOOK = SurveyConfig(leading=6, heights=(0.1, 1.0))
SURVEYS = {
    "markov": dataclasses.replace(_LOOK, points=8, samples=16, lanczos_steps=25, lanczos_vectors=6),
    "hop": dataclasses.replace(_LOOK, points=5, samples=32, lanczos_steps=20, lanczos_vectors=3),
}


def tasks() -> dict[str, TrainConfig]:
    """A toy on a Markov language, small enough for all eigenvalues; the demo's model on hop."""
    toy, demo = load_config("markov_toy"), load_config("demo")
    small = dataclasses.replace(toy.model, d_model=16, n_heads=2)
    toy = dataclasses.replace(toy, steps=900, eval_every=20, model=small)
    d12 = TaskConfig("hop", options={"n_nodes": 12, "max_hops": 4})
    hop = dataclasses.replace(demo, steps=600, eval_every=10, task=d12)
    shared = {
        "eval_samples": 256,
        "checkpoint_every": 0,
        "log_every": 50,
        "landscape": LandscapeConfig(every=EVERY),
        "device": "cpu",
    }
    return {name: dataclasses.replace(config, **shared) for name, config in (("markov", toy), ("hop", hop))}


def run_dir(work: Path, task: str, arm: str, seed: int) -> Path:
    """Where a run lies; ``arm`` as in :mod:`shift.comparison.arms`."""
    return work / task / arm.replace(":", "-") / f"seed-{seed}"


def config_of(task: TrainConfig, arm: str, seed: int) -> TrainConfig:
    """What one run trains; only those of :data:`ARMS` record their weights."""
    config = make_arm(arm, task).config
    config = dataclasses.replace(config, seed=seed, task=dataclasses.replace(config.task, seed=seed))
    return config if arm in ARMS else dataclasses.replace(config, landscape=LandscapeConfig())


def arms_of(task: str) -> list[str]:
    """All arms of a task."""
    return [*ARMS, *(f"fixed:{step}" for step in SWITCHES[task])]


def run_all(work: Path, seeds: Sequence[int], jobs: int) -> None:
    """Train and survey what is not done, seed by seed: an interrupted study is whole for those it reached."""
    context = multiprocessing.get_context("spawn")
    for seed in seeds:
        runs = {
            run_dir(work, name, arm, seed): config_of(task, arm, seed)
            for name, task in tasks().items()
            for arm in arms_of(name)
        }
        train_all({p: c for p, c in runs.items() if not (p / "result.json").is_file()}, jobs)
        waiting = [p for p, c in runs.items() if c.landscape.every and not (p / "survey.json").is_file()]
        with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
            for path in pool.map(look, waiting):
                print(path, flush=True)


def look(path: Path) -> Path:
    """Survey one run: ``survey.json``, which is written last; ``upstream.json`` of Single, ``exact.json`` of
    the toy (all eigenvalues at the last weights)."""
    task, arm = path.parts[-3:-1]
    if arm == "single":
        _write(path / "upstream.json", stage_one(path))
    if task == "markov":
        run = open_recording(path)
        n_loops = run.of_kind("train")[-1]["n_loops"]
        surface = run.surface(n_loops, SURVEYS[task].samples, torch.float32)
        last = surface.vector(run.snapshots.weights[-1])
        _write(path / "exact.json", exact_spectrum(Hessian(surface.loss, last)).values.tolist())
    _write(path / "survey.json", survey(path, SURVEYS[task]))
    return path


def _write(path: Path, content: object) -> None:
    replace_atomically(path, json.dumps(content, allow_nan=False).encode())
