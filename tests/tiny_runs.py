"""Runs that take a fraction of a second, for the tests of the trainer."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch

from shift.config import ModelConfig, OptimiserConfig, ScheduleConfig, TaskConfig, TrainConfig

torch.set_num_threads(1)  # bits depend on it, and at this size more threads only wait for each other

TINY = TrainConfig(
    task=TaskConfig("hop", options={"n_nodes": 6, "max_hops": 2}),
    model=ModelConfig(n_loops=3, d_model=16, n_heads=2, d_ff=32),
    optimiser=OptimiserConfig(warmup=4),
    schedule=ScheduleConfig("fixed", {"at": 0.5}),
    steps=12,
    batch_size=8,
    eval_every=4,
    eval_samples=16,
    log_every=3,
    checkpoint_every=4,
    device="cpu",
)


def tiny(**changes: Any) -> TrainConfig:
    """:data:`TINY` with other values."""
    return dataclasses.replace(TINY, **changes)


class Replaced:
    """A task whose batches are changed on the way."""

    def __init__(self, task, change):
        self._task, self._change = task, change

    def __getattr__(self, name):
        return getattr(self._task, name)

    def batch(self, *args, **kwargs):
        return self._change(self._task.batch(*args, **kwargs))


def rows(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind in ``metrics.jsonl``."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def processes() -> Any:
    """A multiprocessing context whose children start in milliseconds: torch is imported once, in a server.

    Plain fork would copy a pytest process whose torch may already run threads.
    """
    context = multiprocessing.get_context("forkserver")
    late = [
        "torch._dynamo",
        "shift.run.fsdp",
    ]  # otherwise imported in each child, by an optimiser and by shards
    context.set_forkserver_preload(["shift.train", *late])
    return context
