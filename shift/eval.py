"""``shift-eval RUN ...``: how right trained models are by length and number of loops, beyond training too.

    shift-eval runs/parity/looped/seed-0 runs/parity/single/seed-0 --out runs/parity-eval
    shift-eval runs/first --lengths 10 20 30 40 --max-loops 60

Writes ``eval.json``, ``eval.md`` and ``heat_map.png``. What is measured, and the rules that say how many
loops count: :mod:`shift.length.sweep`. Exit codes: 0 done; 2 unusable input.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from shift.length.heat_map import heat_map
from shift.length.sweep import RULES, SweepConfig, sweep
from shift.report.document import Block, Cell, Heading, Items, Paragraph, Picture, Table, markdown
from shift.report.words import count, percent
from shift.run.directory import short_names
from shift.run.files import make_directory, replace_atomically
from shift_kernels import ShiftInputError

WORDS = (
    "Exact match (all read positions of a sequence right) on held-out sequences; in brackets the share of "
    "read positions that are right, and the loops, on average. T(n): the loops that a length needs."
)
CAPTION = "Exact match. Ring: T(n). Dashed: the longest length and the most loops of training."


@dataclass(frozen=True)
class Command:
    """How right trained models are by length and number of loops."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path = Path("runs/eval")
    """Gets eval.json, eval.md and heat_map.png."""
    sweep: tyro.conf.OmitArgPrefixes[SweepConfig] = dataclasses.field(default_factory=SweepConfig)
    """What to try."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    command = tyro.cli(Command, args=argv, prog="shift-eval")
    try:
        names = short_names("shift-eval", command.runs)
        make_directory(command.out, "shift-eval", "out")
        print(write({name: sweep(run, command.sweep) for name, run in names.items()}, command.out))
    except ShiftInputError as error:
        print(f"shift-eval: {error}", file=sys.stderr)
        return 2
    return 0


def write(sweeps: Mapping[str, Mapping[str, Any]], out: Path) -> Path:
    """Write sweeps, by name, into the directory ``out``, which is there; returns the path of ``eval.md``."""
    replace_atomically(out / "eval.json", json.dumps(sweeps, indent=1, allow_nan=False).encode())
    rules = Items([f"{rule}: {meaning}" for rule, meaning in RULES.items()])
    blocks: list[Block] = [Paragraph(WORDS), rules, Picture(heat_map(sweeps, out / "heat_map.png"), CAPTION)]
    for name, found in sweeps.items():
        length = found["trained_length"]
        trained = f"Step {found['step']}; trained with up to {count(found['trained_loops'], 'loop')}"
        trained += "." if length is None else f" on lengths up to {length}."
        blocks += [Heading(name), Paragraph(trained), rules_table(found)]
    path = out / "eval.md"
    replace_atomically(path, markdown("Accuracy by length and loops", blocks, out).encode())
    return path


def rules_table(found: Mapping[str, Any]) -> Table:
    """A row a length, a column each rule."""
    rules = list(found["rows"][0]["rules"])
    rows: list[list[Cell]] = []
    for row in found["rows"]:
        scores = [row["rules"][rule] for rule in rules]
        shown = [f"{percent(s['exact'])} ({percent(s['accuracy'])}, {s['loops']:.1f})" for s in scores]
        rows.append(["all" if row["length"] is None else str(row["length"]), *shown])
    return Table(["length", *rules], rows)


if __name__ == "__main__":
    sys.exit(main())
