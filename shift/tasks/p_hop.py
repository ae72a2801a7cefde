"""p_hop: induction applied p times (Sanford, Hsu, Telgarsky, arXiv 2402.09268)."""

from __future__ import annotations

import numpy as np

from shift.tasks.base import IGNORE, Batch, Task, to_batch


class PHop(Task):
    """The token that p jumps back lead to, at every position; causal.

    One jump goes from position i to find(i) = j + 1, where j < i is the last earlier position that holds the
    same token: to what followed the current token when it was last seen. The answer at i is the token at
    find applied p times; positions from which a jump leads nowhere are not read.

    tokens    uniform over the alphabet
    context   p - 1, with p uniform in 1 .. max_hops
    groups    by p

    Args:
        seed: of the data.
        vocab: size of the alphabet.
        length: of the sequence.
        max_hops: the largest p.
    """

    name = "p_hop"

    def __init__(self, seed: int = 0, vocab: int = 4, length: int = 32, max_hops: int = 3) -> None:
        super().__init__(seed)
        self.vocab_size = self.n_classes = self.check_int("vocab", vocab, 2)
        self.max_seq_len = self.check_int("length", length, 2)
        self.n_contexts = self.check_int("max_hops", max_hops, 1)
        self.group_names = tuple(f"{p} hop{'s' * (p > 1)}" for p in range(1, max_hops + 1))

    def sample(self, rng: np.random.Generator, batch_size: int, step: int, split: str) -> Batch:
        tokens = rng.integers(self.vocab_size, size=(batch_size, self.max_seq_len))
        context = rng.integers(self.n_contexts, size=batch_size)
        find = self.find(tokens)
        # Column 0 of the padded table is "nowhere", which leads to itself.
        table = np.concatenate([np.zeros((batch_size, 1), dtype=np.int64), find + 1], axis=1)
        at = table[:, 1:]
        for p in range(1, self.n_contexts):
            at = np.where(context[:, None] >= p, np.take_along_axis(table, at, axis=1), at)
        answer = np.take_along_axis(tokens, np.maximum(at - 1, 0), axis=1)
        return to_batch(tokens, np.where(at == 0, IGNORE, answer), context[:, None], context)

    @staticmethod
    def find(tokens: np.ndarray) -> np.ndarray:
        """The position after each token's previous occurrence, [batch, length]; -1 where there is none."""
        batch, length = tokens.shape
        last = np.full((batch, tokens.max(initial=0) + 1), -2)
        rows = np.arange(batch)
        find = np.empty((batch, length), dtype=np.int64)
        for i in range(length):
            find[:, i] = last[rows, tokens[:, i]] + 1
            last[rows, tokens[:, i]] = i
        return find
