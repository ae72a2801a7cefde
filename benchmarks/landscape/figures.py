"""The study's own pictures; those of single runs are :mod:`shift.landscape.plots`'."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from benchmarks.landscape.claims import QK
from benchmarks.landscape.seen import EASY, HARD, Seen, cosine, curve, has_switches, log_cost_ratio
from benchmarks.landscape.study import ARMS, SWITCHES
from shift.comparison.arms import FAMILIES
from shift.landscape.plots import log_axis
from shift.report.style import FAINT, INK, SHADE, WIDTH, save_figures

Study = Mapping[str, Sequence[Seen]]
"""Task -> what each seed showed."""

NAMES = {"markov": "Markov language", "hop": "Hop"}
LABELS = {"single": "Single (one pass)", "looped": "Looped", "shift": "SHIFT"}
COLOURS = {arm: FAMILIES[arm].colour for arm in ARMS}
PARTS = {
    "W_Q, W_K": (QK, "#0072B2"),
    "W_V": (("in_proj_weight.v",), "#E69F00"),
    "head": (("head.weight",), "#CC79A7"),
    "all weights": (("all",), INK),
}


def draw(study: Study, directory: Path) -> dict[str, Path]:
    """Draw ``accuracy``, ``phases`` and ``upstream``; returns the PNG files by name."""
    return save_figures(
        {
            "accuracy": lambda: accuracy_figure(study),
            "phases": lambda: phases_figure(study),
            "upstream": lambda: upstream_figure(study),
        },
        directory,
    )


def accuracy_figure(study: Study) -> Figure:
    """Held-out accuracy on what one pass can learn (left) and what it can't (right)."""
    figure = Figure(figsize=(WIDTH, 0.6 + 2.8 * len(study)))
    grid = figure.subplots(len(study), 2, sharey="row", squeeze=False)
    for row, (task, seeds) in zip(grid, study.items(), strict=True):
        for axes, groups, kind in zip(row, (EASY[task], HARD[task]), ("easy", "hard"), strict=True):
            axes.set_title(f"{NAMES[task]}, {kind}: {' and '.join(groups)}")
            for arm in ARMS:
                for seen in seeds:
                    steps, accuracy = curve(seen.runs[arm], groups)
                    axes.plot(steps, accuracy, color=COLOURS[arm], lw=1.1, alpha=0.75)
                    if arm == "shift" and seen.runs[arm].result["switch_step"] is not None:
                        at = int(np.searchsorted(steps, seen.switch_step))
                        axes.plot(
                            steps[at],
                            accuracy[at],
                            "o",
                            ms=6,
                            mfc="white",
                            mec=COLOURS[arm],
                            mew=1.6,
                            zorder=4,
                        )
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_xlabel("training steps")
        row[0].set_ylabel("right answers, held-out data")
    handles = [grid[0][0].plot([], color=COLOURS[arm], lw=3)[0] for arm in ARMS]
    handles += grid[0][0].plot([], "o", ms=6, mfc="white", mec=COLOURS["shift"], mew=1.6)
    figure.legend(
        handles, [*LABELS.values(), "SHIFT's switch"], loc="outside upper left", ncols=4, frameon=False
    )
    return figure


def phases_figure(study: Study) -> Figure:
    """Effective rank of the Hessian along training; a line a seed."""
    figure = Figure(figsize=(WIDTH, 0.6 + 2.4 * len(study)))
    grid = figure.subplots(len(study), len(ARMS), sharex="row", sharey="row", squeeze=False)
    for row, (task, seeds) in zip(grid, study.items(), strict=True):
        for axes, arm in zip(row, ARMS, strict=True):
            for seen in seeds:
                points = seen.surveys[arm]["points"]
                steps, ranks = ([p[key] for p in points] for key in ("step", "effective_rank"))
                axes.plot(steps, ranks, color=COLOURS[arm], lw=1.3, marker=".", ms=5, alpha=0.8)
                if arm == "shift" and seen.runs[arm].result["switch_step"] is not None:
                    axes.axvline(seen.switch_step, color=COLOURS[arm], lw=0.8, ls=(0, (4, 3)), alpha=0.7)
            log_axis(axes)
            axes.set_title(LABELS[arm])
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.set_xlabel("training steps")
        row[0].set_ylabel(f"{NAMES[task]}:\neffective rank")
    return figure


def upstream_figure(study: Study) -> Figure:
    """Left: agreement of the gradients along Single. Right: what a switch there would have cost."""
    figure = Figure(figsize=(WIDTH, 0.7 + 2.9 * len(study)))
    grid = figure.subplots(len(study), 2, squeeze=False)
    for (left, right), (task, seeds) in zip(grid, study.items(), strict=True):
        steps = sorted(seeds[0].upstream)
        for names, colour in PARTS.values():
            lines = np.array([[cosine(seen, step, names) for step in steps] for seen in seeds])
            left.fill_between(steps, lines.min(axis=0), lines.max(axis=0), color=colour, alpha=0.12, lw=0)
            left.plot(steps, lines.mean(axis=0), color=colour, lw=1.6)
        left.axhline(0, color=FAINT, lw=0.8)
        switches = [seen.switch_step for seen in seeds]
        left.axvspan(min(switches) - 4, max(switches) + 4, color=SHADE, zorder=0, lw=0)
        left.text(statistics.mean(switches), 0.99, "SHIFT\nswitches", va="top", ha="center", fontsize=8.5,
                  color=FAINT, transform=left.get_xaxis_transform())  # fmt: skip
        left.set(
            title=f"{NAMES[task]}",
            xlabel="training steps of Single",
            ylabel="cosine of Single's and\nLooped's gradients",
        )
        scale = ScalarMappable(Normalize(SWITCHES[task][0], SWITCHES[task][-1]), "viridis")
        for seen in filter(has_switches, seeds):
            x = [cosine(seen, step, ("all",)) for step in SWITCHES[task]]
            y = [np.exp(log_cost_ratio(seen, f"fixed:{step}")) for step in SWITCHES[task]]
            right.plot(x, y, color=FAINT, lw=0.6, alpha=0.6)
            right.scatter(x, y, c=[scale.to_rgba(step) for step in SWITCHES[task]], s=26, zorder=3,
                          edgecolors="white", linewidths=0.6)  # fmt: skip
        right.axhline(1, color=FAINT, lw=0.8)
        right.set(
            xlabel="cosine (all weights) at the switch",
            ylabel="compute to target,\n× Looped's",
            title="Switching there",
        )
        figure.colorbar(scale, ax=right, label="switch at step", ticks=SWITCHES[task])
    handles = [grid[0][0].plot([], color=colour, lw=3)[0] for _, colour in PARTS.values()]
    figure.legend(handles, PARTS, loc="outside upper left", ncols=4, frameon=False)
    return figure
