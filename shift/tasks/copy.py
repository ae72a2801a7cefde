"""copy: say it again. Fan et al. (arXiv 2409.15647)."""

from __future__ import annotations

import numpy as np

from shift.tasks.full_output import FullOutputTask, bits

EQUALS = 2


class Copy(FullOutputTask):
    """b_1 .. b_n "=" -> b_1 .. b_n; T(n) = n."""

    name = "copy"

    @staticmethod
    def width(longest: int) -> int:
        return 2 * (longest + 2)

    def question_and_answer(self, rng: np.random.Generator, n: int) -> tuple[list[int], list[int], int]:
        b = bits(rng, n)
        return [*b, EQUALS], b, n
