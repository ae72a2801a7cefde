"""A run directory, read: finished or not, and whatever was done to its files since."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shift.config import TrainConfig
from shift.reading import is_count, is_number, parse_json, parse_text, parse_toml, read_regular
from shift_kernels import ShiftInputError
from shift_kernels.errors import input_error

FAILURE = "failure.txt"
"""Written into a run directory when the run stopped for good: why."""


@dataclass(frozen=True)
class Run:
    """A run directory, read. Where it did not finish, ``result`` is empty and ``failure`` says why."""

    config: dict[str, Any]
    rows: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    result: dict[str, Any]
    failure: str | None

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The ``train``, ``eval`` or ``look`` rows of ``metrics.jsonl``."""
        return [row for row in self.rows if row["kind"] == kind]


Runs = Mapping[str, Mapping[int, Run]]
"""Arm of a comparison -> seed -> run."""


def read_run(path: Path) -> Run:
    """Read a run directory, finished or not; a missing one is a run that did nothing.

    Raises:
        ShiftInputError: a file that no run wrote so; rows of ``timing.jsonl``, which only tell times, are
            dropped instead.
    """
    config = _read(path / "config.toml", parse_toml, {})
    if config:
        config = TrainConfig.from_dict(config, str(path / "config.toml")).to_dict()
    result = _read(path / "result.json", _result, {})
    rows = _read(path / "metrics.jsonl", _metrics, [])
    if result and not (config and any(row["kind"] == "eval" for row in rows)):
        allowed = "a finished run with its config.toml and metrics.jsonl"
        raise input_error("read_run", "path", str(path), allowed, "Restore them, or remove result.json.")
    return Run(
        config=config,
        rows=rows,
        timing=read_timing(path),
        result=result,
        failure=_read(path / FAILURE, parse_text, "").strip() or (None if result else "not finished"),
    )


def read_timing(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``timing.jsonl`` that can be read."""
    try:
        data = read_regular(path / "timing.jsonl")
    except OSError:
        return []
    rows = []
    for line in data.splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and is_count(row.get("step")) and all(map(is_number, row.values())):
            rows.append(row)
    return rows


def _read(path: Path, parse: Callable[[bytes], Any], otherwise: Any) -> Any:
    """What a file holds, or ``otherwise`` if there is none."""
    try:
        return parse(read_regular(path))
    except (FileNotFoundError, NotADirectoryError):
        return otherwise
    except ShiftInputError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise input_error(
            "read_run", "path", str(path), f"a {path.name} as a run writes it", f"Restore it: {reason}."
        ) from error


def _result(data: bytes) -> dict[str, Any]:
    result = parse_json(data, finite=False)
    if not isinstance(result, dict):
        raise ValueError("not a table")
    wrong = [name for name in _RESULT if name in result and not _RESULT[name](result[name])]
    if wrong:
        raise ValueError(f"{wrong[0]} = {result[wrong[0]]!r:.50}")
    return result


def _metrics(data: bytes) -> list[dict[str, Any]]:
    whole, _, _ = parse_text(data).rpartition("\n")  # a full disk may have cut the last row short
    return list(_rows(whole.split("\n"))) if whole else []


def _rows(lines: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line.encode())
            good = isinstance(row, dict) and row.get("kind") in KINDS and _fits(row, KINDS[row["kind"]])
        except (ValueError, TypeError) as error:
            raise ValueError(f"row {number}: {error}") from None
        if not good:
            raise ValueError(f"row {number} is none that a run writes")
        yield row


def _fits(row: dict[str, Any], wanted: dict[str, Callable[[Any], bool]]) -> bool:
    return all(name in row and holds(row[name]) for name, holds in wanted.items())


def _is_number_or_none(value: Any) -> bool:
    return value is None or is_number(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count_or_none(value: Any) -> bool:
    return value is None or is_count(value)


_RESULT: dict[str, Callable[[Any], bool]] = {
    "flops_total": is_number,
    "switch_step": _is_count_or_none,
    "switch_ms": _is_number_or_none,
    "wall_s": is_number,
    "cpu_s": is_number,
    "machine": lambda value: isinstance(value, dict),
    "versions": lambda value: isinstance(value, dict),
}
"""What the readers of ``result.json`` compute with, where it is there."""
_COSTS = {"step": is_count, "n_loops": is_count, "flops": is_number, "block_applications": is_number}
KINDS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "train": {**_COSTS, "loss": _is_number_or_none, "grad_norm": _is_number_or_none, "skipped": _is_bool},
    "eval": {
        **_COSTS,
        "loss": _is_number_or_none,
        "accuracy": is_number,
        "exact": is_number,
        "groups": lambda value: isinstance(value, dict),
    },
    "look": {"step": is_count},
}
"""Kinds of rows of ``metrics.jsonl``, and what a row of each holds at least."""
