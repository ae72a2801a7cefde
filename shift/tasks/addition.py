"""addition: of two binary numbers of equal length. Fan et al. (arXiv 2409.15647)."""

from __future__ import annotations

import numpy as np

from shift.tasks.full_output import FullOutputTask, bits, lsb_first, number

PLUS, EQUALS = 2, 5


class Addition(FullOutputTask):
    """a "+" b "=" -> the sum in n + 1 bits, highest first; T(n) = n, as in their code.

    Both operands have n bits, leading zeros included.
    """

    name = "addition"

    @staticmethod
    def width(longest: int) -> int:
        return 3 * (longest + 2)

    def question_and_answer(self, rng: np.random.Generator, n: int) -> tuple[list[int], list[int], int]:
        a, b = bits(rng, n), bits(rng, n)
        total = lsb_first(number(a) + number(b), n + 1)
        return [*a, PLUS, *b, EQUALS], total[::-1], n
