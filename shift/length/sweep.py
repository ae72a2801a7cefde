"""How right a trained model is by length and by number of loops, beyond those of its training too.

One pass of ``max_loops`` loops gives the answer after each; with branches times 1/T each has a pass of its
own. The :data:`RULES` then say which one counts. T(n), the loops that a task says a length needs, and the
first two confidence rules: Fan et al., arXiv 2409.15647. An answer is the surer, the less the cross-entropy
between its logits and their own argmax, mean over its positions. The budget is that of arXiv 2607.20594
(abstract): loops in proportion to the length.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shift.build import build_task
from shift.checked import Checked, whole, wholes
from shift.config import TrainConfig
from shift.model import LoopedTransformer
from shift.run.evaluate import autocast
from shift.tasks import make_task
from shift.tasks.base import IGNORE, Batch, Task
from shift.tasks.full_output import FullOutputTask
from shift.trained import newest, restored, trained_loops
from shift_kernels.errors import input_error
from shift_kernels.spec import MAX_LOOPS, MAX_TOKENS, ONE_OVER_T

RULES = {
    "as trained": "each sample runs T(n) loops, up to what training allowed",
    "oracle": "each sample runs T(n) loops; a task that has no T(n) has no oracle",
    "confidence": "each sample stops at the loop, of all that were run, after which its answer is surest",
    "joint confidence": "all samples of a length stop at the loop after which their mean answer is surest",
    "stable confidence": "the same of each sample, among the loops that left its answer as it was",
    "budget": "ceil(n / v) loops for length n, v being the longest length over the most loops of training",
}

LENGTHS = 8
"""Lengths, and loops beyond the largest T(n), that are tried unless told."""
LOOPS_BEYOND = 10


@dataclass(frozen=True)
class SweepConfig(Checked):
    """What to try."""

    lengths: tuple[int, ...] = wholes((), 1, MAX_TOKENS)
    """Lengths n; none: eight, up to twice the longest of training. Tasks without lengths take none."""
    max_loops: int | None = whole(None, 1, MAX_LOOPS)
    """Most loops; default: ten more than the largest T(n), or twice training's."""
    samples: int = whole(256, 1)
    """Held-out sequences of each length."""


