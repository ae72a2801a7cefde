"""The pictures of surveys. Eight inches wide at 200 dots an inch, as those of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from shift.landscape.plane import Plane
from shift.report.style import FAINT, INK, SHADE, WIDTH, literal, save_figures

U_COLOUR, V_COLOUR, RUN_COLOUR, SECOND = "#0072B2", "#D55E00", "#1c1f23", "#009E73"
Surveys = Mapping[str, Mapping[str, Any]]


def draw(surveys: Surveys, planes: Mapping[str, Plane], directory: Path) -> dict[str, Path]:
    """Draw ``spectrum``, ``plane``, ``cut`` and ``signals``, a column a run; returns the PNG files by name.

    Args:
        surveys: of :func:`shift.landscape.survey.survey`, by the run's label; at most four are legible.
        planes: of the same runs.
        directory: created if need be.
    """
    return save_figures(
        {
            "spectrum": lambda: spectrum_figure(surveys),
            "cut": lambda: cut_figure(surveys),
            "plane": lambda: plane_figure(planes),
            "signals": lambda: signals_figure(surveys),
        },
        directory,
    )


def spectrum_figure(surveys: Surveys) -> Figure:
    """Where the eigenvalues lie, at each point of the training; the band between the lines is the river."""
    figure = Figure(figsize=(WIDTH, 4.6))
    panels = figure.subplots(1, len(surveys), sharey=True, squeeze=False)[0]
    for axes, (label, survey) in zip(panels, surveys.items(), strict=True):
        points = survey["points"]
        steps = [p["step"] for p in points]
        gap = min(np.diff(steps), default=10)
        for p in points:
            values, counts = (np.array(a) for a in p["spectrum"])
            seen = counts > 0.05
            axes.scatter(
                np.full(seen.sum(), p["step"]), values[seen], s=3 + 14 * np.log10(1 + counts[seen]),
                c=np.where(values[seen] >= 0, U_COLOUR, V_COLOUR), alpha=0.45, lw=0,
            )  # fmt: skip
        line = [p["split"]["threshold"] for p in points]
        axes.fill_between(steps, [-x for x in line], line, color=SHADE, zorder=0, lw=0)
        axes.plot(steps, line, color=FAINT, lw=1, ls=(0, (4, 3)))
        axes.plot(steps, [-x for x in line], color=FAINT, lw=1, ls=(0, (4, 3)))
        axes.set_yscale("symlog", linthresh=1e-2)
        axes.set(title=literal(label), xlabel="training steps", xlim=(-0.6 * gap, steps[-1] + 0.6 * gap))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        _switch(axes, survey)
    panels[0].set_ylabel("eigenvalues of the Hessian\n(curvature of the loss, nats per weight²)")
    return figure


def cut_figure(surveys: Surveys) -> Figure:
    """The last point's cuts along the sharpest direction: a row a height, with both fits."""
    heights = list(next(iter(surveys.values()))["points"][-1]["cuts"])
    figure = Figure(figsize=(WIDTH, 0.8 + 2.0 * len(heights)))
    grid = figure.subplots(len(heights), len(surveys), squeeze=False)
    for column, (label, survey) in enumerate(surveys.items()):
        for row, height in enumerate(heights):
            axes, cut = grid[row][column], survey["points"][-1]["cuts"][height]
            x = np.array(cut["x"])
            axes.plot(x, cut["u"], color=U_COLOUR, lw=1.6)
            axes.plot(x, cut["v"], color=V_COLOUR, lw=1.6, ls=(0, (5, 2)))
            axes.plot(x, cut["y"], "o", ms=3, color=INK, zorder=3)
            head = f"{literal(label)}, step {survey['points'][-1]['step']}\n" if row == 0 else ""
            axes.set_title(f"{head}{cut['shape']} leads by {abs(cut['margin']):.2f}", fontsize=10)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            if column == 0:
                axes.set_ylabel(f"loss, up by {float(height):g}\n(nats)")
    for axes in grid[-1]:
        axes.set_xlabel("distance along the\nsharpest direction")
    handles = [
        grid[0][0].plot([], "o", ms=3, color=INK)[0],
        grid[0][0].plot([], color=U_COLOUR, lw=1.6)[0],
        grid[0][0].plot([], color=V_COLOUR, lw=1.6, ls=(0, (5, 2)))[0],
    ]
    labels = ["loss", "best U: c + a (x − x₀)²", "best V: c + a |x − x₀|"]
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
    return figure


