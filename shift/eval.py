"""``shift-eval RUN ...``: how right trained models are by length and number of loops, beyond training too.

    shift-eval runs/parity/looped/seed-0 runs/parity/single/seed-0 --out runs/parity-eval
    shift-eval runs/first --lengths 10 20 30 40 --max-loops 60

Writes ``eval.json``, ``eval.md`` and ``heat_map.png``; of text bits per byte by loops instead of the picture.
What is measured, and the rules that say how many loops count: :mod:`shift.length.sweep`. Exit codes: 0 done;
2 unusable input.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from shift.length.report import FILES, write
from shift.length.sweep import SweepConfig, sweep
from shift.run.directory import short_names
from shift.run.files import directory_for, refuse_to_overwrite
from shift_kernels.console import command


@dataclass(frozen=True)
class Command:
    """How right trained models are by length and number of loops."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path = Path("runs/eval")
    """Gets eval.json, eval.md and heat_map.png."""
    force: bool = False
    """Overwrite what an earlier call wrote into --out."""
    data: Path | None = None
    """Where the tokens lie that the runs were trained on, if they were moved."""
    sweep: tyro.conf.OmitArgPrefixes[SweepConfig] = dataclasses.field(default_factory=SweepConfig)
    """What to try."""


@command("shift-eval")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    flags = tyro.cli(Command, args=argv, prog="shift-eval")
    names = short_names("shift-eval", flags.runs)
    if not flags.force:
        refuse_to_overwrite(flags.out, FILES, "shift-eval")
    with directory_for(flags.out, "shift-eval", "out"):  # an unusable one is refused before the work
        sweeps = {name: sweep(run, flags.sweep, flags.data) for name, run in names.items()}
        print(write(sweeps, flags.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
