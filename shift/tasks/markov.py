"""markov: a Markov language of known information content, half of it learnable by heart, half in context.

The idea of a Markov language with simple and complex samples, told apart by their information content, is
that of arXiv 2510.10089; this construction is ours.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from shift.tasks.base import SPLITS, Batch, Task, to_batch
from shift_kernels.errors import input_error


class Markov(Task):
    """Next-token prediction; causal.

    From a state s the next token is f(s) with probability ``follow``, else uniform over the alphabet. With
    probability 1/2 f is one map for the whole language, which weights can hold; else it is drawn anew for the
    sequence and has to be inferred from it. Targets are the tokens drawn, so nobody is expected to be
    right more often than :attr:`ceiling`.

    groups    "simple" and "complex": below or above the median of a sample's mean information content

    Args:
        seed: of the data and of the language's own map.
        vocab: size of the alphabet.
        length: tokens read by the model (one more is drawn, as the last target).
        follow: probability to follow f.
    """

    name = "markov"
    group_names = ("simple", "complex")

    def __init__(self, seed: int = 0, vocab: int = 8, length: int = 32, follow: float = 0.9) -> None:
        super().__init__(seed)
        self.vocab_size = self.n_classes = self.check_int("vocab", vocab, 2)
        self.max_seq_len = self.check_int("length", length, 2)
        if not (isinstance(follow, float) and 0 < follow < 1):
            raise input_error("task 'markov'", "follow", follow, "a float in (0, 1)", "Change the option.")
        self.follow = follow
        # Streams after those of the splits: no batch is drawn from them.
        self.language_map = np.random.default_rng([seed, len(SPLITS)]).integers(vocab, size=vocab)

    @property
    def ceiling(self) -> float:
        """The accuracy of a reader who knows f: 0.9125 by default."""
        return self.follow + (1 - self.follow) / self.vocab_size

    def sample(self, rng: np.random.Generator, batch_size: int, step: int, split: str) -> Batch:
        sequences = self.sequences(rng, batch_size)
        mean = self.information_content(sequences).mean(axis=1)
        is_complex = (mean > self.cut).astype(np.int64)
        return to_batch(sequences[:, :-1], sequences[:, 1:], is_complex[:, None])

    def sequences(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        """Tokens [batch, length + 1] drawn from the language."""
        v, rows = self.vocab_size, np.arange(batch_size)
        own = rng.integers(v, size=(batch_size, v))
        f = np.where(rng.random(batch_size)[:, None] < 0.5, self.language_map, own)
        tokens = rng.integers(v, size=(batch_size, self.max_seq_len + 1))
        follows = rng.random(tokens.shape) < self.follow
        for i in range(self.max_seq_len):
            tokens[:, i + 1] = np.where(follows[:, i + 1], f[rows, tokens[:, i]], tokens[:, i + 1])
        return tokens

    def information_content(self, tokens: np.ndarray) -> np.ndarray:
        """-log2 P(x_i | x_<i) under the language, in bits: float64 [batch, length], exact.

        P averages over what the reader cannot know, which kind of sequence it is and its map: for the
        sequence's own map, the posterior of f(s) = v after n transitions out of s, c of them to v, is
        proportional to hit^c * miss^(n - c), states being independent; the kind's posterior is updated by
        what each kind predicted. Long sequences do not overflow.

        Args:
            tokens: integers [batch, length], of any length.
        """
        hit, miss = self.ceiling, (1 - self.follow) / self.vocab_size
        states, following = tokens[:, :-1], tokens[:, 1:]
        # [i, j]: whether transition j, before i, left the state that transition i leaves.
        same = (states[:, :, None] == states[:, None]) & np.tri(states.shape[1], k=-1, dtype=bool)
        chosen = following[:, :, None] == np.arange(self.vocab_size)
        # How often each token was seen to follow: float64 [batch, length - 1, vocab].
        seen = same.astype(np.float64) @ chosen.astype(np.float64)
        weight = np.exp(np.log(hit / miss) * (seen - seen.max(axis=-1, keepdims=True)))
        posterior = np.take_along_axis(weight, following[:, :, None], axis=-1)[:, :, 0] / weight.sum(axis=-1)
        own = np.log(posterior * hit + (1 - posterior) * miss)
        known = np.log(np.where(self.language_map[states] == following, hit, miss))
        log_odds = np.zeros_like(own)  # own map against the language's, before each transition
        np.cumsum((own - known)[:, :-1], axis=1, out=log_odds[:, 1:])
        both = np.logaddexp(log_odds + own, known) - np.logaddexp(log_odds, 0)
        first = np.full((len(tokens), 1), np.log2(self.vocab_size))
        return np.concatenate([first, -both / np.log(2)], axis=1)

    @cached_property
    def cut(self) -> float:
        """Bits a token that tell simple samples from complex ones: the median of 4,096 samples."""
        reference = self.sequences(np.random.default_rng([self.seed, len(SPLITS) + 1]), 4096)
        parts = np.split(reference, 64)  # the memory taken grows with the square of the length
        return float(np.median([self.information_content(part).mean(axis=1) for part in parts]))
