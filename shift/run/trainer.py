"""The training loop: one run, from a config to a run directory.

    for each step:  ask the schedule for the number of loops; at a switch go back as far as it says
                    -> batch -> loss at the read positions -> gradients -> clip
                    -> AdamW, which the device skips by itself if anything is not finite

Nothing waits for the device but the reads of the metrics, once per ``log_every`` steps. A run that was
killed and resumed writes the same metrics, weights, optimiser and schedule state, byte for byte, as one that
was left alone (same machine, thread count and versions).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from shift.build import build_model, build_schedule, build_task, find_device
from shift.config import TrainConfig
from shift.flops import train_step_flops
from shift.run import checkpoint
from shift.run.directory import RunDirectory
from shift.run.evaluate import autocast, evaluate, loops_of
from shift.run.metrics import Console, PendingRows, StepTimer
from shift.run.optim import build_optimizer, learning_rate
from shift.run.snapshots import SnapshotRecorder
from shift.run.summary import batches_sha256, environment, switch_ms
from shift.schedules import Signals
from shift.tasks.base import IGNORE, Batch

MAX_SKIPS = 5
"""Skipped steps in a row after which a run stops: it will not recover by itself."""


class TrainingInterrupted(Exception):
    """:meth:`Trainer.stop` was called; a checkpoint was saved, and ``resume`` goes on from it."""


class TrainingDiverged(Exception):
    """Loss or gradient norm was not finite :data:`MAX_SKIPS` steps in a row."""


@dataclass
class Progress:
    """What a run has done so far; part of every checkpoint."""

    step: int = 0
    flops: int = 0
    block_applications: float = 0
    switch_step: int | None = None
    skipped_steps: int = 0
    skips_in_row: int = 0
    train_s: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    initial_weights_sha256: str = ""
    last_eval: dict[str, Any] = dataclasses.field(default_factory=dict)

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Progress:
        """What a checkpoint holds of it; older ones hold more."""
        known = {field.name for field in dataclasses.fields(Progress)}
        return Progress(**{key: value for key, value in state.items() if key in known})


class Trainer:
    """One training run.

    Args:
        config: what to run.
        run_dir: where to write; created if need be.
        resume: go on from the newest valid checkpoint in ``run_dir`` (from the start if there is none).
            Without it a directory that already holds a run is refused.
        console: where to report; None: nowhere.

    In a process group (``torchrun``) every rank builds one: the global batch is the concatenation of the
    ranks' batches, whose gradients are averaged as one flat tensor after the backward, and rank 0 writes.
    Seeds torch's global generator.

    Raises:
        ShiftInputError: an unusable config, a used directory, or a checkpoint of another config.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: str | Path,
        *,
        resume: bool = False,
        console: Console | None = None,
    ) -> None:
        distributed = dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self.config, self.console, self.device = config, console, find_device(config.device)
        self.task, self.schedule = build_task(config), build_schedule(config)
        self.model = build_model(config, self.task).to(self.device)
        self.optimizer = build_optimizer(self.model, config.optimiser)
        self._initial = self.optimizer.weights.clone() if self.schedule.keep < 1 else None
        self.signals: Signals | None = None
        self.progress = Progress(initial_weights_sha256=checkpoint.digest(self.model.state_dict()))
        self.run = RunDirectory(
            Path(run_dir), config, world_size=self.world_size, resume=resume, writes=self.rank == 0
        )
        if self.run.checkpoint is not None:
            self._restore(self.run.checkpoint)
        if self.world_size > 1:  # equal by their seed, if the machines are
            dist.broadcast(self.optimizer.weights, src=0)
            if self._initial is not None:
                dist.broadcast(self._initial, src=0)
        self._rows, self._timer, self._stop = PendingRows(), StepTimer(self.device), False
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
        self._train(progress)
        return self._finish() if self.rank == 0 else {}

    def _train(self, progress: Callable[[int, int], object] | None) -> None:
        c, p = self.config, self.progress
        self._started = time.perf_counter() - p.wall_s, time.process_time() - p.cpu_s
        while not self._done():
            decision = self.schedule.step(p.step, self.signals)
            n_loops = decision.n_loops
            for look in decision.looks:
                self._rows.add({"kind": "look", **dataclasses.asdict(look)})
            if decision.switched:
                p.switch_step = p.step
                if self._initial is not None:
                    self.optimizer.go_back(self._initial, decision.keep)
            if p.step == 0:
                self._evaluate(n_loops)
            self._snapshots.take(p.step)
            self._train_step(n_loops)

            last = self._done()
            if last:
                self._snapshots.take(p.step)
            if _due(p.step, c.log_every):
                self._flush()
            # Where the steps end, too: a run that goes on must not differ from one that was resumed there.
            ends = last or p.step == c.steps
            if ends or _due(p.step, c.eval_every):
                self._evaluate(n_loops)
            stop = self._should_stop()
            if ends or stop or _due(p.step, c.checkpoint_every):
                self._save()
            if progress is not None:
                progress(p.step, c.steps)
            if stop and not last:
                raise TrainingInterrupted(
                    f"stopped after step {p.step} of {c.steps}; resume goes on from there"
                )

    def _done(self) -> bool:
        return self.progress.step >= self.config.steps and self.progress.flops >= self.config.min_flops

    def _train_step(self, n_loops: int) -> None:
        """One optimiser step. What it measured stays on the device, in ``_rows``."""
        c, p = self.config, self.progress
        self._timer.start()
        batch = self.task.batch(c.batch_size, p.step, rank=self.rank)
        loops = loops_of(batch, n_loops)
        lr = learning_rate(c.optimiser, p.step, c.steps)
        loss = self._backward(batch.to(self.device), loops)
        grad_norm, skipped = self._update(loss, lr)
        self._timer.stop()

        self.signals = Signals(loss, grad_norm)
        p.step += 1
        self._count(batch, loops)
        measured = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        stage = 1 if n_loops == 1 < c.model.n_loops else 2
        chosen = {"n_loops": n_loops, "stage": stage, "skipped": skipped}
        self._rows.add({"kind": "train", "step": p.step, **measured, **chosen, **self._costs()})

    def _backward(self, batch: Batch, loops: int | torch.Tensor) -> torch.Tensor:
        """Leave the gradients of the global batch in the parameters; returns its loss."""
        c = self.config
        # Divided by the mean number of read positions of a rank, losses and gradients average over ranks to
        # those of the mean over all read positions, however uneven the ranks are.
        n_read = self._mean_over_ranks((batch.targets != IGNORE).sum(dtype=torch.float32))
        with autocast(self.device, c.precision == "bf16"):
            logits = self.model(
                batch.tokens, loops, context=batch.context, n_grad_loops=c.n_grad_loops, backend=c.backend
            )
        logits, targets = logits.float().flatten(0, 1), batch.targets.flatten()
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / n_read
        self.optimizer.zero_grad()
        loss.backward()
        # In one go, and after the backward: the block's gradients, most of all, are there at its end at once.
        self._mean_over_ranks(self.optimizer.gradients)
        return self._mean_over_ranks(loss.detach())

    def _update(self, loss: torch.Tensor, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Change the weights, unless loss or gradients are not finite; returns gradient norm, and whether."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        grad_norm = torch.linalg.vector_norm(self.optimizer.gradients)
        skipped = ~(loss + grad_norm).isfinite()  # neither is below 0, so that nothing cancels
        self.optimizer.clip_and_step(grad_norm, self.config.optimiser.clip, skipped)
        return grad_norm, skipped

    def _count(self, batch: Batch, loops: int | torch.Tensor) -> None:
        """Enter a step into the ledger. Loops of samples' own are averaged over all ranks."""
        c, p = self.config, self.progress
        most = c.n_grad_loops or math.inf
        mean_loops: float
        grad_loops: float
        if isinstance(loops, int):
            mean_loops, grad_loops = loops, min(loops, most)
        else:  # on the CPU, where the processes of torchrun talk by gloo: nothing waits for the device
            own = loops.double()
            means = torch.stack([own.mean(), own.clamp(max=most).mean()])
            mean_loops, grad_loops = self._mean_over_ranks(means).tolist()
        p.block_applications += mean_loops
        batch_size, seq_len = batch.tokens.shape
        flops = train_step_flops(self.model, batch_size, seq_len, mean_loops, grad_loops)
        p.flops += self.world_size * flops
        self._tokens = self.world_size * batch.tokens.numel()

    def _mean_over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """In place."""
        if self.world_size > 1:
            dist.all_reduce(x)
            x /= self.world_size
        return x

    def _costs(self) -> dict[str, Any]:
        return {"flops": self.progress.flops, "block_applications": self.progress.block_applications}

    def _evaluate(self, n_loops: int) -> None:
        c, p = self.config, self.progress
        if self.rank > 0:
            return
        scores = evaluate(
            self.model,
            self.task,
            n_loops=n_loops,
            n_samples=c.eval_samples,
            batch_size=c.batch_size,
            bf16=c.precision == "bf16",
            backend=c.backend,
        )
        p.last_eval = {"kind": "eval", "step": p.step, "n_loops": n_loops, **scores, **self._costs()}
        self._rows.add(p.last_eval)
        if self.console:
            self.console.evaluation(p.last_eval)

    def _flush(self) -> None:
        """Read the pending rows off the device, write them, and give up if the run is beyond hope."""
        p = self.progress
        p.wall_s, p.cpu_s = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        rows, timing, hopeless_at = self._rows.read(), [], None
        train_rows = [row for row in rows if row["kind"] == "train"]
        for row, ms in zip(train_rows, self._timer.read(), strict=True):
            p.train_s += ms / 1e3
            p.skipped_steps += row["skipped"]
            p.skips_in_row = p.skips_in_row + 1 if row["skipped"] else 0
            if p.skips_in_row == MAX_SKIPS:
                hopeless_at = row["step"]
            clocks = {"elapsed_s": p.train_s, "wall_s": p.wall_s, "cpu_s": p.cpu_s}
            timing.append({"step": row["step"], "ms": ms, **clocks})
        self.run.write_rows(rows, timing)
        self.run.write_snapshots(self._snapshots.read())
        if self.console and timing and _due(p.step, self.config.log_every):
            self.console.train(train_rows[-1], sum(t["ms"] for t in timing) / len(timing), self._tokens)
        if hopeless_at is not None:
            raise TrainingDiverged(
                f"loss or gradient norm was not finite in the {MAX_SKIPS} steps up to {hopeless_at}, which "
                f"changed no weight. Lower optimiser.lr, or use precision = 'fp32'."
            )

    def _should_stop(self) -> bool:
        """Whether to stop after this step: all ranks or none, which takes a read, so not at every step."""
        if self.world_size == 1:
            return self._stop
        if not _due(self.progress.step, self.config.log_every):
            return False
        return bool(self._mean_over_ranks(torch.tensor(float(self._stop), device=self.device)))

    def _save(self) -> None:
        self._flush()
        assert self.signals is not None, "only called after a step"
        state = {
            "progress": dataclasses.asdict(self.progress),
            "schedule": self.schedule.state_dict(),
            "signals": [self.signals.loss.item(), self.signals.grad_norm.item()],
        }
        self.run.save(self.progress.step, self.model, self.optimizer, state)

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        saved.restore(self.model, self.optimizer)
        self.progress = Progress.from_state(saved.state["progress"])
        self.schedule.load_state_dict(saved.state["schedule"])
        loss, grad_norm = (torch.tensor(x, device=self.device) for x in saved.state["signals"])
        self.signals = Signals(loss, grad_norm)

    def _finish(self) -> dict[str, Any]:
        c, p = self.config, self.progress
        first, last = range(min(10, c.steps)), range(max(0, c.steps - 10), c.steps)
        result = {
            "steps": p.step,
            "switch_step": p.switch_step,
            "final_eval": p.last_eval,
            "flops_total": p.flops,
            "block_applications": p.block_applications,
            "skipped_steps": p.skipped_steps,
            "train_s": p.train_s,
            "wall_s": p.wall_s,
            "cpu_s": p.cpu_s,
            "switch_ms": switch_ms(self.run.path, p.switch_step),
            "initial_weights_sha256": p.initial_weights_sha256,
            "weights_sha256": checkpoint.digest(self.model.state_dict()),
            "optimizer_sha256": checkpoint.digest(self.optimizer.state_dict()),
            "schedule_sha256": checkpoint.digest(self.schedule.state_dict()),
            "metrics_sha256": self.run.metrics_sha256(),
            "first_batches_sha256": batches_sha256(self.task, c.batch_size, first, self.world_size),
            "last_batches_sha256": batches_sha256(self.task, c.batch_size, last, self.world_size),
            "config": c.to_dict(),
            "world_size": self.world_size,
            **environment(self.device),
        }
        self.run.finish(result)
        return result


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
