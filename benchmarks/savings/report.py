"""``results.json``, ``report.md`` and ``report.html`` of a suite, from its tasks' ``results.json``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.savings.paired import best_fixed_switch, costs, p_cheaper
from shift.arms import colours
from shift.document import (
    Block,
    Cell,
    Heading,
    Items,
    Key,
    Paragraph,
    Picture,
    Table,
    Tick,
    markdown,
    web_page,
)
from shift.files import replace_atomically
from shift.ratios import stopped_at
from shift.verdict import mean_accuracy
from shift.words import count, duration, flops, percent

TITLE = "What looping late saves"
NEVER, NONE = "never", "–"
OURS = ("shift", "climb")

Results = Mapping[str, Mapping[str, Any]]
"""Task -> ``results.json`` of its comparison, with ``used_for``."""


def write_suite_report(results: Results, out: Path) -> list[Path]:
    """Write all three; returns the two reports' paths."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({task: _slim(r) for task, r in results.items()}, indent=1, allow_nan=False)
    replace_atomically(out / "results.json", text.encode())
    blocks = content(results, _picture(results, out / "figures"))
    paths = [out / "report.md", out / "report.html"]
    replace_atomically(paths[0], markdown(TITLE, blocks, out).encode())
    replace_atomically(paths[1], web_page(TITLE, blocks).encode())
    return paths


def content(results: Results, picture: Path | None) -> list[Block]:
    """The report, most important first."""
    blocks: list[Block] = [
        Paragraph(
            "Each arm trains the same model on the same data from the same weights; arms differ in how many "
            "times they apply the block at each step. Compared is the training compute until an arm first "
            "gave 98% of the answers that Looped gave in the end, over what Looped itself needed."
        ),
        Heading("Compute to the target, times Looped's"),
    ]
    if picture is not None:
        blocks.append(
            Picture(picture, "Mean over the seeds where both arms got there, with 95% intervals; a cross: "
                    "never on at least one seed on which Looped did.")
        )  # fmt: skip
    blocks += [
        ratio_table(results),
        Items(
            [
                "Mean of the seeds on which both got there (95% bootstrap interval from 5 seeds on); in "
                "brackets the seeds on which the arm never did and Looped did.",
                "Tuning: tasks on which settings of ours were chosen. Held out: never looked at before.",
                "Single longer: one pass, for as many steps as Looped's compute pays for.",
            ],
            "note",
        ),
        Heading("Is it cheaper? One-sided paired tests"),
        test_table(results),
        Heading("Quality at the end, and at equal compute"),
        quality_table(results),
        Heading("What it took"),
        cost_table(results),
        Heading("Fairness"),
        fairness_table(results),
    ]
    return blocks


def arm_names(results: Results) -> list[str]:
    """All arms, those whose names hold a measured number (matched, smallest T) under one name each."""
    return list(dict.fromkeys(_family(name) for r in results.values() for name in r["arms"]))


def ratio_table(results: Results) -> Table:
    """A row an arm, a column a task."""
    names = arm_names(results)
    colour = colours([n for n in names if n not in ("smallest", "matched")])
    rows: list[list[Cell]] = []
    for name in names:
        label: Cell = Key(_label(results, name), colour[name]) if name in colour else _label(results, name)
        rows.append([label, *(_ratio(_arm(r, name)) for r in results.values())])
    header = ["Arm", *(f"{task} ({r['used_for']})" for task, r in results.items())]
    return Table(header, rows)


def test_table(results: Results) -> Table:
    """SHIFT and our own schedule against Looped, and against the best fixed switch with hindsight."""
    rows: list[list[Cell]] = []
    for task, r in results.items():
        fixed = best_fixed_switch(r["arms"])
        for name in OURS:
            if name not in r["arms"]:
                continue
            own = costs(r["arms"][name]["seeds"])
            cells: list[Cell] = [task, r["arms"][name]["label"]]
            for other in ("looped", fixed):
                cells.append(f"{p_cheaper(own, costs(r['arms'][other]['seeds'])):.3f}" if other else NONE)
            cells += [_ratio(r["arms"][name]), NONE if fixed is None else _ratio(r["arms"][fixed])]
            cells.append(NONE if fixed is None else fixed)
            rows.append(cells)
    header = ["Task", "Arm", "p, cheaper than Looped", "p, cheaper than the best fixed switch",
              "× Looped", "best fixed × Looped", "which"]  # fmt: skip
    return Table(header, rows)


def quality_table(results: Results) -> Table:
    """Final accuracies, and Looped stopped at SHIFT's compute."""
    names = arm_names(results)
    rows: list[list[Cell]] = []
    for name in names:
        found = [_arm(r, name) for r in results.values()]
        rows.append(
            [_label(results, name), *(percent(mean_accuracy(a["seeds"])) if a else NONE for a in found)]
        )
    for name in (name for name in OURS if name in names):
        cells: list[Cell] = []
        for r in results.values():
            if name not in r["arms"]:
                cells.append(NONE)
                continue
            budgets = {s["seed"]: s["flops_total"] for s in r["arms"][name]["seeds"]}
            cells.append(percent(mean_accuracy(stopped_at(r["arms"]["looped"]["seeds"], budgets))))
        rows.append([f"Looped, stopped at the compute of {_label(results, name)}", *cells])
    return Table(["Arm", *results], rows)


