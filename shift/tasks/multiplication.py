"""multiplication: of a short binary number with a long one. Fan et al. (arXiv 2409.15647)."""

from __future__ import annotations

import numpy as np

from shift.tasks.full_output import FullOutputTask, bits, lsb_first, number

TIMES, EQUALS = 2, 5


class Multiplication(FullOutputTask):
    """a "*" b "=" -> the product in n1 + n bits, lowest first; a has n1 = 1 or 2 bits; T = n1 * n.

    n1 is uniform in evaluation, too; they test with n1 = 2 alone.
    """

    name = "multiplication"
    default_max_length = 11

    @staticmethod
    def width(longest: int) -> int:
        return 4 * (longest + 2)

    def question_and_answer(self, rng: np.random.Generator, n: int) -> tuple[list[int], list[int], int]:
        n1 = int(rng.integers(1, 3))
        a, b = bits(rng, n1), bits(rng, n)
        return [*a, TIMES, *b, EQUALS], lsb_first(number(a) * number(b), n1 + n), n1 * n
