"""A table of results as a JSON file with one line a row: small, diffable, and read by any tool."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shift.run.files import replace_atomically


def write_rows(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    first: Mapping[str, Any] | None = None,
) -> None:
    """Write ``{<first>, "about": {...}, "columns": [...], "rows": [[...], ...]}``.

    Args:
        path: the file, replaced atomically.
        rows: one or more, all with the same keys: the columns.
        about: plain JSON values that hold for all rows; a line each.
        first: what a reader wants to see first: keys of the file beside the others, a line each.
    """
    columns = list(rows[0])
    facts = ",\n".join(f"{_json(key)}: {_json(value)}" for key, value in about.items())
    lines = ",\n".join(_json([row[column] for column in columns]) for row in rows)
    head = "".join(f"{_json(key)}: {_json(value)},\n" for key, value in (first or {}).items())
    text = f'{{{head}"about": {{\n{facts}\n}},\n"columns": {_json(columns)},\n"rows": [\n{lines}\n]}}\n'
    replace_atomically(path, text.encode())


def read_rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows, about) of what :func:`write_rows` wrote."""
    table = json.loads(path.read_text(encoding="utf-8"))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]], table["about"]


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)
