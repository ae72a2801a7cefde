"""Hand-made run directories in the trainer's format, with outcomes chosen by the test."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from shift.comparison.arms import Variants, make_arm
from shift.comparison.results import collect
from shift.config import TrainConfig
from shift.run.record import Run, read_run

LOOP_FLOPS = 1000
"""Training FLOPs of one loop of one step."""

PLAN = {
    "command": "shift-compare --preset demo",
    "created": "2026-01-01T00:00:00+00:00",
    "target_rule": "accuracy 0.99",
    "first_target_rule": "accuracy 0.99",
}

Accuracy = Callable[[int], float]
Loops = Callable[[int], int]


def reaches(step: int, accuracy: float = 0.995) -> Accuracy:
    """Accuracy that is .6 before a step, ``accuracy`` from it on."""
    return lambda s: accuracy if s >= step else 0.6


def switches(step: int, n_loops: int = 4) -> Loops:
    """One loop in the first ``step`` steps, ``n_loops`` afterwards."""
    return lambda s: 1 if s < step else n_loops


def learns(middle: float, top: float = 0.999, width: float = 30.0) -> Accuracy:
    """A smooth learning curve, for pictures."""
    return lambda s: 0.1 + (top - 0.1) / (1 + math.exp((middle - s) / width))


def write_run(
    path: Path,
    config: TrainConfig,
    accuracy: Accuracy,
    loops: Loops,
    *,
    weights: str = "w0",
    data: str = "d0",
    failure: str | None = None,
    looks: bool = False,
) -> None:
    """A run of ``config.steps`` steps, evaluated before and every ``config.eval_every`` of them."""
    path.mkdir(parents=True)
    (path / "config.toml").write_text(tomli_w.dumps(config.to_dict()))
    rows: list[dict[str, Any]] = []
    timing: list[dict[str, Any]] = []
    done = 0
    switch_step = None

    def evaluation(step: int) -> dict[str, Any]:
        share = accuracy(step)
        groups = {"1 hop": 1.0, "2 hops": share}
        costs = {"flops": done * LOOP_FLOPS, "block_applications": done}
        scores = {"loss": 2.5 * (1 - share), "accuracy": share, "exact": share**2, "groups": groups}
        return {"kind": "eval", "step": step, "n_loops": loops(step), **scores, **costs}

    rows.append(evaluation(0))
    for step in range(1, config.steps + 1):
        n_loops = loops(step - 1)
        if switch_step is None and step > 1 and n_loops > 1 and loops(step - 2) == 1:
            switch_step = step - 1
        done += n_loops
        if looks and step % 20 == 0 and switch_step is None:
            rows.append(_look(step, fired=loops(step) > 1))
        cost = {"flops": done * LOOP_FLOPS, "block_applications": done}
        rows.append(
            {"kind": "train", "step": step, "loss": 1.0, "lr": 2e-3, "grad_norm": 0.5, "n_loops": n_loops}
            | {"stage": 1 if n_loops == 1 else 2, "skipped": False, **cost}
        )
        timing.append({"step": step, "wall_s": done / 100, "cpu_s": done / 200})
        if step % config.eval_every == 0 or step == config.steps:
            rows.append(evaluation(step))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timing))
    if failure is not None:
        (path / "failure.txt").write_text(failure)
        return
    result = {
        "switch_step": switch_step,
        "switch_ms": None,
        "wall_s": done / 100,
        "cpu_s": done / 200,
        "initial_weights_sha256": weights,
        "first_batches_sha256": data,
        "last_batches_sha256": data,
        "machine": {"platform": "test", "device": "cpu", "cores": 2, "threads": 1},
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789abcdef",
    }
    (path / "result.json").write_text(json.dumps(result))


def write_arm(out: Path, name: str, seeds: Mapping[int, Accuracy], loops: Loops, **options: Any) -> None:
    """An arm's run directories, one for each seed."""
    base = options.pop("base", TrainConfig(steps=100, eval_every=10))
    arm = make_arm(name, base, variants=options.pop("variants", None))
    for seed, accuracy in seeds.items():
        task = dataclasses.replace(base.task, seed=seed)
        config = dataclasses.replace(arm.config, seed=seed, task=task)
        write_run(out / arm.directory / f"seed-{seed}", config, accuracy, loops, **options)


def read_arms(
    out: Path, names: list[str], seeds: list[int], variants: Variants | None = None
) -> dict[str, dict[int, Run]]:
    """What :func:`write_arm` wrote."""
    base = TrainConfig()
    directories = {name: out / make_arm(name, base, variants=variants).directory for name in names}
    return {name: {s: read_run(path / f"seed-{s}") for s in seeds} for name, path in directories.items()}


def collected(
    out: Path,
    names: list[str],
    seeds: list[int],
    target: float | None = 0.99,
    variants: Variants | None = None,
    declared: Variants | None = None,
) -> dict[str, Any]:
    """``results.json`` of the written arms, whose plan declared ``variants``, or others."""
    labels = {name: make_arm(name, TrainConfig(), variants=variants).label for name in names}
    plan = PLAN | {"variants": variants if declared is None else declared} if variants else PLAN
    return collect(read_arms(out, names, seeds, variants), labels, target, plan)


def _look(step: int, fired: bool) -> dict[str, Any]:
    improvement, grad_change = 0.5 * math.exp(-step / 60), 0.4 * math.exp(-step / 90) + 0.05 * math.sin(step)
    row = {"loss_ema": 1.0, "grad_ema": 0.5, "improvement": improvement, "grad_change": grad_change}
    return {"kind": "look", "step": step, **row, "hits": int(improvement < 0.03), "fired": fired}
