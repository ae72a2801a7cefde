"""tokens: the next token of text that ``shift-data`` has made into shards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from shift.tasks.base import SPLITS, Batch, Task, to_batch
from shift.tasks.shards import Shard, TokenFolder
from shift_kernels.errors import input_error


class Tokens(Task):
    """Windows of ``seq_len`` tokens out of a folder of shards; causal.

    tokens    a window of a shard; windows follow each other and do not overlap
    targets   the token after each
    groups    all positions are one

    A split's windows are shuffled anew for every epoch and dealt out in that order: step s of R ranks with b
    samples each takes the R b windows from s R b on, rank r the r-th b of them. The same global batch on
    another number of ranks holds the same windows. The next batch is read by a thread meanwhile.

    Args:
        seed: of the order.
        path: a folder that ``shift-data`` wrote.
        seq_len: tokens in a window. What a shard's end leaves over is not read.
        packed: every document is a sequence of its own, which sees no other one (``cu_seqlens``); without it
            a window is one sequence, over the separators.
        verify: read all shards once at the start and compare their sha256.

    Raises:
        ShiftInputError: a damaged or unfinished folder, or a split without a window.
    """

    name = "tokens"
    paths = ("path",)

    def __init__(
        self, seed: int = 0, path: str = "", seq_len: int = 256, packed: bool = False, verify: bool = False
    ) -> None:
        super().__init__(seed)
        self.max_seq_len = self.check_int("seq_len", seq_len, 2)
        for option, value in {"packed": packed, "verify": verify}.items():
            if not isinstance(value, bool):
                raise input_error(f"task {self.name!r}", option, value, "true or false", "Change it.")
        if not path:
            raise input_error(
                f"task {self.name!r}", "path", path, "the folder of shards, which has no default",
                "Name one that shift-data wrote: --task.options path=FOLDER.",
            )  # fmt: skip
        self.folder = TokenFolder.open(path, verify=verify)
        self.vocab_size = self.n_classes = self.folder.vocab_size
        self.packed, self.fingerprint = packed, self.folder.fingerprint()
        held_out = functools.partial(self.folder.total, "eval")
        self.bytes_per_token = held_out("n_bytes") / max(1, held_out("n_tokens"))
        self._windows = {split: Windows(self.folder.shards[split], seq_len) for split in SPLITS}
        for split, windows in self._windows.items():
            if not len(windows):
                n_tokens = self.folder.total(split, "n_tokens")
                allowed = f"less than a shard of the split '{split}', which has {n_tokens} tokens in all"
                raise input_error(f"task {self.name!r}", "seq_len", seq_len, allowed, "Give it more text.")
        self._ahead = Ahead()

    def batch(
        self, batch_size: int, step: int, *, split: str = "train", rank: int = 0, n_ranks: int = 1
    ) -> Batch:
        self.check_batch(batch_size, step, split, rank)
        key = (batch_size, split, rank, max(n_ranks, rank + 1))
        return self._ahead.get(functools.partial(self._read, *key), step, key)

    def sample(self, rng: np.random.Generator, batch_size: int, step: int, split: str) -> Batch:
        """Windows are dealt out, not drawn: as :meth:`batch` of one rank."""
        return self._read(batch_size, split, 0, 1, step)

    def _read(self, batch_size: int, split: str, rank: int, n_ranks: int, step: int) -> Batch:
        windows = self._windows[split]
        first = (step * n_ranks + rank) * batch_size
        ids = np.stack([windows[i] for i in self._order(split, first, batch_size)])
        if ids.max() >= self.vocab_size:
            raise input_error(
                f"task {self.name!r}", "path", str(self.folder.path),
                f"shards whose ids are below {self.vocab_size}, their vocabulary", "Make it again.",
            )  # fmt: skip
        batch = to_batch(ids[:, :-1], ids[:, 1:])
        return batch if not self.packed else self._packed(batch)

    def _packed(self, batch: Batch) -> Batch:
        begins = batch.tokens == self.folder.separator
        begins[:, 0] = True
        offsets = begins.flatten().nonzero().flatten()
        end = torch.tensor([batch.tokens.numel()])
        return Batch(batch.tokens, batch.targets, batch.group, cu_seqlens=torch.cat([offsets, end]))

    def _order(self, split: str, first: int, count: int) -> np.ndarray:
        """Windows at places ``first`` to ``first + count`` of the endless order."""
        places = np.arange(first, first + count)
        epochs, within = np.divmod(places, len(self._windows[split]))
        key, count = (self.seed, SPLITS.index(split)), len(self._windows[split])
        return np.array([shuffled(*key, e, count)[i] for e, i in zip(epochs.tolist(), within, strict=True)])


@functools.lru_cache(maxsize=4)
def shuffled(seed: int, split: int, epoch: int, count: int) -> np.ndarray:
    """0 .. count - 1 in the order of an epoch."""
    return np.random.default_rng([seed, split, epoch]).permutation(count)


class Windows:
    """The windows of a split, numbered through its shards.

    Args:
        shards: in order.
        seq_len: a window has one token more, the last target.
    """

    def __init__(self, shards: tuple[Shard, ...], seq_len: int) -> None:
        self._tokens, self._seq_len = [shard.tokens for shard in shards], seq_len
        counts = [max(0, len(tokens) - 1) // seq_len for tokens in self._tokens]
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, window: int) -> np.ndarray:
        shard = int(np.searchsorted(self._first, window, side="right")) - 1
        start = int(window - self._first[shard]) * self._seq_len
        return np.asarray(self._tokens[shard][start : start + self._seq_len + 1])


class Ahead:
    """Calls a function of a step; a thread has then begun on the step after it."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: dict[tuple[Hashable, int], Future[Any]] = {}

    def get(self, read: Callable[[int], Any], step: int, key: Hashable) -> Any:
        """``read(step)``; calls with the same key are of the same function."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "shift-tokens")
        waiting = self._waiting.pop((key, step), None)
        # One a key: a caller that jumps leaves nothing behind.
        self._waiting = {k: future for k, future in self._waiting.items() if k[0] != key}
        value = read(step) if waiting is None else waiting.result()
        self._waiting[key, step + 1] = self._pool.submit(read, step + 1)
        return value
