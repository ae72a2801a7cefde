"""What a suite found: ``summary.json``, ``report.md`` and one picture."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.lm.multiplier import COSTS, Curve, best_fixed, multiplier
from benchmarks.lm.suite import DEEP, Suite
from shift.build import find_device
from shift.comparison.arms import Arm, colours
from shift.report.document import Block, Cell, Code, Heading, Key, Paragraph, Picture, Table, markdown
from shift.report.style import INK, WIDTH, literal, save_figures
from shift.report.words import count, flops
from shift.run.files import json_bytes, replace_atomically
from shift.tasks.shards import INDEX
from shift_kernels.machine import device_name

DEEP_COLOUR = "#444444"


def write_report(
    suite: Suite,
    arms: Mapping[str, Arm],
    rates: Mapping[str, float],
    curves: Mapping[str, Curve],
    out: Path,
    command: str,
) -> Path:
    """Write everything; returns the path of ``report.md``.

    Args:
        suite: what was run.
        arms: by name.
        rates: the factor of the learning rate that each arm was given.
        curves: what has finished.
        out: the suite's directory.
        command: that made it.
    """
    found = summary(suite, arms, rates, curves, command)
    replace_atomically(out / "summary.json", json_bytes(found))
    picture = save_figures({"loss": lambda: loss_figure(arms, curves)}, out)["loss"]
    path = out / "report.md"
    replace_atomically(
        path, markdown("Language models by loops", _blocks(suite, arms, found, picture), out).encode()
    )
    return path


def summary(
    suite: Suite,
    arms: Mapping[str, Arm],
    rates: Mapping[str, float],
    curves: Mapping[str, Curve],
    command: str,
) -> dict[str, Any]:
    """``about``, ``multiplier`` (arm -> budget -> {flops, wall}) and a row a run."""
    reference = best_fixed(curves, suite.fixed, suite.budgets)
    shared = next(iter(arms.values())).config
    data, device = str(shared.task.options["path"]), device_name(find_device(shared.device))
    return {
        "about": {
            "reference": reference,
            "command": command,
            "text": {**suite.text, **json.loads((Path(data) / INDEX).read_text())["splits"]},
            "rates": {name: factor * shared.optimiser.lr for name, factor in rates.items()},
            "tuning_seeds": list(suite.tuning_seeds),
            "config": {name: arm.config.to_dict() for name, arm in arms.items()},
            "machine": {"device": device, "python": platform.python_version()},
            "torch": torch.__version__,
        },
        "multiplier": {
            name: {
                f"{budget:.4g}": {k: multiplier(curves[name], curves[reference], budget, k) for k in COSTS}
                for budget in suite.budgets
            }
            for name in arms
        },
        "columns": ["arm", "budget", "seed", "loss", *COSTS.values()],
        "rows": [
            [name, budget, seed, p.loss, *(p.cost[kind] for kind in COSTS)]
            for name, curve in curves.items()
            for budget, of_seed in curve.items()
            for seed, p in of_seed.items()
        ],
    }


def _blocks(suite: Suite, arms: Mapping[str, Arm], found: Mapping[str, Any], picture: Path) -> list[Block]:
    about = found["about"]
    reference = arms[about["reference"]].label
    seeds = sorted({row[2] for row in found["rows"]})
    colour = arm_colours(arms)
    texts = {
        "flops": f"Compute multiplier at matched loss, FLOPs: over {reference}",
        "wall": "The same in seconds of training",
    }
    blocks: list[Block] = [
        Paragraph(
            f"{count(len(seeds), 'seed')}; each arm's learning rate is from other seeds. {reference} is, "
            f"by hindsight, the best fixed number of loops: 1.10 means that it needs 1.10 times the compute "
            f"for the loss that the arm has there. In brackets: 95%, bootstrap over seeds. A dash: a loss "
            f"that it did not have within its own budgets. Where a criterion decides, a run may spend less "
            f"than its budget. {about['machine']['device']}, torch {about['torch']}."
        ),
        Picture(
            picture, "Loss on the validation split against training compute; lines are means over seeds."
        ),
    ]
    for kind, title in texts.items():
        header = ["arm", *(flops(b) for b in suite.budgets)]
        rows: list[list[Cell]] = [
            [Key(arm.label, colour[name]), *(_cell(at[kind]) for at in found["multiplier"][name].values())]
            for name, arm in arms.items()
        ]
        blocks += [Heading(title), Table(header, rows)]
    rates = [[arm.label, f"{about['rates'][name]:.2g}"] for name, arm in arms.items()]
    blocks += [Heading("Learning rates"), Table(["arm", "rate"], rates)]
    return [*blocks, Paragraph(("Made by ", Code(about["command"]), "."), "note")]


def _cell(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return "-"
    ends = found["ci95"]
    return f"{found['mean']:.2f}" + ("" if ends is None else f" ({ends[0]:.2f} to {ends[1]:.2f})")


def arm_colours(arms: Mapping[str, Arm]) -> dict[str, str]:
    """A colour for each arm."""
    declared = colours([name for name in arms if name != DEEP])
    return {name: declared.get(name, DEEP_COLOUR) for name in arms}


def loss_figure(arms: Mapping[str, Arm], curves: Mapping[str, Curve]) -> Figure:
    """Validation loss against training FLOPs: every run, and each arm's mean."""
    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.subplots()
    for name, colour in arm_colours(arms).items():
        runs = [of_seed.values() for _, of_seed in sorted(curves[name].items()) if of_seed]
        if not runs:
            continue
        for points in runs:
            axes.plot(
                [p.cost["flops"] for p in points],
                [p.loss for p in points],
                "o",
                ms=3,
                color=colour,
                alpha=0.4,
            )
        x = [float(np.exp(statistics.mean(np.log(p.cost["flops"]) for p in points))) for points in runs]
        y = [statistics.mean(p.loss for p in points) for points in runs]
        axes.plot(x, y, color=colour, lw=1.6, label=literal(arms[name].label))
    axes.set_xscale("log")
    axes.set(xlabel="training FLOPs", ylabel="validation loss, nats a token")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return figure
