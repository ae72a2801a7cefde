"""The report of ``shift-landscape``: numbers, pictures and one HTML file of surveys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shift.landscape.plane import plane
from shift.landscape.plots import draw
from shift.landscape.survey import SurveyConfig, survey
from shift.report.document import Block, Cell, Heading, Paragraph, Picture, Table, web_page
from shift.run.directory import short_names
from shift.run.files import json_bytes, make_directory, replace_atomically

CAPTIONS = {
    "spectrum": "Eigenvalues of the Hessian along training: blue, the loss rises on both sides; orange, it "
    "falls; larger dots stand for more eigenvalues. Between the dashed lines: the river.",
    "plane": "Loss (dark: low) on a plane through the last weights: across, the sharpest direction; up, the "
    "way the run drifted. The path goes from the ring (the start, or the switch) to the dot, through the "
    "recorded weights. The axes have different scales.",
    "cut": "Loss along the sharpest direction, with the best parabola (U) and the best V, each as wide as it "
    "takes the loss to rise by so much. A lead of 0: both fit alike; of 1: the other does not fit at all.",
    "signals": "From above: the training loss; what SHIFT's criterion looks at; how much the gradients of "
    "Single and Looped agree (1: one direction, 0: unrelated); how much more often the gradient changes its "
    "sign across the valley than elsewhere (grey: chance); in how many directions the loss is curved.",
}


def report(runs: Sequence[Path], out: Path, look: SurveyConfig) -> Path:
    """Survey the runs and write everything; returns the path of the HTML file.

    Raises:
        ShiftInputError: no runs, two of one name, a run without snapshots, or no such directory to write to.
    """
    named = short_names("shift-landscape", runs)
    make_directory(out, "shift-landscape", "out")
    surveys = {label: survey(path, look) for label, path in named.items()}
    planes = {}
    for label, path in named.items():
        last = surveys[label]["points"][-1]
        planes[label] = plane(path, surveys[label]["switch_step"] or 0, last["n_loops"], look.samples)
    replace_atomically(out / "surveys.json", json_bytes(surveys))
    pictures = draw(surveys, planes, out / "figures")
    blocks: list[Block] = [
        Paragraph(
            "Curvature of the loss on held-out data along recorded runs. Valley: directions whose curvature "
            "is above the threshold; river: the others. The quantities are defined in shift.landscape."
        )
    ]
    blocks += [Picture(path, CAPTIONS[name]) for name, path in pictures.items()]
    for label, found in surveys.items():
        blocks += [Heading(label), points_table(found)]
    path = out / "report.html"
    replace_atomically(path, web_page("The landscape along a run", blocks).encode())
    return path


def points_table(found: dict[str, Any]) -> Table:
    """A row a point, a column each plain number."""
    names = [
        k for k, v in found["points"][0].items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    ]
    rows: list[list[Cell]] = [
        ["–" if p.get(name) is None else f"{p[name]:.4g}" for name in names] for p in found["points"]
    ]
    return Table([name.replace("_", " ") for name in names], rows)
