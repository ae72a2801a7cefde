"""Numbers and names as the reports print them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

NBSP = "\u00a0"
FEW = 5
"""As many values are listed one by one."""
PREFIXES = ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k"))


LINE_BREAKS = re.compile(r"[\t-\r\x1c-\x1e\x85\u2028\u2029]+")
# Controls, marks that turn the direction of writing, halves of surrogate pairs, and no characters.
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def visible(text: str) -> str:
    """The text in one line, with U+FFFD for what no reader can see or no file can hold."""
    return UNSEEN.sub("\ufffd", LINE_BREAKS.sub(" ", text))


def percent(share: float | None) -> str:
    """0.512 -> "51.2%"; what is below 1 is not rounded up to 100."""
    if share is None:
        return "–"
    return "99.9%" if 0.9995 <= share < 1 else f"{100 * share:.1f}%"


def goal(accuracy: float | None) -> str:
    """0.99 -> "99%"."""
    return "the target" if accuracy is None else f"{100 * accuracy:.4g}%"


def flops_unit(flops: float) -> tuple[float, str]:
    """The largest unit of which ``flops`` is at least one, and its name."""
    return next(((10.0**n, f"{prefix}FLOP") for n, prefix in PREFIXES if flops >= 10**n), (1.0, "FLOP"))


def flops(value: float | None) -> str:
    """1.234e12 -> "1.23 TFLOP"."""
    if value is None:
        return "–"
    scale, name = flops_unit(value)
    return f"{value / scale:.3g}{NBSP}{name}"


def duration(seconds: float | None) -> str:
    """75 -> "1 min 15 s"."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f}{NBSP}s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}{NBSP}min {seconds}{NBSP}s"


def listing(words: Iterable[object]) -> str:
    """1, 2, 3 -> "1, 2 and 3"."""
    *most, last = map(str, words)
    return f"{', '.join(most)} and {last}" if most else last


def each(values: Sequence[object]) -> str:
    """All of a few numbers; the smallest and largest of many."""
    if len(values) <= FEW:
        return ", ".join(map(str, values))
    ordered = sorted(values, key=lambda value: float(str(value)))
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def count(n: int, noun: str) -> str:
    """3, "seed" -> "3 seeds"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
