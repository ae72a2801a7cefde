"""binary_sum: how many ones? Fan et al. (arXiv 2409.15647)."""

from __future__ import annotations

import numpy as np

from shift.tasks.full_output import FullOutputTask, bits, lsb_first

EQUALS = 5


class BinarySum(FullOutputTask):
    """b_1 .. b_n "=" -> the number of ones, lowest bit first, no leading zeros (0: empty); T(n) = n."""

    name = "binary_sum"
    length_limit = 511  # nine places are left from the "=" of the longest sample on

    @staticmethod
    def width(longest: int) -> int:
        return longest + 9

    def question_and_answer(self, rng: np.random.Generator, n: int) -> tuple[list[int], list[int], int]:
        b = bits(rng, n)
        return [*b, EQUALS], lsb_first(sum(b), sum(b).bit_length()), n
