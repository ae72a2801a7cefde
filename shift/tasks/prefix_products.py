"""prefix_products: the running product of permutations, the textbook problem that needs depth."""

from __future__ import annotations

import itertools
import math

import numpy as np

from shift.tasks.base import Batch, Task, to_batch


class PrefixProducts(Task):
    """g_1 g_2 .. g_i at every position i, causal; g uniform over the permutations of ``n_items``.

    tokens    indices of g_1 .. g_length among all permutations in lexicographic order
    targets   the index of the product, where g h means: first g, then h
    groups    by quarters of the sequence: later positions need longer products

    For five items or more no constant-depth transformer of fixed precision is known to solve all lengths
    (the word problem of S5); three items are the smallest group whose order of factors matters.

    Args:
        seed: of the data.
        n_items: what is permuted, 2 to 5.
        length: of the sequence, at least 4.
    """

    name = "prefix_products"
    group_names = ("first quarter", "second quarter", "third quarter", "last quarter")

    def __init__(self, seed: int = 0, n_items: int = 3, length: int = 8) -> None:
        super().__init__(seed)
        self.check_int("n_items", n_items, 2, 5)
        self.max_seq_len = self.check_int("length", length, 4)
        self.vocab_size = self.n_classes = math.factorial(n_items)
        all_of_them = list(itertools.permutations(range(n_items)))
        index = {p: i for i, p in enumerate(all_of_them)}
        self.table = np.array(
            [[index[tuple(h[i] for i in g)] for h in all_of_them] for g in all_of_them], dtype=np.int64
        )

    def sample(self, rng: np.random.Generator, batch_size: int, step: int, split: str) -> Batch:
        tokens = rng.integers(self.vocab_size, size=(batch_size, self.max_seq_len))
        products = tokens.copy()
        for i in range(1, self.max_seq_len):
            products[:, i] = self.table[products[:, i - 1], tokens[:, i]]
        return to_batch(tokens, products, np.arange(self.max_seq_len) * 4 // self.max_seq_len)
