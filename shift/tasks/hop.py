"""hop: pointer chasing. Position i holds f(i), f a random permutation; its answer is f applied k times."""

from __future__ import annotations

import numpy as np

from shift.tasks.base import Batch, Task, to_batch


class Hop(Task):
    """f^k(i) at every position i, non-causal.

    tokens    f(0) .. f(n-1), a uniform permutation
    context   k - 1, with k uniform in 1 .. max_hops
    groups    by k

    One pass can look up one or two hops; k hops in general take k dependent look-ups, or log2(k) doublings.

    Args:
        seed: of the data.
        n_nodes: n, also the sequence length.
        max_hops: the largest k.
    """

    name = "hop"
    causal = False

    def __init__(self, seed: int = 0, n_nodes: int = 12, max_hops: int = 4) -> None:
        super().__init__(seed)
        self.n_nodes = self.check_int("n_nodes", n_nodes, 2)
        self.max_hops = self.check_int("max_hops", max_hops, 1)
        self.vocab_size = self.n_classes = self.max_seq_len = n_nodes
        self.n_contexts = max_hops
        self.group_names = tuple(f"{k} hop{'s' * (k > 1)}" for k in range(1, max_hops + 1))

    def sample(self, rng: np.random.Generator, batch_size: int, step: int, split: str) -> Batch:
        f = rng.permuted(np.tile(np.arange(self.n_nodes), (batch_size, 1)), axis=1)
        context = rng.integers(self.max_hops, size=batch_size)
        answer = f
        for k in range(1, self.max_hops):
            answer = np.where(context[:, None] >= k, np.take_along_axis(f, answer, axis=1), answer)
        return to_batch(f, answer, context[:, None], context)