def sweep(run_dir: Path, config: SweepConfig, data: Path | None = None) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, on the device that the run names.

    Args:
        run_dir: of the run.
        config: what to try.
        data: where the data lies that it was trained on; None: where it lay then.

    Returns:
        Plain JSON values: ``step`` of the checkpoint; ``trained_length`` (None for tasks without lengths);
        ``trained_loops``, as allowed when the run was last evaluated; ``max_loops``; and ``rows``, one a
        length: ``length``, ``needed`` (mean T(n)), ``exact`` and ``accuracy`` after each number of loops
        (lists; what they mean: :func:`shift.run.evaluate.evaluate`), of text ``bits_per_byte`` too, and
        ``rules``: by the name of the rule ``exact``, ``accuracy`` and ``loops`` (mean).

    Raises:
        ShiftInputError: no run or checkpoint there, lengths that the task or the model cannot take, or too
            few loops for what the rules ask.
    """
    run, saved = newest("sweep", run_dir, data)
    loops = trained_loops(saved)
    tasks = _tasks(run, config.lengths)
    batches = {n: _batches(task, config.samples, run.batch_size) for n, task in tasks.items()}
    max_loops = _max_loops(config.max_loops, batches.values(), loops)
    longest = max(tasks.values(), key=lambda task: task.max_seq_len)
    longest_trained = getattr(longest, "max_length", None)
    model = restored("sweep", run, saved, None if run.model.learned_positions else longest)
    return {
        "run": str(run_dir),
        "config": run.to_dict(),
        "step": saved.state["step"],
        "samples": config.samples,
        "trained_length": longest_trained,
        "trained_loops": loops,
        "max_loops": max_loops,
        "rows": [
            _row(model, batches[n], n, (loops, longest_trained), max_loops, run, task.bytes_per_token)
            for n, task in tasks.items()
        ],
    }


def _tasks(run: TrainConfig, lengths: tuple[int, ...]) -> dict[int | None, Task]:
    """The task at each length; a task without lengths once, under None."""
    trained = build_task(run)
    if not isinstance(trained, FullOutputTask):
        if lengths:
            raise input_error(
                "sweep", "lengths", lengths, f"none: {trained.name!r} has samples of one length", "Drop it."
            )
        return {None: trained}
    most = 2 * trained.max_length
    if run.model.learned_positions:
        most = max(trained.max_length, trained.eval_length)
    lengths = lengths or tuple(sorted({max(1, round(most * i / LENGTHS)) for i in range(1, LENGTHS + 1)}))
    if run.model.learned_positions and max(lengths) > most:
        raise input_error(
            "sweep", "lengths", lengths, f"at most {most}, where its learned positions end",
            "Train with model.learned_positions = false.",
        )  # fmt: skip
    options = {n: {**run.task.options, "eval_length": n} for n in lengths}
    return {n: make_task(run.task.name, seed=run.task.seed, **options[n]) for n in lengths}


def _batches(task: Task, n_samples: int, batch_size: int) -> list[Batch]:
    sizes = [min(batch_size, n_samples - start) for start in range(0, n_samples, batch_size)]
    return [task.batch(size, i, split="eval") for i, size in enumerate(sizes)]


def _max_loops(asked: int | None, batches: Collection[list[Batch]], trained_loops: int) -> int:
    own = [int(b.n_loops.max()) for found in batches for b in found if b.n_loops is not None]
    least = max(own, default=trained_loops)
    if asked is not None and asked < least:
        raise input_error("sweep", "max_loops", asked, f"at least {least}, which the rules ask", "Raise it.")
    return asked or (least + LOOPS_BEYOND if own else 2 * least)


class _Answers(NamedTuple):
    """Of the answers after each loop, [max_loops, batch]; after one, [batch]."""

    right: Tensor
    """Read positions that are right."""
    surprise: Tensor
    """The cross-entropy between the logits and their own argmax, mean over read positions."""
    loss: Tensor
    """That between the logits and the targets, summed."""
    stays: Tensor
    """Whether the answer is that after the loop before; False after the first."""


@torch.no_grad()
def _score_batch(model: LoopedTransformer, batch: Batch, max_loops: int, run: TrainConfig) -> _Answers:
    """What there is to say of the answers of a batch, on the CPU."""
    device = next(model.parameters()).device
    there = batch.to(device)
    with autocast(device, run.precision == "bf16"):
        each: list[_Answers] = []
        before = None
        for after in _states(model, there, max_loops, run):  # logits of all loops might be too much
            answers, before = _score_loop(model.read(after), there, before)
            each.append(answers)
    return _Answers(*(torch.stack(found).cpu() for found in zip(*each, strict=True)))


def _states(model: LoopedTransformer, batch: Batch, max_loops: int, run: TrainConfig) -> Iterator[Tensor]:
    """The states after 1, 2, .., ``max_loops`` loops, [batch, seq_len, d_model] each."""

    def of(n_loops: int, return_all_loops: bool) -> Tensor:
        return model.states(
            batch.tokens,
            n_loops,
            context=batch.context,
            cu_seqlens=batch.cu_seqlens,
            return_all_loops=return_all_loops,
            backend=run.backend,
        )

    if run.model.residual_scale == ONE_OVER_T:
        # The first t loops of more are no answer here: their branches are not scaled by 1/t.
        return (of(t, return_all_loops=False) for t in range(1, max_loops + 1))
    return iter(of(max_loops, return_all_loops=True))


def _score_loop(logits: Tensor, batch: Batch, before: Tensor | None) -> tuple[_Answers, Tensor]:
    """The scores after one loop, and its answers, given those after the loop before."""
    read = batch.targets != IGNORE
    answer = logits.argmax(-1)
    stays = read.new_zeros(len(read)) if before is None else ((answer == before) | ~read).all(-1)
    right = (read & (answer == batch.targets)).sum(-1)
    log_p = logits.float().log_softmax(-1)
    loss = -log_p.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
    surprise = (-log_p.amax(-1) * read).sum(-1) / read.sum(-1)
    return _Answers(right, surprise, (loss * read).sum(-1), stays), answer


def _chosen(
    answers: _Answers, batches: list[Batch], trained: tuple[int, int | None], length: int | None
) -> dict[str, Tensor]:
    """The loops of each sample by each rule that can be followed, int64 [samples].

    Args:
        answers: of all samples.
        batches: that they are from.
        trained: the most loops and the longest length of training; None: samples have no length.
        length: of the samples.
    """
    trained_loops, longest = trained
    surprise = answers.surprise
    max_loops, n = surprise.shape
    own = [batch.n_loops for batch in batches if batch.n_loops is not None]
    loops = {"as trained": torch.full((n,), trained_loops)}
    if own:
        oracle = torch.cat(own)
        loops = {"as trained": oracle.clamp(max=trained_loops), "oracle": oracle}
    loops["confidence"] = surprise.argmin(0) + 1
    loops["joint confidence"] = (surprise.mean(1).argmin() + 1).expand(n)
    unstable = ~answers.stays & answers.stays.any(0)  # where no answer ever stays, all loops count
    loops["stable confidence"] = surprise.masked_fill(unstable, math.inf).argmin(0) + 1
    if length is not None and longest is not None:
        budget = math.ceil(length * trained_loops / longest)
        loops["budget"] = torch.full((n,), min(budget, max_loops))
    return loops


def _row(
    model: LoopedTransformer,
    batches: list[Batch],
    length: int | None,
    trained: tuple[int, int | None],
    max_loops: int,
    run: TrainConfig,
    bytes_per_token: float | None,
) -> dict[str, Any]:
    """One row of :func:`sweep`."""
    found = [_score_batch(model, batch, max_loops, run) for batch in batches]
    answers = _Answers(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))
    read = torch.cat([(batch.targets != IGNORE).sum(-1) for batch in batches])
    loops = _chosen(answers, batches, trained, length)
    rules = {}
    for rule, chosen in loops.items():
        exact, accuracy = _exact_and_accuracy(answers.right.gather(0, chosen[None] - 1), read)
        rules[rule] = {"exact": exact[0], "accuracy": accuracy[0], "loops": chosen.double().mean().item()}
    exact, accuracy = _exact_and_accuracy(answers.right, read)
    needed = loops["oracle"].double().mean().item() if "oracle" in loops else None
    of_text = {}
    if bytes_per_token is not None:
        nats = answers.loss.sum(1).double() / read.sum()
        of_text["bits_per_byte"] = (nats / math.log(2) / bytes_per_token).tolist()
    row = {"length": length, "needed": needed, "exact": exact, "accuracy": accuracy}
    return {**row, **of_text, "rules": rules}


def _exact_and_accuracy(right: Tensor, read: Tensor) -> tuple[list[float], list[float]]:
    """Exact match and token accuracy, one of each for every row of ``right`` [rows, samples]."""
    exact = (right == read).double().mean(1)
    return exact.tolist(), (right.sum(1).double() / read.sum()).tolist()
