"""The pictures of a suite's report, drawn from its results. Needs matplotlib (extra ``plots``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.savings.families import Results, arm_names, arm_of, colour_of, label
from benchmarks.savings.paired import best_fixed_switch
from shift.comparison.arms import FAMILIES, SMALLEST
from shift.report.style import INK, STYLE, WIDTH, literal, save_figures

COLUMNS = 4


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """``ratios.png`` (compute to the target over Looped's) and ``loss.png`` (loss against compute)."""
    pictures = {"ratios": lambda: ratios_figure(results), "loss": lambda: loss_figure(results)}
    return save_figures(pictures, folder, STYLE | {"font.size": 8, "axes.titlesize": 8.5})


def draw_front(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """``front.png``: what each setting of the criterion costs and loses; see ``scp_sweep``."""
    return save_figures({"front": lambda: front_figure(rows)}, folder)["front"]


def front_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A dot a setting, spread a little sideways; the front as a line, the defaults as a star."""
    figure = Figure(figsize=(WIDTH, 3.6))
    axes = figure.subplots()
    spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(rows))
    lost, mean = ([row[key] for row in rows] for key in ("lost", "restricted_mean"))
    axes.plot(np.array(lost) + spread, mean, "o", ms=3, color=FAMILIES["shift"].colour, alpha=0.4, mew=0)
    best = sorted((row["lost"], row["restricted_mean"]) for row in rows if row["front"])
    axes.plot(*zip(*best, strict=True), color=INK, lw=1.2, drawstyle="steps-post", label="front")
    default = next(row for row in rows if row["default"])
    at = default["lost"], default["restricted_mean"]
    axes.plot(*at, "*", ms=15, color=FAMILIES["looped"].colour, mec="white", label="defaults", zorder=3)
    axes.axhline(1, color=INK, lw=0.8, ls=(0, (4, 3)))
    axes.set(xlabel="runs lost that Looped won", ylabel="compute to the target, × Looped")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def ratios_figure(results: Results) -> Figure:
    """A panel a task, a row an arm: each seed, the mean, and its 95% interval."""
    names = [n for n in arm_names(results) if n not in ("looped", "single")]
    colour = colour_of(results)
    figure, panels = _grid(results, 0.55 + 0.17 * len(names), sharey=True)
    for axes, r in panels:
        for y, name in enumerate(names):
            ratio = (arm_of(r, name) or {}).get("against_looped")
            if ratio is None:
                continue
            own, never = colour[name], len(ratio["seeds_never"])
            found = [x for x in ratio["per_seed"].values() if x is not None]
            axes.plot(found, [y] * len(found), "o", ms=3, color=own, alpha=0.35, mew=0)
            if ratio["ci95"]:
                axes.plot(ratio["ci95"], [y, y], color=own, lw=2)
            if found:
                axes.plot(ratio["mean"], y, "|", ms=8, mew=2, color=own)
            if never:
                axes.text(2.02, y, f"✕{never}", color=own, va="center", fontsize=7)
        axes.axvline(1, color=INK, lw=0.8)
        axes.set(xlim=(0, 2), ylim=(len(names) - 0.4, -0.6))
        axes.set_yticks(range(len(names)), [literal(label(results, n)) for n in names])
    figure.supxlabel("compute to the target, times Looped's", fontsize=9)
    return figure


def loss_figure(results: Results) -> Figure:
    """A panel a task: held-out loss against training compute, median over the seeds."""
    figure, panels = _grid(results, 1.9)
    colour, handles = colour_of(results), {}
    for axes, r in panels:
        fixed = best_fixed_switch(r["arms"])
        total = np.mean([s["flops_total"] for s in r["arms"]["looped"]["seeds"]])
        for name in filter(None, ("single", "looped", SMALLEST, "shift", "ramp", fixed, "climb")):
            arm = arm_of(r, name)
            if (
                arm is None or name not in colour
            ):  # the smallest T may have been Single's, and no other was run
                continue
            at, loss = _median_curve(arm["seeds"])
            words, own = literal(label(results, name)), colour[name]
            if name == fixed:
                words, own = "Best fixed switch", FAMILIES["fixed"].colour
            handles[words] = axes.plot(at / total, loss, color=own, lw=1.2)[0]
        axes.set(xlim=(0, 1.02), ylim=(0, None))
    figure.supxlabel("training compute, times that of Looped's whole run", fontsize=9)
    figure.supylabel("held-out loss, median over the seeds", fontsize=9)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def _median_curve(seeds: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Median loss over the seeds, at 200 points up to the compute that all of them spent."""
    curves = [s["curve"] for s in seeds if s["curve"]["flops"]]
    at = np.linspace(0, min(c["flops"][-1] for c in curves), 200)
    return at, np.median([np.interp(at, c["flops"], c["loss"]) for c in curves], axis=0)


def _grid(
    results: Results, height: float, **options: Any
) -> tuple[Figure, list[tuple[Axes, Mapping[str, Any]]]]:
    """A panel for each task, in rows of :data:`COLUMNS`."""
    columns = min(COLUMNS, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(WIDTH, 0.8 + height * rows))
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for spare in panels[len(results) :]:
        spare.set_axis_off()
    for axes, (task, r) in zip(panels, results.items(), strict=False):
        axes.set_title(literal(f"{task} ({r['used_for']})"))
    return figure, list(zip(panels, results.values(), strict=False))