def plane_figure(planes: Mapping[str, Plane]) -> Figure:
    """The loss on the plane of the sharpest direction and the run's drift, with the run's path."""
    figure = Figure(figsize=(WIDTH, 4.3))
    panels = figure.subplots(1, len(planes), squeeze=False)[0]
    for axes, (label, p) in zip(panels, planes.items(), strict=True):
        low = p.loss.min()
        levels = low + np.geomspace(0.02, 1, 14) * max(float(np.quantile(p.loss, 0.95)) - low, 1e-9)
        axes.contourf(p.x, p.y, p.loss, levels=[low - 1e-9, *levels], cmap="Blues_r", extend="max")
        axes.contour(p.x, p.y, p.loss, levels=levels, colors="white", linewidths=0.4)
        axes.plot(*p.path.T, color=V_COLOUR, lw=1, marker=".", ms=3)
        axes.plot(*p.path[0], "o", ms=6, mfc="white", mec=V_COLOUR, mew=1.6)
        axes.plot(*p.path[-1], "o", ms=6, color=V_COLOUR)
        axes.set_title(
            f"{literal(label)} (T = {p.n_loops})\nloss {low:.2g} to {p.loss.max():.2g} nats", fontsize=10
        )
        axes.set_xlabel(f"sharpest direction\n(curvature {p.curvature[0]:.2g})")
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_ylabel(f"drift (curvature {p.curvature[1]:.2g})")
    return figure


def signals_figure(surveys: Surveys) -> Figure:
    """Loss, what the criterion looks at, agreement of the gradients, and hopping, over training."""
    rows = (
        "loss\n(nats)",
        "criterion\n(relative change)",
        "Single and Looped\ngradients: cosine",
        "hops\n(z-score)",
        "effective\nrank",
    )
    figure = Figure(figsize=(WIDTH, 1.0 + 1.5 * len(rows)))
    grid = figure.subplots(len(rows), len(surveys), sharex="col", sharey="row", squeeze=False)
    for column, (label, survey) in enumerate(surveys.items()):
        panels: Sequence[Axes] = list(grid[:, column])
        points = survey["points"]
        steps = [p["step"] for p in points]
        panels[0].plot(*_finite(survey["losses"]), color=RUN_COLOUR, lw=0.8)
        panels[0].set_title(literal(label))
        looks = survey["looks"]
        if looks:
            panels[1].plot(
                [k["step"] for k in looks], [abs(k["improvement"]) for k in looks], color=U_COLOUR, lw=1.3
            )
            panels[1].plot(
                [k["step"] for k in looks], [k["grad_change"] for k in looks], color=V_COLOUR, lw=1.3
            )
            panels[1].set_ylim(0, 0.5)
        else:
            panels[1].text(0.5, 0.5, "no criterion", transform=panels[1].transAxes, ha="center", color=FAINT)
        panels[2].plot(steps, [p["agreement"]["all"] for p in points], color=RUN_COLOUR, marker=".")
        panels[2].axhline(0, color=FAINT, lw=0.8)
        panels[3].plot(
            steps,
            [p["hopping"]["hops"] if "hopping" in p else np.nan for p in points],
            color=RUN_COLOUR,
            marker=".",
        )
        panels[3].axhspan(-2, 2, color=SHADE, lw=0, zorder=0)
        panels[4].plot(steps, [p["effective_rank"] for p in points], color=RUN_COLOUR, marker=".")
        log_axis(panels[4])
        panels[-1].set_xlabel("training steps")
        panels[-1].xaxis.set_major_locator(MaxNLocator(4))
        for axes in panels:
            _switch(axes, survey, named=False)
    for axes, words in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(words)
    handles = [grid[1][0].plot([], color=c, lw=1.6)[0] for c in (U_COLOUR, V_COLOUR, SECOND)]
    labels = ["criterion: loss", "criterion: gradient norm", "the switch"]
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
    return figure


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis that reads 200, 400 even where it spans less than a decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _switch(axes: Axes, survey: Mapping[str, Any], named: bool = True) -> None:
    """A line where the loops begin."""
    step = survey["switch_step"]
    if step is None:
        return
    axes.axvline(step, color=SECOND, lw=1.6)
    if named:
        axes.text(step, 0.99, " the switch", transform=axes.get_xaxis_transform(), va="top", color=SECOND)


def _finite(pairs: Sequence[Sequence[float | None]]) -> tuple[list[float], list[float]]:
    """Steps and losses without those that were not finite."""
    kept = [(step, loss) for step, loss in pairs if step is not None and loss is not None]
    return [step for step, _ in kept], [loss for _, loss in kept]
