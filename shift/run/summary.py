"""The summary of a finished run, and what it ran on."""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch

from shift.build import find_device
from shift.config import TrainConfig
from shift.run.directory import RunDirectory
from shift.run.progress import Progress
from shift.run.record import read_timing
from shift.run.speed import Pace
from shift.tasks.base import Task
from shift_kernels.machine import device_name

ROOT = Path(__file__).parents[2]


def batches_sha256(task: Task, batch_size: int, steps: range, world_size: int) -> str:
    """sha256 of the tokens of some training batches of all ranks: equal for runs that saw the same data."""
    sha256 = hashlib.sha256()
    for step in steps:
        for rank in range(world_size):
            sha256.update(
                task.batch(batch_size, step, rank=rank, n_ranks=world_size).tokens.numpy().tobytes()
            )
    return sha256.hexdigest()


def summarise(
    config: TrainConfig,
    task: Task,
    progress: Progress,
    run: RunDirectory,
    n_streams: int,
    peak: float | None,
) -> dict[str, Any]:
    """What ``result.json`` says but for the weights.

    Args:
        config, task, progress, run: of the run.
        n_streams: ranks that it began with.
        peak: FLOP/s of all devices; None: unknown.
    """
    c, p = config, progress
    first, last = range(min(10, c.steps)), range(max(0, c.steps - 10), c.steps)
    return {
        "steps": p.step,
        "switch_step": p.switch_step,
        "final_eval": p.last_eval,
        "flops_total": p.flops,
        "block_applications": p.block_applications,
        "skipped_steps": p.skipped_steps,
        "train_s": p.train_s,
        "wall_s": p.wall_s,
        "cpu_s": p.cpu_s,
        "switch_ms": switch_ms(run.path, p.switch_step),
        **pace(run.path, p.step, p.flops, peak),
        "initial_weights_sha256": p.initial_weights_sha256,
        "metrics_sha256": run.metrics_sha256(),
        "first_batches_sha256": batches_sha256(task, c.batch_size, first, n_streams),
        "last_batches_sha256": batches_sha256(task, c.batch_size, last, n_streams),
        "config": c.to_dict(),
        "world_size": n_streams,
        **environment(find_device(c.device)),
    }


def switch_ms(run_dir: Path, switch_step: int | None) -> float | None:
    """What the first looped step cost over the median of the ten after it; None where no times are known."""
    if switch_step is None:
        return None
    ms = {row["step"]: row["ms"] for row in read_timing(run_dir) if "ms" in row}
    later = [ms[step] for step in range(switch_step + 2, switch_step + 12) if step in ms]
    return ms[switch_step + 1] - statistics.median(later) if switch_step + 1 in ms and later else None


def pace(run_dir: Path, n_steps: int, flops: float, peak: float | None) -> dict[str, Any]:
    """The pace of a whole run, by the clocks of its training steps alone; empty where no times are known."""
    rows = [row for row in read_timing(run_dir) if {"ms", "tokens", "memory_bytes"} <= row.keys()]
    if not rows:
        return {}
    peak = peak if len(rows) == n_steps else None  # or the FLOPs would be of other steps than the times
    return {"peak_flops_per_s": peak, **vars(Pace.of(rows, flops, peak))}


def environment(device: torch.device) -> dict[str, Any]:
    """``machine``, ``versions`` and ``commit`` (None outside a git checkout)."""
    return {
        "machine": {
            "platform": platform.platform(),
            "device": device_name(device),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "commit": _commit(),
    }


def _commit() -> str | None:
    if not (ROOT / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