def cost_table(results: Results) -> Table:
    """Steps, block applications and FLOPs to the target, and wall time of whole runs; means."""
    rows: list[list[Cell]] = []
    for task, r in results.items():
        for arm in r["arms"].values():
            mean = lambda key, arm=arm: _mean(s[key] for s in arm["seeds"])  # noqa: E731
            steps, blocks = mean("steps_to_target"), mean("block_applications_to_target")
            hits = sum(s["flops_to_target"] is not None for s in arm["seeds"])
            cells: list[Cell] = [task, arm["label"], f"{hits} of {len(arm['seeds'])}"]
            cells += [NONE if x is None else f"{x:.0f}" for x in (steps, blocks)]
            cells += [flops(mean("flops_to_target")), flops(mean("flops_total")), duration(mean("wall_s"))]
            rows.append(cells)
    header = ["Task", "Arm", "Reached", "Steps to target", "Block applications to it", "Compute to it",
              "Compute in all", "Wall time, whole run"]  # fmt: skip
    return Table(header, rows)


def fairness_table(results: Results) -> Table:
    """The computed checks of all tasks."""
    rows: list[list[Cell]] = [
        [task, Tick(check["ok"]), check["rule"], check["detail"] if not check["ok"] else ""]
        for task, r in results.items()
        for check in r["fairness"]
    ]
    return Table(["Task", "", "What must hold", "Where not"], rows)


def _picture(results: Results, folder: Path) -> Path | None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in arm_names(results) if n not in ("looped", "single", "longer")]
    colour = colours([n for n in names if n not in ("smallest", "matched")])
    figure, axes = plt.subplots(
        1, len(results), figsize=(2.0 + 1.7 * len(results), 1.2 + 0.26 * len(names)), sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axis, (task, r) in zip(axes[0], results.items(), strict=True):
        for y, name in enumerate(names):
            arm = _arm(r, name)
            ratio = (arm or {}).get("against_looped")
            if not ratio or ratio["mean"] is None:
                continue
            shade = colour.get(name, "black")
            low, high = ratio["ci95"] or (ratio["min"], ratio["max"])
            axis.plot([low, high], [y, y], color=shade, linewidth=2)
            axis.plot(ratio["mean"], y, "x" if ratio["seeds_never"] else "o", color=shade)
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.set_xlim(0, 2)
        axis.set_title(f"{task}\n{r['used_for']}", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0][0].set_yticks(range(len(names)), [_label(results, n) for n in names], fontsize=8)
    axes[0][0].invert_yaxis()
    figure.supxlabel("compute to the target, times Looped's", fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "ratios.png", dpi=110)
    plt.close(figure)
    return folder / "ratios.png"


def _family(name: str) -> str:
    key, colon, _ = name.partition(":")
    return {"looped": "smallest", "matched": "matched"}.get(key, name) if colon else name


def _arm(r: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    if name == "smallest":
        found = r["smallest_sufficient"]["arm"]
        return None if found in (None, "looped") else r["arms"][found]
    return next((arm for own, arm in r["arms"].items() if _family(own) == name), None)


def _label(results: Results, name: str) -> str:
    if name == "smallest":
        return "Looped, smallest sufficient T"
    if name == "matched":
        return "1 or T at random, SHIFT's mean"
    if name == "looped":
        return "Looped"
    return next(arm["label"] for r in results.values() if (arm := _arm(r, name)))


def _ratio(arm: Mapping[str, Any] | None) -> str:
    if arm is None:
        return NONE
    ratio = arm["against_looped"]
    words = []
    if ratio["mean"] is not None:
        words.append(f"{ratio['mean']:.2f}")
        if ratio["ci95"]:
            words.append(f"({ratio['ci95'][0]:.2f}–{ratio['ci95'][1]:.2f})")
    if ratio["seeds_never"]:
        words.append(f"[{NEVER}: {count(len(ratio['seeds_never']), 'seed')}]")
    return " ".join(words) or NONE


def _slim(r: Mapping[str, Any]) -> dict[str, Any]:
    """Without the curves, which stay in the tasks' own files."""
    arms = {
        name: arm
        | {"seeds": [{k: v for k, v in s.items() if k not in ("curve", "looks")} for s in arm["seeds"]]}
        for name, arm in r["arms"].items()
    }
    return {k: v for k, v in r.items() if k != "looped_at_shift_compute"} | {"arms": arms}


def _mean(values: Any) -> float | None:
    found: Sequence[float] = [v for v in values if v is not None]
    return statistics.mean(found) if found else None
