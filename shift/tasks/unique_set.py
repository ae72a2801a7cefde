"""unique_set: the distinct values, in order of appearance. Fan et al. (arXiv 2409.15647)."""

from __future__ import annotations

import numpy as np

from shift.tasks.full_output import FullOutputTask

N_VALUES, EQUALS, EOS = 50, 51, 53


class UniqueSet(FullOutputTask):
    """v_1 .. v_n "=" -> each value once; ids 0 .. 49 are values; T(n) = n."""

    name = "unique_set"
    vocab_size = n_classes = 60
    eos = EOS

    @staticmethod
    def width(longest: int) -> int:
        return 2 * (longest + 2)

    def question_and_answer(self, rng: np.random.Generator, n: int) -> tuple[list[int], list[int], int]:
        values = rng.integers(N_VALUES, size=n).tolist()
        return [*values, EQUALS], list(dict.fromkeys(values)), n
