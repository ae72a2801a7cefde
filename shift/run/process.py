"""One training run as a process of its own: its process group, its console, and the signals that end it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shift.config import TrainConfig
from shift.run.console import Console
from shift.run.logs import Log, Watchers, open_log
from shift.run.ranks import OtherRankFailed
from shift.run.shapes import When, calibrate_shapes
from shift.run.trainer import Trainer

PATIENCE = timedelta(seconds=50)
"""That a rank waits for another within a step, before it gives the job up."""


def run(
    config: TrainConfig,
    run_dir: Path,
    *,
    resume: bool,
    calibrate: When = "auto",
    logs: Sequence[Log] = (),
) -> None:
    """Train; under ``torchrun`` as one rank of it. Progress goes to the console of rank 0.

    Args:
        config, run_dir, resume: see :class:`shift.run.trainer.Trainer`.
        calibrate: see :func:`shift.run.shapes.calibrate_shapes`.
        logs: who is told besides the console.

    Raises:
        ModuleNotFoundError: the package of a log is missing.
        TrainingInterrupted: after SIGTERM or Ctrl-C; a checkpoint was saved.
        ShiftInputError, TrainingDiverged, OtherRankFailed, OSError: see there.
    """
    with _process_group(config) as leads:
        watchers = [open_log(log, config, run_dir) for log in dict.fromkeys(logs)] if leads else []
        console = Watchers([Console(config.steps), *watchers]) if leads else None
        try:
            calibrate_shapes(config, calibrate, lambda line: print(line, file=sys.stderr))
            trainer = Trainer(config, run_dir, resume=resume, extend=True, console=console)
            if leads and trainer.done():
                done = f"{run_dir}: finished at step {trainer.progress.step}; more --steps go on from there"
                print(done, file=sys.stderr)
            with _stopped_by_signals(trainer), _silence_named(config.hang_timeout):
                trainer.fit()
        finally:
            if console:
                console.close()


@contextlib.contextmanager
def _process_group(config: TrainConfig) -> Iterator[bool]:
    """Join the processes of ``torchrun``, if there are any; yields whether this one is rank 0.

    Shards want a group even where one process holds all of them.
    """
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if alone and config.parallel == "ddp":
        yield True
        return
    if torch.cuda.is_available() and config.device != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if alone:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, timeout=PATIENCE)
    else:
        dist.init_process_group(timeout=PATIENCE)
    yield dist.get_rank() == 0
    dist.destroy_process_group()  # not after a failure: it would wait for ranks that are gone


@contextlib.contextmanager
def _silence_named(hang_timeout: float) -> Iterator[None]:
    """Say in plain words that another rank does not answer."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise OtherRankFailed(
            f"rank {dist.get_rank()}: another rank has died, or has not answered for "
            f"{PATIENCE.total_seconds():.0f} s in a step, or {hang_timeout:g} s (hang_timeout) while another "
            f"waited for what it does alone ({reason}); the last checkpoint is good: --resume auto"
        ) from error


@contextlib.contextmanager
def _stopped_by_signals(trainer: Trainer) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the run in order; a second one ends it at once."""

    def stop(number: int, _frame: object) -> None:
        signal.signal(number, before[number])
        trainer.stop()

    before: dict[int, Any] = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
