"""``report.md`` and ``report.html`` of a comparison, from ``results.json`` alone."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shift.comparison.arms import colours
from shift.comparison.verdict import caveat, mean_accuracy, verdict
from shift.report.document import (
    Block,
    Cell,
    Code,
    Heading,
    Items,
    Key,
    Paragraph,
    Picture,
    Share,
    Table,
    Text,
    Tick,
    markdown,
    web_page,
)
from shift.report.words import count, duration, each, flops, goal, percent
from shift.run.files import replace_atomically

NEVER, NONE = "never", "–"

NO_PICTURES = ("No pictures: matplotlib is not installed (", Code("pip install matplotlib"), " brings it).")

CAPTIONS = {
    "cost": "Training compute until the target was first reached: a dot is a seed, a bar the mean over the "
    "seeds that got there, a cross a seed that never did.",
    "curves": "Right answers and loss on held-out data, every seed. Against steps (left) one pass and many "
    "passes cost the same; against compute (right) they don't, and that is the fair view.",
    "loops": "How many times each arm applies the block at each training step: the shaded area is its cost.",
    "criterion": "What the criterion looks at, every seed. When both signals stay below their thresholds "
    "(shaded) for enough looks in a row, it fires, and the number of loops rises.",
}


def write_report(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write the pictures, ``report.md`` and ``report.html``; returns the two reports' paths.

    Without matplotlib the reports have no pictures, and say so.
    """
    pictures: dict[str, Path] = {}
    if importlib.util.find_spec("matplotlib") is not None:
        from shift.comparison.figures import draw

        pictures = draw(results, directory / "figures")
    blocks = content(results, pictures)
    paths = [directory / "report.md", directory / "report.html"]
    replace_atomically(paths[0], markdown(title(results), blocks, directory).encode())
    replace_atomically(paths[1], web_page(title(results), blocks).encode())
    return paths


def title(results: Mapping[str, Any]) -> Text:
    """Of the report."""
    return "SHIFT against Looped on ", Code(str(results["task"].get("name")))


def content(results: Mapping[str, Any], pictures: Mapping[str, Path]) -> list[Block]:
    """The report, most important first."""
    figures = {name: Picture(path, CAPTIONS[name]) for name, path in pictures.items()}
    first, *rest = verdict(results)
    blocks: list[Block | None] = [
        Paragraph(_introduction(results)),
        Paragraph(first, "lead"),
        Items(rest) if rest else None,
        Paragraph(warning, "note") if (warning := caveat(results)) else None,
        Heading("Compute to reach the target"),
        figures.get("cost"),
        headline_table(results),
        Items(_rules(results), "note"),
        Heading("How they learn"),
        figures.get("loops"),
        figures.get("curves"),
        Heading("Right answers by difficulty"),
        group_table(results),
        Heading("Why they switched when they did") if "criterion" in figures else None,
        figures.get("criterion"),
        Heading("Is it fair?"),
        fairness_table(results),
        Heading("Every run"),
        seed_table(results),
        Heading("How to repeat it"),
        Items(_environment(results)),
        None if pictures else Paragraph(NO_PICTURES, "note"),
    ]
    return [block for block in blocks if block is not None]


def headline_table(results: Mapping[str, Any]) -> Table:
    """A row an arm, and one for Looped as it stood at SHIFT's compute."""
    arms = results["arms"]
    colour = colours(list(arms))
    smallest = results["smallest_sufficient"]["arm"]
    rows: list[list[Cell]] = []
    for name, arm in arms.items():
        seeds = arm["seeds"]
        label = arm["label"] + (" (smallest T enough)" if name == smallest else "")
        switches = [s["switch_step"] for s in seeds if s["switch_step"] is not None]
        rows.append(
            [
                Key(label, colour[name]),
                _accuracies(seeds),
                _reached(seeds),
                _ratio(arm.get("against_looped")),
                flops(_mean(s["flops_total"] for s in seeds)),
                duration(_mean(s["wall_s"] for s in seeds)),
                each(switches) or NONE,
            ]
        )
        if name == "looped" and results.get("looped_at_shift_compute", {}).get("seeds"):
            rows.append(_stopped_row(results["looped_at_shift_compute"], colour[name]))
    header = ["Arm", "Right answers at the end (by seed)", "Reached the target", "Compute to it, × Looped",
              "Compute in all", "Wall time", "Last switch at step"]  # fmt: skip
    return Table(header, rows)


