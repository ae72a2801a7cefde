"""The report of ``shift-eval``: a table and a picture of sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shift.length.heat_map import heat_map
from shift.length.sweep import RULES
from shift.report.document import Block, Cell, Heading, Items, Paragraph, Picture, Table, markdown
from shift.report.words import count, percent
from shift.run.files import json_bytes, replace_atomically

FILES = ("eval.json", "eval.md", "heat_map.png")
WORDS = (
    "Exact match (all read positions of a sequence right) on held-out sequences; in brackets the share of "
    "read positions that are right, and the loops, on average. T(n): the loops that a length needs."
)
CAPTION = "Exact match. Ring: T(n). Dashed: the longest length and the most loops of training."


def write(sweeps: Mapping[str, Mapping[str, Any]], out: Path) -> Path:
    """Write sweeps, by name, into the directory ``out``, which is there; returns the path of ``eval.md``.

    A picture of an earlier call is removed where there is none to draw.
    """
    replace_atomically(out / "eval.json", json_bytes(sweeps))
    pictured = {name: found for name, found in sweeps.items() if not _is_text(found)}
    blocks: list[Block] = []
    if pictured:
        rules = Items([f"{rule}: {meaning}" for rule, meaning in RULES.items()])
        blocks += [Paragraph(WORDS), rules, Picture(heat_map(pictured, out / "heat_map.png"), CAPTION)]
    else:
        (out / "heat_map.png").unlink(missing_ok=True)
    for name, found in sweeps.items():
        length = found["trained_length"]
        trained = f"Step {found['step']}; trained with up to {count(found['trained_loops'], 'loop')}"
        trained += "." if length is None else f" on lengths up to {length}."
        table = loops_table(found) if _is_text(found) else rules_table(found)
        blocks += [Heading(name), Paragraph(trained), table]
    path = out / "eval.md"
    replace_atomically(path, markdown("Accuracy by length and loops", blocks, out).encode())
    return path


def _is_text(found: Mapping[str, Any]) -> bool:
    return "bits_per_byte" in found["rows"][0]


def loops_table(found: Mapping[str, Any]) -> Table:
    """A row a number of loops: how well text is told, and how many tokens are right."""
    (row,) = found["rows"]
    scores = zip(row["bits_per_byte"], row["accuracy"], strict=True)
    rows = [
        [str(loops), f"{bits:.4f}", percent(right)] for loops, (bits, right) in enumerate(scores, start=1)
    ]
    return Table(["loops", "bits per byte", "tokens right"], rows)


def rules_table(found: Mapping[str, Any]) -> Table:
    """A row a length, a column each rule."""
    rules = list(found["rows"][0]["rules"])
    rows: list[list[Cell]] = []
    for row in found["rows"]:
        scores = [row["rules"][rule] for rule in rules]
        shown = [f"{percent(s['exact'])} ({percent(s['accuracy'])}, {s['loops']:.1f})" for s in scores]
        rows.append(["all" if row["length"] is None else str(row["length"]), *shown])
    return Table(["length", *rules], rows)
