"""What a task is: batches on the fly, each a function of (seed, split, step, rank) alone.

There is no iterator state to lose: a resumed run asks for the steps that are left and gets them.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shift_kernels.errors import input_error

IGNORE = -100
"""Target where no answer is read; torch's cross-entropy skips it by default."""

SPLITS = ("train", "eval")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples with their answers.

    Args:
        tokens: int64 [batch, seq_len].
        targets: int64 [batch, seq_len]; :data:`IGNORE` where no answer is read.
        group: int64 [batch, seq_len], index into the task's ``group_names``; -1 where no answer is read.
        context: int64 [batch] in [0, n_contexts), what is asked of the sample; None without contexts.
        n_loops: int64 [batch], Fan et al.'s T(n): the loops this sample needs; None if the task has none.
        cu_seqlens: int64 [n_sequences + 1], offsets of the sequences in the rows laid end to end, where a row
            holds several; every row begins one. On the CPU, where kernels read it. None: a row is a sequence.
    """

    tokens: Tensor
    targets: Tensor
    group: Tensor
    context: Tensor | None = None
    n_loops: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The batch with all tensors on ``device``."""

        def moved(x: Tensor) -> Tensor:
            # From pinned memory, or the copy would wait for what the GPU is doing.
            return x.pin_memory().to(device, non_blocking=True) if on_gpu else x.to(device)

        on_gpu = torch.device(device).type == "cuda"
        tensors = {k: moved(x) for k, x in vars(self).items() if x is not None and k != "cu_seqlens"}
        return dataclasses.replace(self, **tensors)

    def rows(self, start: int, stop: int) -> Batch:
        """The samples from ``start`` to below ``stop``."""
        parts = {k: x[start:stop] for k, x in vars(self).items() if x is not None and k != "cu_seqlens"}
        if self.cu_seqlens is not None:
            low, high = (n * self.tokens.shape[1] for n in (start, min(stop, len(self.tokens))))
            first, last = torch.searchsorted(self.cu_seqlens, torch.tensor([low, high])).tolist()
            parts["cu_seqlens"] = self.cu_seqlens[first : last + 1] - low
        return dataclasses.replace(self, **parts)


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of equal sequence lengths, one behind the other."""
    first = batches[0]
    if len(batches) == 1:
        return first
    parts = {
        k: torch.cat([getattr(batch, k) for batch in batches])
        for k, x in vars(first).items()
        if x is not None and k != "cu_seqlens"
    }
    if first.cu_seqlens is not None:
        offsets, end = [first.cu_seqlens[:1]], 0
        for batch in batches:
            assert batch.cu_seqlens is not None, "all or none are packed"
            offsets.append(batch.cu_seqlens[1:] + end)
            end += batch.tokens.numel()
        parts["cu_seqlens"] = torch.cat(offsets)
    return dataclasses.replace(first, **parts)


class Task(ABC):
    """A source of batches. Subclasses set the sizes and write :meth:`sample`.

    Args:
        seed: of the data.
    """

    name: str
    vocab_size: int
    n_classes: int
    max_seq_len: int
    n_contexts: int = 0
    causal: bool = True
    group_names: tuple[str, ...] = ("all",)
    bytes_per_token: float | None = None
    """UTF-8 bytes of held-out text that a token stands for, on average; None where tokens are not text."""
    fingerprint: str = ""
    """Of data that lies in files: a run goes on with the same alone."""
    paths: tuple[str, ...] = ()
    """Options that name these files, or their folder: with the same fingerprint they may have moved."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = self.check_int("seed", seed, 0)

    def batch(
        self, batch_size: int, step: int, *, split: str = "train", rank: int = 0, n_ranks: int = 1
    ) -> Batch:
        """The batch of this step and rank: the same on any machine, in any order of calls.

        Args:
            batch_size: samples.
            step: optimiser step in training, index of the batch in evaluation.
            split: "train" or "eval"; each draws from its own random streams.
            rank: of the process; every rank draws its own samples.
            n_ranks: that share the global batch, where a task deals it out instead.

        Raises:
            ShiftInputError: a size, step, rank or split outside these.
        """
        self.check_batch(batch_size, step, split, rank)
        rng = np.random.default_rng([self.seed, SPLITS.index(split), step, rank])
        return self.sample(rng, batch_size, step, split)

    def check_batch(self, batch_size: int, step: int, split: str, rank: int) -> None:
        """Refuse unusable arguments of :meth:`batch`."""
        self.check_int("batch_size", batch_size, 1)
        self.check_int("step", step, 0)
        self.check_int("rank", rank, 0)
        if split not in SPLITS:
            raise input_error(
                f"{self.name}.batch", "split", split, " or ".join(map(repr, SPLITS)), "Check the spelling."
            )

    @abstractmethod
    def sample(self, rng: np.random.Generator, batch_size: int, step: int, split: str) -> Batch:
        """``batch_size`` samples. All randomness comes from ``rng``; step and split only choose lengths."""

    def check_int(self, argument: str, value: int, low: int, high: float = math.inf) -> int:
        """The value of an argument, if it is an int in ``low`` .. ``high``.

        Raises:
            ShiftInputError: it is not.
        """
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            allowed = f"an int >= {low}" if high == math.inf else f"an int in {low} .. {high}"
            raise input_error(f"task {self.name!r}", argument, value, allowed, "Change it.")
        return int(value)


def to_batch(
    tokens: np.ndarray,
    targets: np.ndarray,
    group: np.ndarray | int = 0,
    context: np.ndarray | None = None,
    n_loops: np.ndarray | None = None,
) -> Batch:
    """A :class:`Batch` of numpy arrays; ``group`` is broadcast over positions and blanked where unread."""

    def tensor(a: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64))

    return Batch(
        tensor(tokens),
        tensor(targets),
        tensor(np.where(targets == IGNORE, -1, group)),
        None if context is None else tensor(context),
        None if n_loops is None else tensor(n_loops),
    )
