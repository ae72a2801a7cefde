"""From a config to the objects it describes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shift.config import TrainConfig
from shift.flops import forward_flops
from shift.model import LoopedTransformer
from shift.schedules import LoopSchedule, make_schedule
from shift.tasks import find_task, make_task
from shift.tasks.base import Task
from shift_kernels.errors import input_error

TASK_FIELDS = {"seed": "task.seed", "name": "task.name"}
SCHEDULE_FIELDS = {
    "seed": "seed",
    "kind": "schedule.kind",
    "max_loops": "model.n_loops",
    "total_steps": "steps",
}
"""Arguments of tasks and schedules that are fields of the config, and so no options."""


def build_task(config: TrainConfig) -> Task:
    """The task, with its own data seed."""
    _check_names("task", config.task.options, TASK_FIELDS)
    return make_task(config.task.name, seed=config.task.seed, **config.task.options)


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The config as it holds in any folder: where its task reads files, their paths from the root."""
    options = config.task.options
    given = {name: options[name] for name in find_task(config.task.name).paths if options.get(name)}
    found = {name: os.path.abspath(path) for name, path in given.items() if isinstance(path, str)}
    return _with_task_options(config, found)


def with_data(tool: str, config: TrainConfig, data: Path) -> TrainConfig:
    """The config of a run whose data has moved.

    Args:
        tool: who asks, for errors.
        data: where it lies now.

    Raises:
        ShiftInputError: its task reads no files.
    """
    paths = find_task(config.task.name).paths
    if not paths:
        allowed = f"None for a task that reads no files, such as {config.task.name!r}"
        raise input_error(tool, "data", str(data), allowed, "Leave it out.")
    return _with_task_options(config, {paths[0]: str(data)})


def _with_task_options(config: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    task = dataclasses.replace(config.task, options={**config.task.options, **options})
    return dataclasses.replace(config, task=task)


def build_model(config: TrainConfig, task: Task) -> LoopedTransformer:
    """The model on the CPU, with the weights of ``config.seed``: the same whatever device it moves to.

    Seeds torch's global generator.

    Raises:
        MemoryError: it is too large for this machine.
    """
    torch.manual_seed(config.seed)
    try:
        return LoopedTransformer.for_task(
            config.model.block_spec(task.causal),
            task,
            learned_positions=config.model.learned_positions,
            final_norm=config.model.final_norm,
            layout=config.model.layout(),
        )
    except RuntimeError as error:  # as torch says it for the CPU
        if "allocate memory" not in str(error):
            raise
        raise MemoryError(f"no memory for a model of {config.model}") from error


def build_schedule(config: TrainConfig) -> LoopSchedule:
    """The schedule at step 0. One that draws by FLOPs is told what they are, unless the config says it."""
    _check_names("schedule", config.schedule.options, SCHEDULE_FIELDS)
    options: dict[str, Any] = dict(config.schedule.options)
    if options.get("distribution") == "inverse_flops":
        options = {"rest": _rest(config), **options}
    return make_schedule(
        config.schedule.kind,
        max_loops=config.model.n_loops,
        total_steps=config.steps,
        seed=config.seed,
        **options,
    )


def _check_names(table: str, options: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    for name in options.keys() & fields.keys():
        raise input_error(
            "TrainConfig", f"{table}.options.{name}", options[name], "no option of this name",
            f"It is the field {fields[name]}.",
        )  # fmt: skip


def _rest(config: TrainConfig) -> float:
    """FLOPs of all that is not looped over those of one loop."""
    task = build_task(config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # no weight is needed, and no draw
        model = build_model(config, task)
    one, two = (forward_flops(model, 1, task.max_seq_len, n_loops) for n_loops in (1, 2))
    return (2 * one - two) / (two - one)


def find_device(name: str) -> torch.device:
    """``auto``: this process's GPU where there is one (torchrun gives each process of a machine its own)."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    n_cuda = torch.cuda.device_count()
    if device is None or (device.type == "cuda" and (device.index or 0) >= n_cuda):
        raise input_error(
            "TrainConfig", "device", name, f"auto, cpu, or one of this machine's {n_cuda} CUDA devices",
            "Choose one that is here.",
        )  # fmt: skip
    return device
