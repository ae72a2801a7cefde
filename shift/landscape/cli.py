"""``shift-landscape RUN ...``: the landscape along recorded runs, as numbers, pictures and one HTML file.

Also ``python -m shift.landscape``.

    shift-train --config demo --run-dir runs/shift --landscape.every 50
    shift-landscape runs/shift --out runs/shift-landscape

Quantities are ours, defined in the modules of :mod:`shift.landscape`; those of Gong et al. (arXiv 2510.10089)
were not available to us.
Exit codes: 0 done; 2 unusable input.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from shift.landscape.report import report
from shift.landscape.survey import SurveyConfig
from shift_kernels.console import command


@dataclass(frozen=True)
class Command:
    """The landscape along recorded runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories trained with --landscape.every; at most four are legible side by side."""
    out: Path = Path("runs/landscape")
    """Gets surveys.json, report.html and figures/."""
    look: SurveyConfig = dataclasses.field(default_factory=SurveyConfig)
    """How closely."""


@command("shift-landscape")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    flags = tyro.cli(Command, args=argv, prog="shift-landscape")
    print(report(flags.runs, flags.out, flags.look))
    return 0


if __name__ == "__main__":
    sys.exit(main())
