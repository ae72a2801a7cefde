"""A trained model out of a run directory."""

from __future__ import annotations

import sys
from pathlib import Path

from shift.build import build_model, build_task, find_device, with_data
from shift.config import TrainConfig, load_config
from shift.model import LoopedTransformer
from shift.reading import is_count
from shift.run import checkpoint
from shift.run.checkpoint import Checkpoint
from shift.run.progress import Progress
from shift.tasks.base import Task
from shift_kernels.errors import input_error


def newest(tool: str, run_dir: Path, data: Path | None = None) -> tuple[TrainConfig, Checkpoint]:
    """The config of a run and its newest checkpoint.

    Args:
        tool: who asks, for errors.
        data: where the data lies that it was trained on; None: where it lay then.

    Raises:
        ShiftInputError: no run there, or none with a checkpoint that is whole.
    """
    if not (run_dir / "config.toml").is_file():
        raise input_error(tool, "run_dir", str(run_dir), "the directory of a run", "Check the path.")
    run = load_config(run_dir / "config.toml")
    if data is not None:
        run = with_data(tool, run, data)
    saved, damaged = checkpoint.newest_valid(run_dir / "checkpoints", trained_loops)
    if saved is None:
        reasons = "; ".join(reason for _, reason in damaged)
        remedy = f"Train it: {reasons}." if damaged else "Train it."
        raise input_error(tool, "run_dir", str(run_dir), "a run with a checkpoint", remedy)
    for _, reason in damaged:
        step = saved.state["step"]
        print(f"{tool}: step {step}, as a newer checkpoint is damaged: {reason}", file=sys.stderr)
    return run, saved


def trained_loops(saved: Checkpoint) -> int:
    """The loops with which the run would have been evaluated then.

    Raises:
        DamagedCheckpoint: the state does not say.
    """
    with checkpoint.damage(saved.path / checkpoint.STATE):
        of_older = Progress.from_state(saved.state["progress"]).last_eval
        loops = saved.state.get("n_loops", of_older.get("n_loops"))
        if not is_count(loops):
            raise ValueError(f"n_loops = {loops!r:.50}")
        return loops


def restored(tool: str, run: TrainConfig, saved: Checkpoint, task: Task | None = None) -> LoopedTransformer:
    """The model of a checkpoint, in evaluation mode, on the device that the run names.

    Args:
        tool: who asks, for errors.
        task: whose sizes the model has; default the run's own.

    Raises:
        ShiftInputError: the weights are not those of this config, or the task's data not the run's.
    """
    task = task or build_task(run)
    saved.check_data(tool, task, "--data NEW")
    model = build_model(run, task)
    try:
        saved.restore_weights(model)
    except checkpoint.DamagedCheckpoint as error:
        allowed = "a run whose config.toml is that of its checkpoints"
        raise input_error(tool, "run_dir", str(saved.path), allowed, f"Restore it: {error}.") from error
    return model.to(find_device(run.device)).eval()
