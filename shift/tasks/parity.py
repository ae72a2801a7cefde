"""parity: is the number of ones odd? Fan et al. (arXiv 2409.15647)."""

from __future__ import annotations

import numpy as np

from shift.tasks.full_output import FullOutputTask, bits

EQUALS = 2


class Parity(FullOutputTask):
    """b_1 .. b_n "=" -> the sum mod 2; T(n) = n."""

    name = "parity"
    default_max_length = 20

    @staticmethod
    def width(longest: int) -> int:
        return longest + 2

    def question_and_answer(self, rng: np.random.Generator, n: int) -> tuple[list[int], list[int], int]:
        b = bits(rng, n)
        return [*b, EQUALS], [sum(b) % 2], n
