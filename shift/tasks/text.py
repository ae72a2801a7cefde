"""text: the next character of Python's own standard library, a language that every machine has."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shift.tasks.base import SPLITS, Batch, Task, to_batch

FIRST, LAST = 32, 126  # printable ASCII
OTHER = LAST - FIRST + 2  # after it and the newline
HELD_OUT = 0.1


class Text(Task):
    """Characters of the standard library's modules, in the order of their names; causal.

    tokens    printable ASCII 0 .. 94, newline 95, anything else 96
    targets   the next character
    groups    all positions are one

    The last tenth is held out. The text depends on the Python version: compare runs of one installation.

    Args:
        seed: of the data.
        length: characters in a sample.
    """

    name = "text"
    vocab_size = n_classes = OTHER + 1

    def __init__(self, seed: int = 0, length: int = 64) -> None:
        super().__init__(seed)
        self.max_seq_len = self.check_int("length", length, 2)
        self.characters = standard_library()
        cut = int(len(self.characters) * (1 - HELD_OUT))
        self.bounds = {"train": (0, cut), "eval": (cut, len(self.characters))}
        assert set(self.bounds) == set(SPLITS)

    def sample(self, rng: np.random.Generator, batch_size: int, step: int, split: str) -> Batch:
        low, high = self.bounds[split]
        start = rng.integers(low, high - self.max_seq_len, size=batch_size)
        windows = self.characters[start[:, None] + np.arange(self.max_seq_len + 1)]
        return to_batch(windows[:, :-1], windows[:, 1:])

    @staticmethod
    def encode(text: str) -> np.ndarray:
        """Token ids of characters, int64 [characters]."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.int64)
        ids = np.where((codes >= FIRST) & (codes <= LAST), codes - FIRST, OTHER)
        return np.where(codes == ord("\n"), OTHER - 1, ids)

    @staticmethod
    def decode(ids: Sequence[int]) -> str:
        """The characters of ids; what is none of the alphabet is U+FFFD."""
        known = {OTHER - 1: "\n", OTHER: "\ufffd"}
        return "".join(known.get(i, chr(FIRST + i)) for i in ids)


@functools.cache
def standard_library() -> np.ndarray:
    """All top-level modules of the standard library as token ids, int64 [characters]."""
    folder = Path(functools.__file__).parent
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py")))
    return Text.encode(text)
