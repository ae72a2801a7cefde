"""The pictures of a comparison, drawn from ``results.json`` alone. Needs matplotlib (extra ``plots``)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from shift.comparison.arms import colours
from shift.report.style import FAINT, INK, SHADE, WIDTH, literal, save_figures
from shift.report.words import flops_unit


def draw(results: Mapping[str, Any], directory: Path) -> dict[str, Path]:
    """Draw what the results have data for; returns the PNG files by name.

    ``cost`` (compute to the target, each seed), ``curves`` (loss and accuracy against steps and compute),
    ``loops`` (loops at each step) and ``criterion`` (SHIFT's two signals).
    """
    return save_figures(
        {
            "cost": lambda: cost_figure(results),
            "curves": lambda: curves_figure(results),
            "loops": lambda: loops_figure(results),
            "criterion": lambda: criterion_figure(results),
        },
        directory,
    )


def cost_figure(results: Mapping[str, Any]) -> Figure | None:
    """Compute to the target: an arm a row, a dot a seed; what never got there stands apart, on the right."""
    arms, unit, target = results["arms"], Unit(results), results["target_accuracy"]
    if target is None:
        return None
    colour = colours(list(arms))

    def costs(name: str) -> list[float]:
        return [
            unit.of(s["flops_to_target"]) for s in arms[name]["seeds"] if s["flops_to_target"] is not None
        ]

    def misses(name: str) -> int:
        return len(arms[name]["seeds"]) - len(costs(name))

    names = sorted(arms, key=lambda name: (misses(name), statistics.mean(costs(name) or [0])))
    figure = Figure(figsize=(WIDTH, 1.1 + 0.5 * len(names)))
    axes = figure.subplots()
    right = 1.06 * max([cost for name in names for cost in costs(name)], default=1)
    never_x, ratio_x, head_y = 1.075 * right, 1.25 * right, -0.9
    axes.axvspan(1.02 * right, 1.13 * right, color=SHADE, lw=0)
    axes.text(never_x, head_y, "never", ha="center", va="center", color=FAINT)
    for row, name in enumerate(names):
        own, found = colour[name], costs(name)
        gap = min(0.11, 0.55 / max(len(found) - 1, 1))  # equal costs must not hide each other
        apart = [row + gap * (i - (len(found) - 1) / 2) for i in range(len(found))]
        axes.plot(found, apart, "o", ms=7.5 if len(found) <= 5 else 6, color=own, mec="white", mew=1)
        if found:
            axes.plot(statistics.mean(found), row, "|", ms=21, mew=2.5, color=own, zorder=1.9)
        if misses(name):
            count = "all" if not found else f"{misses(name)}"
            axes.text(never_x, row, f"✕ {count}", ha="center", va="center", color=_text_colour(own))
        ratio = arms[name].get("against_looped", {}).get("mean")
        if ratio is not None:
            text, ink = (f"({ratio:.2f})", FAINT) if misses(name) else (f"{ratio:.2f}", INK)
            axes.text(ratio_x, row, text, ha="center", va="center", color=ink)
    if "looped" in arms:
        axes.text(ratio_x, head_y, "× Looped", ha="center", va="center", color=FAINT)
    axes.set(xlim=(0, 1.13 * right), ylim=(len(names) - 0.5, head_y - 0.3))
    axes.set_yticks(range(len(names)), [literal(arms[name]["label"]) for name in names], fontweight="bold")
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(_text_colour(colour[name]))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= right])
    axes.set_xlabel(f"training compute to reach {100 * target:.4g}% right answers ({unit.name})")
    return figure


def curves_figure(results: Mapping[str, Any]) -> Figure:
    """Held-out loss and accuracy, against steps and against compute; a line a seed, a ring at a switch."""
    arms, unit = results["arms"], Unit(results)
    colour = colours(list(arms))
    figure = Figure(figsize=(WIDTH, 6.6))
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    for name, arm in arms.items():
        alpha = 0.75 if len(arms) <= 6 or name in ("single", "looped", "shift") else 0.3
        for facts in arm["seeds"]:
            curve = facts["curve"]
            compute = [unit.of(flops) for flops in curve["flops"]]
            at = _switch_index(facts)
            for row, key in enumerate(("accuracy", "loss")):
                for column, x in enumerate((curve["step"], compute)):
                    axes: Axes = grid[row][column]
                    axes.plot(x, curve[key], color=colour[name], lw=1.3, alpha=alpha)
                    if at is not None:
                        axes.plot(
                            x[at], curve[key][at], "o", ms=6, mfc="white", mec=colour[name], mew=1.6, zorder=4
                        )
    if results["target_accuracy"] is not None:
        for axes in grid[0]:
            axes.axhline(results["target_accuracy"], color=INK, lw=1, ls=(0, (4, 3)), zorder=1)
        grid[0][0].text(0, results["target_accuracy"] - 0.012, "target", va="top", fontsize=9, color=INK)
    grid[0][0].yaxis.set_major_formatter(PercentFormatter(1.0))
    grid[0][0].set(title="Right answers, held-out data", ylim=(None, 1.03))
    grid[1][0].set(title="Loss, held-out data (nats)", ylim=(0, None), xlabel="training steps")
    grid[1][1].set(xlabel=f"training compute ({unit.name})", xlim=(0, None))
    handles = [grid[0][0].plot([], color=colour[name], lw=3)[0] for name in arms]
    labels = [literal(arm["label"]) for arm in arms.values()]
    if any(_switch_index(facts) is not None for arm in arms.values() for facts in arm["seeds"]):
        handles += grid[0][0].plot([], "o", ms=6, mfc="white", mec=FAINT, mew=1.6)
        labels.append("the switch")
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, handlelength=1.2)
    return figure


def loops_figure(results: Mapping[str, Any]) -> Figure:
    """Loops at each step, an arm a row: what the arms are, and what their steps cost."""
    arms = results["arms"]
    colour = colours(list(arms))
    most = max((n for arm in arms.values() for s in arm["seeds"] for _, n in s["loops"]), default=1)
    last_step = max(
        (s["curve"]["step"][-1] for arm in arms.values() for s in arm["seeds"] if s["loops"]), default=1
    )
    figure = Figure(figsize=(WIDTH, 0.6 + 0.62 * len(arms)))
    rows = figure.subplots(len(arms), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, arm) in zip(rows, arms.items(), strict=True):
        for facts in arm["seeds"]:
            if not facts["loops"]:
                continue
            steps, loops = zip(*facts["loops"], strict=True)
            x, y = [*(step - 1 for step in steps), facts["curve"]["step"][-1]], [*loops, loops[-1]]
            axes.fill_between(x, y, step="post", color=colour[name], alpha=0.5 / len(arm["seeds"]), lw=0)
            axes.step(x, y, where="post", color=colour[name], lw=1.4)
        axes.set(ylim=(0, most + 0.6), yticks=range(0, most + 1, max(1, most // 2)))
        axes.text(-0.07, 0.5, literal(arm["label"]), transform=axes.transAxes, ha="right", va="center",
                  color=_text_colour(colour[name]), fontweight="bold")  # fmt: skip
    rows[0].set_title("Loops at each training step")
    rows[-1].set(xlabel="training steps", xlim=(0, last_step))
    return figure


def criterion_figure(results: Mapping[str, Any]) -> Figure | None:
    """The two signals that a criterion looks at, their limits, an arm a row; a ring where it fires."""
    arms = {
        name: arm
        for name, arm in results["arms"].items()
        if arm["criterion"] and any(facts["looks"] for facts in arm["seeds"])
    }
    if not arms:
        return None
    colour = colours(list(results["arms"]))
    figure = Figure(figsize=(WIDTH, 0.6 + 2.3 * len(arms)))
    grid = figure.subplots(len(arms), 2, squeeze=False)
    signals = (("improvement", "delta_1", "δ₁"), ("grad_change", "delta_2", "δ₂"))
    for panels, (name, arm) in zip(grid, arms.items(), strict=True):
        for axes, signal in zip(panels, signals, strict=True):
            _signal_panel(axes, arm, signal, colour[name])
        panels[0].set_ylabel(f"{literal(arm['label'])}\n{arm['criterion']['change']} change")
    for axes, question in zip(
        grid[0], ("Does the loss still move?", "Does the gradient norm still move?"), strict=True
    ):
        axes.set_title(question)
    grid[-1][0].set(xlabel="training steps (a ring: the criterion fires, the loops begin)")
    return figure


def _signal_panel(axes: Axes, arm: Mapping[str, Any], signal: tuple[str, str, str], colour: str) -> None:
    """One signal of one arm: a line a seed, the limit, and what lies below it shaded."""
    key, threshold, symbol = signal
    limit = arm["criterion"][threshold]
    most = max(abs(look[key]) for facts in arm["seeds"] for look in facts["looks"])
    top = min(max(1.1 * most, 1.5 * limit), 6 * limit)  # the first looks may be far above
    axes.axhspan(0, limit, color=SHADE, lw=0, zorder=0)
    axes.axhline(limit, color=INK, lw=1, ls=(0, (4, 3)))
    axes.text(1.0, limit, f" {symbol} = {limit:g}", va="center", fontsize=9.5,
              transform=axes.get_yaxis_transform(), color=INK)  # fmt: skip
    for facts in arm["seeds"]:
        steps = [look["step"] for look in facts["looks"]]
        line = [abs(look[key]) for look in facts["looks"]]
        axes.plot(steps, line, color=colour, lw=1.3, alpha=0.75, marker=".", ms=4)
        for look in facts["looks"]:
            if look["fired"]:
                axes.plot(look["step"], abs(look[key]), "o", ms=8, mfc="white", mec=colour, mew=1.8, zorder=4,
                          clip_on=False)  # fmt: skip
    axes.set(xlim=(0, None), ylim=(0, top))


class Unit:
    """The unit of compute that suits the most expensive run."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        most = max((s["flops_total"] for arm in results["arms"].values() for s in arm["seeds"]), default=0)
        self._scale, self.name = flops_unit(most)

    def of(self, flops: float) -> float:
        """The number of units."""
        return flops / self._scale


def _switch_index(facts: Mapping[str, Any]) -> int | None:
    """The last evaluation before the switch of a run that switches once, not of one that ramps."""
    if len(facts["loops"]) != 2:
        return None
    steps = facts["curve"]["step"]
    return sum(step < facts["loops"][1][0] for step in steps) - 1


def _text_colour(colour: str) -> str:
    """A darker tone: letters are thinner than lines."""
    return "#" + "".join(f"{round(0.75 * int(colour[i : i + 2], 16)):02x}" for i in (1, 3, 5))
