"""Environment variables that hold one of a few words: a misspelt one is refused, as an argument would be."""

from __future__ import annotations

import os
from collections.abc import Sequence

from shift_kernels.errors import input_error, near_miss


def word_of(variable: str, choices: Sequence[str]) -> str | None:
    """What an environment variable says; None where it is not set, or empty.

    Raises:
        ShiftInputError: another word.
    """
    word = os.environ.get(variable) or None
    if word is not None and word not in choices:
        allowed = "one of " + ", ".join(map(repr, choices))
        raise input_error("shift_kernels", variable, word, allowed, near_miss(word, choices, "Unset it."))
    return word
