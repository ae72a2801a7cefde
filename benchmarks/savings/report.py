"""``results.json``, ``summary.json`` and both reports of a suite, from the ``results.json`` of its tasks."""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.savings.families import Results, arm_names, arm_of, colour_of, label
from benchmarks.savings.overall import hindsight, overall
from benchmarks.savings.paired import best_fixed_switch, costs, p_cheaper
from benchmarks.savings.restricted import (
    Choice,
    best_fixed,
    best_t,
    headline,
    lost,
    named,
    oracle,
    restricted_mean,
)
from shift.comparison.arms import AGAIN, SMALLEST, declared
from shift.comparison.ratios import stopped_at
from shift.comparison.summary import write_summary
from shift.comparison.verdict import mean_accuracy
from shift.report.document import (
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
from shift.report.words import count, duration, flops, percent
from shift.run.files import replace_atomically

TITLE = "What looping late saves"
NEVER, NONE = "never", "–"


def ours(results: Results) -> list[str]:
    """The arms that we propose; the others are there to be compared with."""
    return [name for name in arm_names(results) if not declared(name).baseline]


def write_suite_report(results: Results, out: Path) -> list[Path]:
    """Write all three; returns the two reports' paths."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({task: _slim(r) for task, r in results.items()}, indent=1, allow_nan=False)
    replace_atomically(out / "results.json", text.encode())
    write_summary(out / "summary.json", results, {"headline": headline(results)})
    blocks = content(results, _pictures(results, out / "figures"))
    paths = [out / "report.md", out / "report.html"]
    replace_atomically(paths[0], markdown(TITLE, blocks, out).encode())
    replace_atomically(paths[1], web_page(TITLE, blocks).encode())
    return paths


def content(results: Results, pictures: Mapping[str, Path]) -> list[Block]:
    """The report, most important first."""

    def picture(name: str, caption: str) -> list[Block]:
        return [Picture(pictures[name], caption)] if name in pictures else []

    return [
        Paragraph(
            "Each arm trains the same model on the same data from the same weights; arms differ in how many "
            "times they apply the block at each step, and in the variant of the model that some name after "
            "a comma. Compared is the training compute until an arm first "
            "gave 98% of the answers that Looped gave in the end, over what Looped itself needed. "
            + _when_it_ends(results)
        ),
        Heading("Compute to the target, times Looped's"),
        summary_table(results),
        sentences(results),
        Items(
            [
                "Mean of the seeds on which both got there (95% bootstrap interval from 5 seeds on); in "
                "brackets the seeds on which Looped did, and the arm never, or late: after its steps.",
                "Looped on other data: the same weights to begin with, other samples to learn from and to be "
                "asked. What it loses and gains against Looped is chance, and no arm can be expected to "
                "lose less without learning more surely than Looped.",
                "Smallest T: the smallest constant number of loops that got there on every seed. Best fixed "
                "switch: the fewest seeds never, then the least compute, known with hindsight alone; the "
                "best arm of all likewise.",
                "Tuning: tasks on which settings of ours were chosen. Held out: none was. What had been "
                "seen of them before climb got its present form: benchmarks/savings/NOTES.md. SHIFT "
                "and the ramps have their defaults everywhere, and a fixed switch is the best of several.",
            ],
            "note",
        ),
        *picture("ratios", "A dot a seed, a stroke their mean, a bar its 95% interval; ✕: so many seeds "
                 "never, on which Looped did."),
        Heading("The same with no run left out: restricted means"),
        restricted_table(results),
        Items(
            [
                "A run that never got there costs what Looped of its seed spent in all. Mean over "
                "the tasks on which the arm was run of its mean over seeds over the rival's; in brackets "
                "the 95% interval of a bootstrap over tasks and seeds.",
                "CPU time: of the whole process. Seconds: of its steps alone, each as long as a step of its "
                "kind takes on a quiet machine (benchmarks.savings.quiet).",
                "Over the best T: the rival is the task's best constant number of loops, in any variant of "
                "the model, known with hindsight alone.",
            ],
            "note",
        ),
        Heading("Every arm"),
        ratio_table(results),
        Heading("Is it cheaper? One-sided paired tests"),
        test_table(results),
        Heading("Loss against compute"),
        *picture("loss", "Below another line: a lower loss for the same compute. A line ends where the arm's "
                 "cheapest seed did."),
        Heading("Where they switched"),
        switch_table(results),
        Heading("Quality at the end, and at equal compute"),
        quality_table(results),
        Heading("What it took"),
        Paragraph("Medians (smallest to largest) over the seeds that got there. CPU and wall time are of the "
                  "whole process: criterion, switch and evaluations included. Wall time is only worth "
                  "something if nothing else ran on the machine.", "note"),
        cost_table(results),
        Heading("Fairness"),
        fairness_table(results),
    ]  # fmt: skip


def _when_it_ends(results: Results) -> str:
    if all(r["plan"].get("overtime", True) for r in results.values()):
        return (
            "Every arm has Looped's compute to get there: one that has not when its steps are over goes on "
            "until it has spent as much as Looped in all."
        )
    return "Every arm has Looped's steps to get there, over the last of which the learning rate falls to 0."


def sentences(results: Results) -> Items:
    """The sum over all tasks of our arms, of chance, and of hindsight."""
    names = [*ours(results), *(name for name in arm_names(results) if name == AGAIN)]
    return Items([*(overall(results, name) for name in names), hindsight(results)])


def summary_table(results: Results) -> Table:
    """A row a task: the schedules that decide by themselves, and the best that hindsight chooses."""
    names = ours(results)
    rows: list[list[Cell]] = []
    for task, r in results.items():
        smallest, fixed = arm_of(r, SMALLEST), best_fixed_switch(r["arms"])
        cells = [task, r["used_for"], str(len(r["seeds"]))]
        cells += [_ratio(arm_of(r, name)) for name in names]
        cells += [_ratio(smallest) + (f", T = {smallest['n_loops']}" if smallest else "")]
        cells += [f"{_ratio(r['arms'][fixed])}, at {fixed.partition(':')[2]}" if fixed else NONE]
        rows.append(cells)
    labels = [label(results, name) for name in names]
    return Table(["Task", "Used for", "Seeds", *labels, "Looped, smallest T", "Best fixed switch"], rows)


def restricted_table(results: Results) -> Table:
    """A row an arm: restricted means over Looped's, of compute and CPU time, and over the best T's."""
    choices: dict[str, tuple[Choice, str]] = {
        label(results, name): (named(name), str(lost(results, name))) for name in arm_names(results)
    }
    choices["Best constant T of each task, by hindsight"] = best_t, NONE
    choices["Best fixed switch of each task, by hindsight"] = best_fixed, NONE
    choices["Best arm of each task, by hindsight"] = oracle, NONE
    # Seconds of a quiet machine where they were measured, else the CPU's own.
    quiet = restricted_mean(results, named("looped"), measure="quiet_s") is not None
    measure, clock = ("quiet_s", "Seconds") if quiet else ("cpu_s", "CPU time")
    rows: list[list[Cell]] = [
        [
            words,
            interval(restricted_mean(results, choice)),
            interval(restricted_mean(results, choice, measure=measure)),
            interval(restricted_mean(results, choice, best_t)),
            lost_runs,
        ]
        for words, (choice, lost_runs) in choices.items()
    ]
    return Table(["Arm", "Compute, × Looped", f"{clock}, × Looped", "Compute, × best T", "Lost"], rows)


def ratio_table(results: Results) -> Table:
    """A row an arm, a column a task."""
    names = arm_names(results)
    colour = colour_of(results)
    rows: list[list[Cell]] = [
        [Key(label(results, name), colour[name]), *(_ratio(arm_of(r, name)) for r in results.values())]
        for name in names
    ]
    header = ["Arm", *(f"{task} ({r['used_for']})" for task, r in results.items())]
    return Table(header, rows)


def test_table(results: Results) -> Table:
    """SHIFT and our own schedule against Looped, and against the best fixed switch with hindsight."""
    rows: list[list[Cell]] = []
    for task, r in results.items():
        fixed = best_fixed_switch(r["arms"])
        for name in ours(results):
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
        found = [arm_of(r, name) for r in results.values()]
        rows.append(
            [label(results, name), *(percent(mean_accuracy(a["seeds"])) if a else NONE for a in found)]
        )
    for name in ours(results):
        cells: list[Cell] = []
        for r in results.values():
            if name not in r["arms"] or r["config"]["optimiser"]["lr_schedule"] != "constant":
                cells.append(NONE)  # a rate that decays depends on the steps to come
                continue
            budgets = {s["seed"]: s["flops_total"] for s in r["arms"][name]["seeds"]}
            cells.append(percent(mean_accuracy(stopped_at(r["arms"]["looped"]["seeds"], budgets))))
        rows.append([f"Looped, stopped at the compute of {label(results, name)}", *cells])
    return Table(["Arm", *results], rows)


def switch_table(results: Results) -> Table:
    """The step from which each arm that decides by itself ran all T loops, as a share of its run."""
    rows: list[list[Cell]] = []
    for name in arm_names(results):
        if declared(name).decided_by != "criterion":
            continue
        cells: list[Cell] = []
        for r in results.values():
            arm, most = arm_of(r, name), r["config"]["model"]["n_loops"]
            if arm is None:
                cells.append(NONE)
                continue
            steps, seeds = r["config"]["steps"], [s for s in arm["seeds"] if s["final_loops"] is not None]
            at = [100 * (s["switch_step"] or 0) / steps for s in seeds if s["final_loops"] == most]
            words = _spread(at, lambda x: f"{x:.0f}%")
            cells.append(words + (f" [{NEVER}: {len(seeds) - len(at)}]" if len(at) < len(seeds) else ""))
        rows.append([label(results, name), *cells])
    return Table(["Arm", *results], rows)


def cost_table(results: Results) -> Table:
    """What each arm needed to the target, and in all."""
    rows: list[list[Cell]] = []
    for task, r in results.items():
        for arm in r["arms"].values():

            def spread(key: str, words: Callable[[float], str] = "{:.0f}".format, arm: Any = arm) -> str:
                return _spread([s[key] for s in arm["seeds"] if s[key] is not None], words)

            hits = sum(s["flops_to_target"] is not None for s in arm["seeds"])
            rows.append(
                [
                    task,
                    arm["label"],
                    f"{hits} of {len(arm['seeds'])}",
                    spread("steps_to_target"),
                    spread("block_applications_to_target"),
                    spread("flops_to_target", flops),
                    spread("cpu_s_to_target", duration),
                    spread("wall_s_to_target", duration),
                    spread("flops_total", flops),
                    spread("cpu_s", duration),
                ]
            )
    header = ["Task", "Arm", "Reached", "Steps", "Block applications", "Compute", "CPU time", "Wall time",
              "Compute, whole run", "CPU time, whole run"]  # fmt: skip
    return Table(header, rows)


def fairness_table(results: Results) -> Table:
    """The computed checks of all tasks."""
    rows: list[list[Cell]] = [
        [task, Tick(check["ok"]), check["rule"], check["detail"]]
        for task, r in results.items()
        for check in r["fairness"]
    ]
    return Table(["Task", "", "What must hold", "Details"], rows)


def _pictures(results: Results, folder: Path) -> Mapping[str, Path]:
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    from benchmarks.savings.pictures import draw

    return draw(results, folder)


def _ratio(arm: Mapping[str, Any] | None) -> str:
    if arm is None:
        return NONE
    ratio = arm["against_looped"]
    words = []
    if ratio["mean"] is not None:
        words.append(f"{ratio['mean']:.2f}")
        if ratio["ci95"]:
            words.append(f"({ratio['ci95'][0]:.2f}–{ratio['ci95'][1]:.2f})")
    missed = {NEVER: ratio["seeds_never"], "late": ratio["seeds_late"]}
    if any(missed.values()):
        parts = [f"{word}: {count(len(seeds), 'seed')}" for word, seeds in missed.items() if seeds]
        words.append(f"[{', '.join(parts)}]")
    return " ".join(words) or NONE


def interval(found: tuple[float, tuple[float, float]] | None) -> str:
    """A mean and its interval in brackets."""
    if found is None:
        return NONE
    value, (low, high) = found
    return f"{value:.2f} ({low:.2f}–{high:.2f})"


def _slim(r: Mapping[str, Any]) -> dict[str, Any]:
    """Without the curves and what an arm did at every single step, which stay in the tasks' own files."""
    arms = {}
    for name, arm in r["arms"].items():
        left_out = {"curve", "looks"} | ({"loops"} if arm["schedule"]["kind"] == "random" else set())
        seeds = [{k: v for k, v in s.items() if k not in left_out} for s in arm["seeds"]]
        arms[name] = arm | {"seeds": seeds}
    return {k: v for k, v in r.items() if k != "looped_at_shift_compute"} | {"arms": arms}


def _spread(values: Sequence[float], words: Callable[[float], str]) -> str:
    """Median (smallest to largest)."""
    if not values:
        return NONE
    middle, low, high = (words(x) for x in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low}–{high})"
