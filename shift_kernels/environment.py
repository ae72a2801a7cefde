"""Environment variables that hold one of a few words: a misspelt one is refused, as an argument would be."""

from __future__ import annotations

import os
from collections.abc import Sequence

from shift_kernels.errors import input_error, near_miss
from shift_kernels.torch_internals import constant_for_dynamo

_WORDS: dict[str, Sequence[str]] = {
    "SHIFT_KERNELS_STRICT": ("0", "1"),
    "SHIFT_KERNELS_CALIBRATE": ("first_use",),
}


def declare(variable: str, words: Sequence[str]) -> None:
    """A variable of which a backend knows the words."""
    _WORDS[variable] = words


def word_of(variable: str) -> str | None:
    """What an environment variable says; None where it is not set, or empty.

    Raises:
        ShiftInputError: a word that it has not.
    """
    word, words = os.environ.get(variable) or None, _WORDS[variable]
    if word is not None and word not in words:
        remedy = near_miss(word.lower(), words, "Unset it.")
        raise input_error("shift_kernels", variable, word, "one of " + ", ".join(map(repr, words)), remedy)
    return word


@constant_for_dynamo
def check_words() -> None:
    """Refuse a misspelt word in any of them: importing does not, so that a command can say it in a line.

    Raises:
        ShiftInputError: as :func:`word_of`.
    """
    for variable in _WORDS:
        word_of(variable)
