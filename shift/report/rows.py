"""A table of results as a JSON file with one line a row: small, diffable, and read by any tool."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shift.run.files import replace_atomically


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write ``{"about": {...}, "columns": [...], "rows": [[...], ...]}``.

    Args:
        path: the file, replaced atomically.
        rows: one or more, all with the same keys: the columns.
        about: plain JSON values that hold for all rows; a line each.
    """
    columns = list(rows[0])
    facts = ",\n".join(f"{_json(key)}: {_json(value)}" for key, value in about.items())
    lines = ",\n".join(_json([row[column] for column in columns]) for row in rows)
    text = f'{{"about": {{\n{facts}\n}},\n"columns": {_json(columns)},\n"rows": [\n{lines}\n]}}\n'
    replace_atomically(path, text.encode())


def read_rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, about) of what :func:`write_rows` wrote."""
    table = json.loads(path.read_text(encoding="utf-8"))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]], table["about"]


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)
