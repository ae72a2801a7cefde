"""How good a model is on held-out samples of its task."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shift.tasks.base import IGNORE, Batch, Task

LOGITS = 2**26
"""Of a batch in evaluation, which needs them all: 256 MiB. A training loss goes by smaller chunks."""


def loops_of(batch: Batch, n_loops: int) -> int | Tensor:
    """The loops a batch runs when ``n_loops`` are allowed: each sample's own T(n) up to that, if it has one.

    T(n): Fan et al., arXiv 2409.15647, section 4. With one loop there is nothing to tell apart.
    """
    return n_loops if n_loops == 1 or batch.n_loops is None else batch.n_loops.clamp(max=n_loops)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    *,
    n_loops: int,
    n_samples: int,
    batch_size: int,
    micro_batch: int | None = None,
    bf16: bool = False,
    backend: str = "auto",
    split: str = "eval",
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Loss and accuracy over the read positions of ``n_samples`` held-out sequences, always the same ones.

    Args:
        model, task: to evaluate.
        n_loops: allowed; see :func:`loops_of`.
        n_samples: sequences.
        batch_size: sequences of a batch of the task, which decides which they are.
        micro_batch: of them, as many at once; None: all.
        bf16, backend: of the forward.
        split: of the task's data.
        progress: called before every forward.

    Returns:
        ``loss`` (mean cross-entropy, nats; None if not finite), ``accuracy`` (share of read positions right),
        ``exact`` (share of sequences with all read positions right) and ``groups`` (accuracy of each
        difficulty class that occurs); of text also ``bits_per_byte``, at the split's mean bytes a token. The
        device is waited for once, at the end.
    """
    device = next(model.parameters()).device
    n_groups = len(task.group_names)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    exact = torch.zeros((), dtype=torch.int64, device=device)
    seen = torch.zeros(n_groups + 1, dtype=torch.int64, device=device)  # [0]: positions nobody reads
    right = torch.zeros_like(seen)
    was_training = model.training
    model.eval()
    for batch in _batches(task, n_samples, batch_size, micro_batch or batch_size, split):
        progress()
        loops = loops_of(batch, n_loops)
        batch = batch.to(device)
        with autocast(device, bf16):
            logits = model(
                batch.tokens, loops, context=batch.context, cu_seqlens=batch.cu_seqlens, backend=backend
            )
        loss += F.cross_entropy(
            logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        read = batch.targets != IGNORE
        hit = logits.argmax(-1) == batch.targets
        exact += (hit | ~read).all(dim=1).sum()
        group = (batch.group + 1).flatten()
        seen.index_add_(0, group, read.flatten().long())
        right.index_add_(0, group, (read & hit).flatten().long())
    model.train(was_training)
    counts, hits = seen.tolist()[1:], right.tolist()[1:]
    nats = loss.item() / sum(counts) if loss.isfinite() else None
    of_text = {}
    if task.bytes_per_token is not None:
        of_text["bits_per_byte"] = None if nats is None else nats / math.log(2) / task.bytes_per_token
    return {
        "loss": nats,
        **of_text,
        "accuracy": sum(hits) / sum(counts),
        "exact": exact.item() / n_samples,
        "groups": {name: h / n for name, h, n in zip(task.group_names, hits, counts, strict=True) if n},
    }


def _batches(task: Task, n_samples: int, batch_size: int, most: int, split: str) -> Iterator[Batch]:
    """The held-out sequences, in batches of no more than ``most``, nor of more logits than :data:`LOGITS`."""
    for index, start in enumerate(range(0, n_samples, batch_size)):
        batch = task.batch(min(batch_size, n_samples - start), index, split=split)
        n, seq_len = batch.tokens.shape
        at_once = min(most, max(1, LOGITS // (seq_len * task.n_classes)))
        yield from (batch.rows(i, i + at_once) for i in range(0, n, at_once)) if at_once < n else [batch]


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    """bf16 matmuls around fp32 weights, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
