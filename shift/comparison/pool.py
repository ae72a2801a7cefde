"""Many training runs side by side, in worker processes of one thread each, under one progress display."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TextIO

import torch

from shift.config import TrainConfig
from shift.run.record import FAILURE
from shift.run.trainer import Trainer, TrainingDiverged

REPORT_S = 0.25
"""Seconds between two progress reports of a worker."""


def train_all(runs: Mapping[Path, TrainConfig], jobs: int, stream: TextIO | None = None) -> None:
    """Train every run, ``jobs`` at a time, each in one thread; unfinished run directories are resumed.

    A run that diverges leaves the reason in :data:`shift.run.record.FAILURE`; the others go on. Ctrl-C lets
    every worker save a checkpoint, then raises :class:`KeyboardInterrupt`.

    Raises:
        ChildProcessError: a worker was killed.
    """
    if not runs:
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that runs torch may deadlock
    reports: Queue[tuple[str, int]] = context.Queue()
    stop = context.Event()
    display = Display(len(runs), sum(config.steps for config in runs.values()), stream or sys.stderr)
    workers = min(jobs, len(runs))
    with ProcessPoolExecutor(workers, context, _start_worker, (reports, stop)) as pool:
        try:
            waiting = {pool.submit(_train, config, path) for path, config in runs.items()}
            while waiting:
                done, waiting = wait(waiting, timeout=REPORT_S)
                for future in done:
                    future.result()  # raises what the worker raised
                while not reports.empty():
                    display.step(*reports.get())
                display.show(len(runs) - len(waiting))
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker was killed, most likely for want of memory; the same command goes on from the last "
                "checkpoints (fewer --jobs take less memory)"
            ) from error
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            display.close()


class Display:
    """A bar on a terminal; elsewhere a line every few seconds."""

    EVERY_S = 5.0

    def __init__(self, n_runs: int, total_steps: int, stream: TextIO) -> None:
        self._n_runs, self._total, self._stream = n_runs, total_steps, stream
        self._steps: dict[str, int] = {}
        self._before = 0  # steps at each run's first report: done before, so no part of this call's speed
        self._started = self._shown = time.monotonic()
        self._bar = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, file=stream, unit="step", dynamic_ncols=True)

    def step(self, run: str, step: int) -> None:
        """Note that a run has done ``step`` steps."""
        if not self._steps:
            self._started = time.monotonic()  # the workers' start is over
        if run not in self._steps:
            self._before += step
        self._steps[run] = step

    def show(self, runs_done: int) -> None:
        """Bring the display up to date."""
        done = sum(self._steps.values())
        now = time.monotonic()
        if self._bar is not None:
            self._bar.initial = self._before
            self._bar.update(done - self._bar.n)
            self._bar.set_postfix_str(f"{runs_done} of {self._n_runs} runs")
        elif now - self._shown >= self.EVERY_S and done > self._before:
            self._shown = now
            total = max(self._total, done)  # how many steps min_flops takes is known when they are done
            left = (total - done) * (now - self._started) / (done - self._before)
            text = f"{runs_done} of {self._n_runs} runs, {done} of {total} steps, about {left:.0f} s left"
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the display as it is."""
        if self._bar is not None:
            self._bar.close()


_reports: Queue[tuple[str, int]]
_stop: Event


def _start_worker(reports: Queue[tuple[str, int]], stop: Event) -> None:
    global _reports, _stop
    _reports, _stop = reports, stop
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which sets ``stop``
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Nobody waits for the run of a killed parent; its last checkpoint is what the next call finds."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train(config: TrainConfig, run_dir: Path) -> None:
    trainer = Trainer(config, run_dir, resume=True)
    (run_dir / FAILURE).unlink(missing_ok=True)
    reported = 0.0

    def progress(step: int, total: int) -> None:
        nonlocal reported
        now = time.monotonic()
        if step != total and now - reported < REPORT_S:
            return
        reported = now
        _reports.put((str(run_dir), step))
        if _stop.is_set():
            trainer.stop()

    try:
        trainer.fit(progress)
    except TrainingDiverged as error:
        (run_dir / FAILURE).write_text(f"diverged: {error}", encoding="utf-8")
