"""The picture of a sweep: exact match by length and number of loops. Needs matplotlib (extra ``plots``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shift.report.style import INK, STYLE, WIDTH, literal, save_png

COLUMNS = 2


def heat_map(sweeps: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Draw sweeps (:func:`shift.length.sweep.sweep`) side by side, under their names, into a PNG file.

    A ring is at T(n); dashed lines are at the longest length and the most loops of training.
    """
    columns = min(COLUMNS, len(sweeps))
    n_rows = -(-len(sweeps) // columns)
    most = max(len(found["rows"]) for found in sweeps.values())
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, n_rows * (1.3 + 0.22 * most)))
        panels = list(figure.subplots(n_rows, columns, squeeze=False).flat)
        for axes, (name, found) in zip(panels, sweeps.items(), strict=False):
            image = _panel(axes, name, found)
        for axes in panels[len(sweeps) :]:
            axes.set_axis_off()
        figure.colorbar(image, ax=panels, label="exact match", shrink=0.8, aspect=30)
        save_png(figure, path)
    return path


def _panel(axes: Axes, name: str, found: Mapping[str, Any]) -> Any:
    rows = found["rows"]
    edges = {"left": 0.5, "right": found["max_loops"] + 0.5, "bottom": -0.5, "top": len(rows) - 0.5}
    image = axes.imshow(
        [row["exact"] for row in rows], cmap="Blues", vmin=0, vmax=1, origin="lower", aspect="auto",
        extent=tuple(edges.values()), interpolation="nearest",
    )  # fmt: skip
    needed = [(row["needed"], i) for i, row in enumerate(rows) if row["needed"] is not None]
    if needed:
        axes.plot(*zip(*needed, strict=True), "o", ms=5, mfc="none", mec="#D55E00", mew=1.4)
    dashes: dict[str, Any] = {"color": INK, "lw": 1, "ls": (0, (4, 3))}
    axes.axvline(found["trained_loops"] + 0.5, **dashes)
    if found["trained_length"] is not None:
        axes.axhline(sum(row["length"] <= found["trained_length"] for row in rows) - 0.5, **dashes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(range(len(rows)), ["" if row["length"] is None else row["length"] for row in rows])
    axes.set(title=literal(name), xlabel="loops", ylabel="length", xlim=(edges["left"], edges["right"]))
    return image