def group_table(results: Mapping[str, Any]) -> Table:
    """Mean final accuracy of each arm in each difficulty class."""
    arms = results["arms"]
    colour = colours(list(arms))
    groups = list(dict.fromkeys(g for arm in arms.values() for s in arm["seeds"] for g in s["final_groups"]))
    rows: list[list[Cell]] = []
    for name, arm in arms.items():
        cells: list[Cell] = [Key(arm["label"], colour[name])]
        for group in groups:
            mean = _mean(s["final_groups"].get(group) for s in arm["seeds"])
            cells.append(NONE if mean is None else Share(mean, percent(mean)))
        rows.append(cells)
    return Table(["Arm", *groups], rows)


def seed_table(results: Mapping[str, Any]) -> Table:
    """A row a run."""
    colour = colours(list(results["arms"]))
    rows: list[list[Cell]] = []
    for name, arm in results["arms"].items():
        ratios = arm.get("against_looped", {}).get("per_seed", {})
        for s in arm["seeds"]:
            ratio = ratios.get(str(s["seed"]))
            rows.append(
                [
                    Key(arm["label"], colour[name]),
                    str(s["seed"]),
                    s["failure"] or percent(s["final_accuracy"]),
                    NEVER if s["steps_to_target"] is None else str(s["steps_to_target"]),
                    NEVER if s["flops_to_target"] is None else flops(s["flops_to_target"]),
                    NONE if ratio is None else f"{ratio:.2f}",
                    flops(s["flops_total"]),
                    duration(s["wall_s"]),
                    NONE if s["switch_step"] is None else str(s["switch_step"]),
                    str(s["skipped_steps"]),
                ]
            )
    header = ["Arm", "Seed", "Right answers", "Steps to target", "Compute to target", "× Looped",
              "Compute in all", "Wall time", "Last switch at step", "Skipped steps"]  # fmt: skip
    return Table(header, rows)


def fairness_table(results: Mapping[str, Any]) -> Table:
    """The computed checks, each ticked or crossed."""
    checks = results["fairness"]
    return Table(["", "What must hold", "Found"], [[Tick(c["ok"]), c["rule"], c["detail"]] for c in checks])


def _introduction(results: Mapping[str, Any]) -> Text:
    seeds, task = count(len(results["seeds"]), "seed"), str(results["task"].get("name"))
    most = results["config"].get("model", {}).get("n_loops")
    return (
        f"A looped transformer applies one block of layers T times: that solves problems which one pass "
        f"cannot, and makes a training step about T times as expensive. SHIFT trains with one pass first, "
        f"watches loss and gradient, and begins to loop (here T = {most}) when they no longer move; the "
        f"question is whether it gets to the same accuracy with less computing. To answer it, "
        f"{len(results['arms'])} ways to train the same model on the task ",
        Code(task),
        f" were each run with {seeds}, from the same initial weights and on the same data, "
        f"and compared by the compute they needed until they gave {goal(results['target_accuracy'])} "
        f"right answers on held-out data.",
    )


