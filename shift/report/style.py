"""How all pictures look. Needs matplotlib (extra ``plots``).

Eight inches wide at 200 dots an inch: sharp at the 800 pixels of a report, and on paper.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from shift.report.words import visible
from shift.run.files import replace_atomically

WIDTH = 8.0
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a929a",
    "axes.labelcolor": "#3a4148",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebee",
    "xtick.color": "#58616b",
    "ytick.color": "#58616b",
    "lines.solid_capstyle": "round",
    "figure.dpi": 200,
    "figure.constrained_layout.use": True,
}
INK, FAINT, SHADE = "#1c1f23", "#58616b", "#f3f4f6"


def literal(text: str) -> str:
    """A text as matplotlib shows it unchanged: names may hold dollars, which would begin a formula."""
    return visible(text).replace("$", r"\$")


def save_figures(
    pictures: Mapping[str, Callable[[], Figure | None]], directory: Path, style: Mapping[Any, Any] = STYLE
) -> dict[str, Path]:
    """Draw each picture in ``style`` and save it as ``directory/<name>.png``; one that is None is left out,
    and what an earlier call saved under its name is removed.

    Returns:
        The files by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    with matplotlib.rc_context(dict(style)):
        for name, picture in pictures.items():
            figure, path = picture(), directory / f"{name}.png"
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                save_png(figure, path)
                paths[name] = path
    return paths


def save_png(figure: Figure, path: Path) -> None:
    """Save a figure as a PNG file, atomically."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    replace_atomically(path, png.getvalue())
