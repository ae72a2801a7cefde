"""Full-output prediction, the common format of the six tasks of Fan et al. (arXiv 2409.15647).

    tokens    question, "=", then EOS to the end of the tensor
    targets   nothing over the question; the answer starts AT the "=" and is followed by EOS to the end

Loss and exact match cover answer and trailing EOS, so the model must know where the answer ends. A sample of
length n needs T(n) loops. Lengths are uniform over 1 .. the current longest; with a curriculum that grows by
one every ``curriculum_interval`` steps from 1 to ``max_length``, and the tensors with it.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np

from shift.tasks.base import IGNORE, Batch, Task, to_batch

EOS = 3


class FullOutputTask(Task):
    """A task in this format; subclasses give the ids, the width and one sample's question and answer.

    Args:
        seed: of the data.
        max_length: the longest n in training; default as in their released configurations.
        eval_length: n of every sample in the split "eval"; 0: as in training.
        curriculum_interval: steps between two lengths of the curriculum; 0: all lengths from the start.
    """

    vocab_size = n_classes = 6
    eos = EOS
    default_max_length = 19
    length_limit: float = math.inf
    """The longest n whose answer the tensor is sure to hold."""

    def __init__(
        self,
        seed: int = 0,
        max_length: int | None = None,
        eval_length: int = 0,
        curriculum_interval: int = 0,
    ) -> None:
        super().__init__(seed)
        longest = self.default_max_length if max_length is None else max_length
        self.max_length = self.check_int("max_length", longest, 1, self.length_limit)
        self.eval_length = self.check_int("eval_length", eval_length, 0, self.length_limit)
        self.curriculum_interval = self.check_int("curriculum_interval", curriculum_interval, 0)
        self.max_seq_len = self.width(max(self.max_length, eval_length))

    @staticmethod
    @abstractmethod
    def width(longest: int) -> int:
        """Tokens in a tensor whose samples are at most ``longest`` long."""

    @abstractmethod
    def question_and_answer(self, rng: np.random.Generator, n: int) -> tuple[list[int], list[int], int]:
        """A sample of length n: the question with its "=" at the end, the answer, and T(n)."""

    def longest(self, step: int) -> int:
        """The longest n of a training step."""
        if not self.curriculum_interval:
            return self.max_length
        return min(1 + step // self.curriculum_interval, self.max_length)

    def sample(self, rng: np.random.Generator, batch_size: int, step: int, split: str) -> Batch:
        low, high = 1, self.longest(step) if split == "train" else self.max_length
        if split == "eval" and self.eval_length:
            low = high = self.eval_length
        shape = (batch_size, self.width(high))
        tokens, targets = np.full(shape, self.eos), np.full(shape, self.eos)
        n_loops = np.empty(batch_size)
        for i, n in enumerate(rng.integers(low, high + 1, size=batch_size)):
            question, answer, n_loops[i] = self.question_and_answer(rng, int(n))
            start = len(question) - 1  # of the answer: at the "="
            tokens[i, : len(question)] = question
            targets[i, :start] = IGNORE
            targets[i, start : start + len(answer)] = answer
        return to_batch(tokens, targets, n_loops=n_loops)


def bits(rng: np.random.Generator, n: int) -> list[int]:
    """n random bits."""
    return rng.integers(2, size=n).tolist()


def number(msb_first: list[int]) -> int:
    """The number that these bits write."""
    return int("".join(map(str, msb_first)), 2)


def lsb_first(value: int, n_bits: int) -> list[int]:
    """The lowest ``n_bits`` bits of a number, lowest first."""
    return [value >> i & 1 for i in range(n_bits)]