def _rules(results: Mapping[str, Any]) -> list[str]:
    smallest, stopped = results["smallest_sufficient"], results.get("looped_at_shift_compute")
    found = (
        "none of them is" if smallest["n_loops"] is None else f"{smallest['n_loops']} is the smallest that is"
    )
    rules = [
        "Compute: floating-point operations of the matrix products, forward and backward, from the first "
        "step on.",
        f"Target: {results['plan']['target_rule']}; reached at {results['crossing_rule']} "
        f"(one every {results['config'].get('eval_every')} steps).",
        "× Looped: compute to the target over that of the Looped run with the same seed, mean over the seeds "
        "where both reached it (smallest to largest); below 1 is cheaper than Looped.",
        f"Constant T tried: {', '.join(map(str, smallest['tried']))}; {found} enough on all seeds.",
        "Wall time: taken with several runs side by side on the machine.",
    ]
    if results["plan"].get("overtime"):
        rules.append(
            "A run that was not at the target after its steps went on until it had spent as much compute as "
            "Looped of its seed in all; the end is then that."
        )
    if stopped and stopped["valid"]:
        rules.append(
            "Looped, stopped: read off Looped's own evaluations, on a line between the two nearest, at the "
            "compute that SHIFT used in all on the same seed. A run given no more would have stood there, as "
            "the learning rate is constant after its warm-up."
        )
    elif stopped:
        rules.append(
            "Looped, stopped at SHIFT's compute, can't be read off Looped's evaluations: the learning rate "
            "depends on the number of steps to come."
        )
    return rules


def _stopped_row(row: Mapping[str, Any], colour: str) -> list[Cell]:
    label = "Looped, stopped at SHIFT's compute"
    if not row["valid"]:
        return [Key(label, colour), "not valid: the learning rate decays", *[NONE] * 5]
    seeds = row["seeds"]
    return [
        Key(label, colour), _accuracies(seeds), _reached(seeds), NONE,
        flops(_mean(s["flops_total"] for s in seeds)), NONE, NONE,
    ]  # fmt: skip


def _accuracies(seeds: Sequence[Mapping[str, Any]]) -> str:
    known = [percent(s["final_accuracy"])[:-1] for s in seeds if s["final_accuracy"] is not None]
    return f"{percent(mean_accuracy(seeds))} ({each(known)})"


def _reached(seeds: Sequence[Mapping[str, Any]]) -> str:
    hits = sum(s["flops_to_target"] is not None for s in seeds)
    return f"{hits} of {count(len(seeds), 'seed')}"


def _ratio(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return NONE
    words = []
    if ratio["mean"] is not None:
        spread = f"{ratio['min']:.2f} to {ratio['max']:.2f}"
        interval = f"; 95% interval {ratio['ci95'][0]:.2f} to {ratio['ci95'][1]:.2f}" if ratio["ci95"] else ""
        words.append(f"{ratio['mean']:.2f} ({spread}{interval})")
    if ratio["seeds_never"]:
        words.append(f"{NEVER} on {len(ratio['seeds_never'])}")
    return ", ".join(words) or NONE


def _environment(results: Mapping[str, Any]) -> list[Text]:
    machine, versions = results["machine"] or {}, results["versions"] or {}
    return [
        ("Command: ", Code(results["plan"]["command"])),
        f"Started: {results['plan']['created']}",
        ("Commit: ", Code(results["commit"] or "unknown")),
        "Machine: " + ", ".join(f"{key} {value}" for key, value in machine.items() if value),
        "Versions: " + ", ".join(f"{key} {value}" for key, value in versions.items()),
        "Task: " + _table_words(results["task"].get("options", {})),
        "Model: " + _table_words(results["config"].get("model", {})),
        "Optimiser: " + _table_words(results["config"].get("optimiser", {})),
        "Else: " + _table_words({k: v for k, v in results["config"].items() if not isinstance(v, dict)}),
        *((f"{arm['label']}: ", Code(str(arm["schedule"]))) for arm in results["arms"].values()),
    ]


def _table_words(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in table.items()) or "defaults"


def _mean(values: Any) -> float | None:
    values = [value for value in values if value is not None]
    return statistics.mean(values) if values else None
