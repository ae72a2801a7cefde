"""The training loop: one run, from a config to a run directory.

    for each step:  ask the schedule for the number of loops; at a switch go back as far as it says
                    -> batch -> loss at the read positions -> gradients -> clip
                    -> AdamW, which the device skips by itself if anything is not finite

Nothing waits for the device but the reads of the metrics, once per ``log_every`` steps. A run that was
killed and resumed writes the same metrics, weights, optimiser and schedule state, byte for byte, as one that
was left alone (same machine, thread count and versions).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from shift.build import build_model, build_schedule, build_task, find_device, with_absolute_paths
from shift.config import TrainConfig, differing_key
from shift.run import checkpoint
from shift.run.average import WeightAverage
from shift.run.checkpoint import Checkpoint, damage
from shift.run.diagnosis import culprit
from shift.run.directory import CHECKPOINTS, RunDirectory
from shift.run.evaluate import evaluate, loops_of
from shift.run.global_batch import GlobalBatch
from shift.run.ledger import enter_step
from shift.run.logs import Watcher
from shift.run.metrics import PendingRows, StepTimer
from shift.run.micro_batches import MicroBatches
from shift.run.optim import go_back, learning_rate
from shift.run.parallel import share
from shift.run.progress import Progress
from shift.run.ranks import Ranks
from shift.run.recompute import loop_by_loop
from shift.run.snapshots import SnapshotRecorder
from shift.run.speed import Pace, matmul_peak, memory_bytes
from shift.run.step import TrainStep
from shift.run.summary import summarise
from shift.schedules import Decision, Signals
from shift_kernels.errors import ShiftInputError, input_error, type_error

MAX_SKIPS = 5
"""Skipped steps in a row after which a run stops: it will not recover by itself."""


class TrainingInterrupted(Exception):
    """:meth:`Trainer.stop` was called; a checkpoint was saved, and ``resume`` goes on from it."""


class TrainingDiverged(Exception):
    """Loss or gradient norm was not finite :data:`MAX_SKIPS` steps in a row."""


class Trainer:
    """One training run.

    Args:
        config: what to run.
        run_dir: where to write; created if need be.
        resume: go on from the newest valid checkpoint in ``run_dir`` (from the start if there has been none;
            rows that are there are renamed, with a warning). Without it a directory that holds a run is
            refused.
        extend: let a run that is resumed have more steps than it was begun with. Its schedule, where it goes
            by fractions of all steps, stays as it was.
        console: who is told of steps and evaluations; None: nobody.

    In a process group (``torchrun``) every rank builds one: the global batch is the concatenation of the
    ranks' batches; another number of ranks that resumes the run shares the same one. Rank 0 alone reads and
    writes the run directory, and gives all others the checkpoint that it resumes from; with
    ``parallel = "fsdp"`` all read and write checkpoints. Seeds torch's global generator.

    Raises:
        ShiftInputError: an unusable config, a used directory, or a checkpoint of another config.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: str | Path,
        *,
        resume: bool = False,
        extend: bool = False,
        console: Watcher | None = None,
    ) -> None:
        if not isinstance(config, TrainConfig):
            given, remedy = type(config).__name__, "Build one: TrainConfig.from_dict(...)."
            raise type_error("shift.Trainer", "config", given, "a TrainConfig", remedy)
        if not isinstance(run_dir, (str, os.PathLike)):
            raise type_error("shift.Trainer", "run_dir", run_dir, "a path", "Name a directory.")
        config = with_absolute_paths(config)
        self.ranks = Ranks(config.hang_timeout)
        self.config, self.console, self.device = config, console, find_device(config.device)
        self.task, self.schedule = build_task(config), build_schedule(config)
        self.model = build_model(config, self.task).to(self.device)
        initial = checkpoint.digest(self.model.state_dict())
        if config.checkpoint_core:
            loop_by_loop(self.model.block)
        self.ranks.together(self._check_configs)
        for x in self.model.state_dict().values():
            self.ranks.copy_first(x)  # equal by their seed, if the machines are
        self._parallel = share(self.model, config, self.ranks)
        self.optimizer = self._parallel.optimizer
        self._step = TrainStep(config, self.model, self._parallel, self.ranks)
        self._deal(self.ranks.size)
        pieces, ema = self.optimizer.pieces, config.optimiser.ema
        self._initial = [x.clone() for x in pieces] if self.schedule.keep < 1 else None
        self.average = WeightAverage(pieces, ema) if ema else None
        self._planned_steps, self._extend = config.steps, extend
        self.signals: Signals | None = None
        self.progress = Progress(initial_weights_sha256=initial)
        self.run_dir = Path(run_dir)
        self.run: RunDirectory | None = None  # on rank 0
        saved = self.ranks.from_first(lambda: self._open(resume))
        if saved is not None and self.run is None:
            self.ranks.together(lambda: self._restore(Checkpoint.of_files(*saved)))
        elif saved is not None:
            self.ranks.together(lambda: None)
        self._rows, self._timer, self._stop = PendingRows(), StepTimer(self.device), False
        self._flops_seen = self.progress.flops
        self._evaluated = 0  # loops, of the last step's decision
        self._snapshots = SnapshotRecorder(
            self.model, self.optimizer, config.landscape.every, config.landscape.burst, config.steps
        )

    def stop(self) -> None:
        """Ask :meth:`fit` to save a checkpoint and raise :class:`TrainingInterrupted` after this step."""
        self._stop = True

    def fit(self, progress: Callable[[int, int], object] | None = None) -> dict[str, Any]:
        """Train all steps, and on until ``min_flops`` are spent.

        Args:
            progress: called after every step with (steps done, the config's steps).

        Returns:
            What ``result.json`` holds; nothing on ranks other than 0.

        Raises:
            TrainingInterrupted: after :meth:`stop`.
            TrainingDiverged: the loss stays non-finite.
        """
        try:
            if not self.micro_batches.known:
                self._find_micro_batches()
            self._train(progress)
        except ShiftInputError:
            if self.run is not None and self.progress.step == 0:
                self.run.abandon()
            raise
        digests = self._parallel.digests(self.model)
        sweep = {str(n): self._scores(n) for n in dict.fromkeys(self.config.sweep_loops)}
        if self.run is None:
            return {}
        n_streams = self.batches.n_streams
        peak = self._peak() if n_streams == self.ranks.size else None  # of all its steps, or of none
        result = summarise(self.config, self.task, self.progress, self.run, n_streams, peak)
        result |= digests | {"schedule_sha256": checkpoint.digest(self.schedule.state_dict())}
        result |= {"sweep": sweep} if sweep else {}
        self.run.finish(result)
        return result

    def _deal(self, n_streams: int) -> None:
        """Share the global batch of as many streams."""
        ranks, c = self.ranks, self.config
        self.batches = GlobalBatch(c.batch_size, n_streams, ranks.rank, ranks.size)
        self.micro_batches = MicroBatches(c.micro_batch, len(self.batches.own))

    def _find_micro_batches(self) -> None:
        """Try sizes on a batch that no step sees, and leave no trace of it."""
        batch = self.task.batch(len(self.batches.own), 0, split="eval").to(self.device)
        attempt, most = functools.partial(self._step.try_out, batch), self.config.model.n_loops
        with torch.random.fork_rng([] if self.device.type == "cpu" else [self.device]):
            self.micro_batches.find(
                attempt, most, self.device, agree=lambda size: min(self.ranks.gather(size))
            )

    def _train(self, progress: Callable[[int, int], object] | None) -> None:
        c, p = self.config, self.progress
        self._started = time.perf_counter() - p.wall_s, time.process_time() - p.cpu_s
        while not self.done():
            decision = self.schedule.step(p.step, self.signals)
            for look in decision.looks:
                self._rows.add({"kind": "look", **dataclasses.asdict(look)})
            if decision.switched:
                self._switch(decision.keep)
            if p.step == 0:
                self._evaluate(decision.evaluated)
            self._snapshots.take(p.step)
            self._evaluated = decision.evaluated
            self._train_step(decision)

            last = self.done()
            if last:
                self._snapshots.take(p.step)
            if _due(p.step, c.log_every):
                self._flush()
            # Where the steps end, too: a run that goes on must not differ from one that was resumed there.
            ends = last or p.step == c.steps
            if ends or _due(p.step, c.eval_every):
                self._evaluate(decision.evaluated)
            stop = self._should_stop()
            if ends or stop or _due(p.step, c.checkpoint_every):
                self._save()
            if progress is not None:
                progress(p.step, c.steps)
            if stop and not last:
                raise TrainingInterrupted(
                    f"stopped after step {p.step} of {c.steps}; resume goes on from there"
                )

    def _switch(self, keep: float) -> None:
        """The first step with another number of loops comes next."""
        self.progress.switch_step = self.progress.step
        if self._initial is not None:
            go_back(self.optimizer, self._initial, keep)
            if self.average is not None:
                self.average.restart()
        elif self.config.optimiser.keep_moments < 1:
            self.optimizer.scale_moments(self.config.optimiser.keep_moments)

    def done(self) -> bool:
        """Whether no step is left: :meth:`fit` then only evaluates, and writes the result again."""
        return self.progress.step >= self.config.steps and self.progress.flops >= self.config.min_flops

    def _train_step(self, decision: Decision) -> None:
        """One optimiser step. What it measured stays on the device, in ``_rows``."""
        c, p, n_loops, decided = self.config, self.progress, decision.n_loops, decision.n_grad_loops
        n_grad_loops = min((k for k in (c.n_grad_loops, decided) if k is not None), default=None)
        self._timer.start()
        batch = self.batches.part(self.task, p.step)
        loops = loops_of(batch, n_loops)
        lr = learning_rate(c.optimiser, p.step, c.steps, p.switch_step)
        micro_batch = self.micro_batches.of(n_loops)
        first_row = self.batches.own[0]
        loss = self._step.backward(batch.to(self.device), loops, micro_batch, n_grad_loops, p.step, first_row)
        grad_norm, skipped = self._step.update(loss, lr)
        if self.average is not None:
            self.average.update()
        self._timer.stop()

        self.signals = Signals(loss, grad_norm)
        self._tokens = enter_step(
            p, self.model, batch, loops, n_grad_loops, self.batches, self.ranks, bool(c.loop_loss)
        )
        measured = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        stage = 1 if n_loops == 1 < c.model.n_loops else 2
        chosen = {"n_loops": n_loops, "stage": stage, "skipped": skipped}
        if decided is not None:
            chosen["n_grad_loops"] = n_grad_loops
        self._rows.add({"kind": "train", "step": p.step, **measured, **chosen, **p.costs()})

    def _evaluate(self, n_loops: int) -> None:
        p = self.progress
        scores = self._scores(n_loops)
        if self.run is None:
            return
        p.last_eval = {"kind": "eval", "step": p.step, "n_loops": n_loops, **scores, **p.costs()}
        self._rows.add(p.last_eval)
        if self.console:
            self.console.evaluation(p.last_eval)

    def _scores(self, n_loops: int) -> dict[str, Any]:
        """What an evaluation finds: of rank 0 alone, unless it takes all ranks to have the weights."""
        c = self.config

        def score() -> dict[str, Any]:
            with self._averaged():
                scores = evaluate(
                    self.model,
                    self.task,
                    n_loops=n_loops,
                    n_samples=c.eval_samples,
                    batch_size=c.batch_size,
                    micro_batch=self.micro_batches.of(n_loops),
                    bf16=c.precision == "bf16",
                    backend=c.backend,
                    progress=self.ranks.sign_of_life,
                )
                self._parallel.release()
                return scores

        return score() if c.parallel == "fsdp" else self.ranks.from_first(score)

    def _peak(self) -> float | None:
        """FLOP/s of all devices together, if they are alike."""
        peak = matmul_peak(self.device, self.config.precision == "bf16")
        return None if peak is None else self.ranks.size * peak

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model has the weights that are to be used: the averaged ones, if there are any."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def _flush(self) -> None:
        """Read the pending rows off the device, write them, and give up if the run is beyond hope."""
        p = self.progress
        p.wall_s, p.cpu_s = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        rows, timing, hopeless, memory = self._rows.read(), [], None, memory_bytes(self.device)
        train_rows = [row for row in rows if row["kind"] == "train"]
        for row, ms in zip(train_rows, self._timer.read(), strict=True):
            p.train_s += ms / 1e3
            p.enter_skip(row["skipped"])
            if p.skips_in_row == MAX_SKIPS:
                hopeless = row
            clocks = {"elapsed_s": p.train_s, "wall_s": p.wall_s, "cpu_s": p.cpu_s}
            taken = {"tokens": self._tokens, "memory_bytes": memory}
            timing.append({"step": row["step"], "ms": ms, **clocks, **taken})
        if self.run is not None:
            self.run.write_rows(rows, timing)
            self.run.write_snapshots(self._snapshots.read())
        if self.console and timing and _due(p.step, self.config.log_every):
            flops = train_rows[-1]["flops"] - self._flops_seen
            self.console.train(train_rows[-1], Pace.of(timing, flops, self._peak()))
        self._flops_seen = p.flops
        if hopeless is not None:
            raise self._divergence(hopeless)

    def _divergence(self, row: Mapping[str, Any]) -> TrainingDiverged:
        """The error of a run whose steps were skipped up to a row's, with what one more pass finds."""
        batch = self.batches.part(self.task, row["step"] - 1)
        self._parallel.gather()
        where = culprit(self.model, batch, row, self.config, self.batches, self.ranks)
        return TrainingDiverged(
            f"loss or gradient norm was not finite in the {MAX_SKIPS} steps up to {row['step']}, which "
            f"changed no weight. {where} Lower optimiser.lr, or use precision = 'fp32'."
        )

    def _should_stop(self) -> bool:
        """Whether to stop after this step: all ranks or none, which takes a read, so not at every step."""
        if self.ranks.size > 1 and not _due(self.progress.step, self.config.log_every):
            return False
        return self.ranks.any(self._stop, self.device)

    def _save(self) -> None:
        self._flush()
        assert self.signals is not None, "only called after a step"
        state = {
            "progress": self.progress.state_dict(),
            "schedule": self.schedule.state_dict(),
            "signals": [self.signals.loss.item(), self.signals.grad_norm.item()],
            "micro_batches": self.micro_batches.state_dict(),
            "planned_steps": self._planned_steps,
            "n_loops": self._evaluated,
            "data": self.task.fingerprint,
        }
        run = self.run
        whole = self.ranks.from_first(lambda: {} if run is None else run.remembered(state))
        at = self.run_dir / CHECKPOINTS, self.progress.step
        self._parallel.save(*at, self.model, self.average, whole, self.config.keep)

    def _check_configs(self) -> None:
        """Refuse to start where the ranks were told different things."""
        first, *others = self.ranks.gather(self.config)
        for rank, other in enumerate(others, start=1):
            difference = differing_key(first, other.to_dict(), free=("device",))
            if difference is not None:
                key, ours, theirs = difference
                raise input_error(
                    "shift.Trainer", key, theirs, f"{ours!r} on rank {rank}, as on rank 0",
                    "Start all ranks with the same config.",
                )  # fmt: skip

    def _open(self, resume: bool) -> tuple[Path, Mapping[str, bytes]] | None:
        """Open the run directory; returns what the other ranks need of the checkpoint that is resumed."""
        run = RunDirectory(self.run_dir, self.config, self.ranks.size, self._extend)
        saved = None
        if resume:
            saved = run.resume(self._restore)
        else:
            run.start()
        self.run = run
        return None if saved is None else (saved.path, saved.files)

    def _restore(self, saved: Checkpoint) -> None:
        flag = " ".join(["--task.options", *(f"{name}=NEW" for name in self.task.paths)])
        saved.check_data("shift.Trainer", self.task, flag)
        saved.restore(self.model, self.optimizer, self.average)
        self._deal(saved.state["world_size"])
        with damage(saved.path / checkpoint.STATE):
            self.progress = Progress.from_state(saved.state["progress"])
            planned = saved.state.get("planned_steps", saved.state["config"]["steps"])
            if planned != self._planned_steps:
                self._planned_steps = planned
                self.schedule = build_schedule(dataclasses.replace(self.config, steps=planned))
            self.schedule.load_state_dict(saved.state["schedule"])
            self.micro_batches.load_state_dict(saved.state.get("micro_batches", {}))
            loss, grad_norm = (torch.tensor(float(x), device=self.device) for x in saved.state["signals"])
            self.signals = Signals(loss, grad_norm)
            if self.ranks.size == 1:  # a state that it can use; with others it may wait for them
                copy.deepcopy(self.schedule).step(self.progress.step, self.signals)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
