"""Rows as a report: counts, faults, and a table a stage. Plain Python: no GPU, no torch."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.gpu.cases import AUTOTUNED, CASES, goal
from benchmarks.gpu.work import CRASHED, FAILED, FAULTS, OK, REFUSED, SKIPPED, TIMEOUT, UNFINISHED, WRONG

Row = Mapping[str, Any]

OUTCOMES = (OK, WRONG, FAILED, CRASHED, TIMEOUT, REFUSED, SKIPPED, UNFINISHED)
OURS = ("cuda", "triton")
RIVALS = ("eager", "graphed", "torch", "compile", "flex", AUTOTUNED, "sdpa", "flash")
MOST_FAULTS = 60
"""Lines of faults in the report; the summary has all."""


def spread(times: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / statistics.median(times)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text, columns aligned."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def counts(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """How often a stage had an outcome."""
    found: dict[str, Counter] = {}
    for row in rows:
        found.setdefault(row["stage"], Counter())[row["outcome"]] += 1
    return {stage: {o: c[o] for o in OUTCOMES if c[o]} for stage, c in found.items()}


def brief(row: Row) -> dict[str, Any]:
    """A row with median and spread in the place of every time; rows.jsonl has all."""
    data = dict(row["data"])
    if times := data.pop("times_ms", None):
        data |= dict(median_ms=statistics.median(times), spread=round(spread(times), 4), n_times=len(times))
    return {**row, "data": data}


def count_table(rows: Sequence[Row]) -> str:
    """Counts and seconds, a line a stage."""
    lines = []
    for stage, found in counts(rows).items():
        seconds = sum(row["seconds"] for row in rows if row["stage"] == stage)
        lines.append([stage, *(str(found.get(outcome, "")) for outcome in OUTCOMES), f"{seconds:.0f}"])
    return markdown(["stage", *OUTCOMES, "seconds"], lines)


def fault_list(rows: Sequence[Row]) -> str:
    """A line a fault."""
    faults = [row for row in rows if row["outcome"] in FAULTS]
    lines = [f"- {r['stage']}: {r['name']}: {r['outcome']}: {r['why']}" for r in faults[:MOST_FAULTS]]
    if len(faults) > MOST_FAULTS:
        lines.append(f"- and {len(faults) - MOST_FAULTS} more: see summary.json")
    return "\n".join(lines)


def smoke_table(rows: Sequence[Row]) -> str:
    """Error over that of PyTorch in the same dtype, shape by backend; at most 2 is right."""
    shapes = sorted({(r["data"]["shape"], r["data"]["call"]) for r in rows})
    names = sorted({r["data"]["backend"] for r in rows})
    found = {(r["data"]["shape"], r["data"]["call"], r["data"]["backend"]): r for r in rows}
    lines = []
    for shape in shapes:
        cells = []
        for name in names:
            row = found.get((*shape, name))
            ratio = "" if row is None else row["data"].get("error_ratio")
            cells.append("" if row is None else row["outcome"] if ratio is None else f"{ratio:.2f}")
        lines.append([*shape, *cells])
    return markdown(["shape", "call", *names], lines)


def bench_table(rows: Sequence[Row]) -> str:
    """Medians in ms, a line a case and direction; our best over the best of the others, beside the goal."""
    timed = [r for r in rows if r["data"].get("times_ms")]
    runners = [n for n in (*OURS, *RIVALS) if any(r["data"]["runner"] == n for r in timed)]
    by_case: dict[tuple[str, str], dict[str, Row]] = {}
    for row in timed:
        by_case.setdefault((row["data"]["case"], row["data"]["direction"]), {})[row["data"]["runner"]] = row
    lines = []
    for (case, direction), found in by_case.items():
        ms = {name: statistics.median(row["data"]["times_ms"]) for name, row in found.items()}
        ours = min((n for n in OURS if n in ms), key=ms.__getitem__, default=None)
        other = min((ms[n] for n in RIVALS if n in ms), default=None)
        gain = f"{other / ms[ours]:.2f}x" if ours and other else ""
        wanted = goal(CASES[case]) if direction == "both" and case in CASES else None
        cells = [f"{ms[name]:.4g}" if name in ms else "" for name in runners]
        goals = "" if wanted is None else f">= {wanted:g}x"
        lines.append([case, direction, *cells, gain, goals, _roofline(found, ms, ours), _memory(found, ours)])
    return markdown(
        ["case", "direction", *runners, "ours / others", "goal", "roofline", "memory saved"], lines
    )


def _roofline(found: Mapping[str, Row], ms: Mapping[str, float], ours: str | None) -> str:
    floor = None if ours is None else found[ours]["data"]["floor_ms"]
    return "" if floor is None or ours is None else f"{floor / ms[ours]:.0%}"


def _memory(found: Mapping[str, Row], ours: str | None) -> str:
    """How many times less ours keeps for the backward than eager does."""
    kept = [found[name]["data"].get("kept_bytes") for name in (ours, "eager") if name in found]
    return f"{kept[1] / kept[0]:.1f}x" if len(kept) == 2 and all(kept) else ""


def slope_table(rows: Sequence[Row]) -> str:
    """What a loop costs, beside copying the residual stream once."""
    data = [row["data"] for row in rows if "slope_ms" in row["data"]]
    lines = [
        [d["case"], d["runner"], *(f"{d[key]:.4g}" for key in ("slope_ms", "intercept_ms", "stream_ms"))]
        for d in data
    ]
    return markdown(["case", "runner", "ms a loop", "ms beside", "ms to copy the stream"], lines)


def tune_table(rows: Sequence[Row]) -> str:
    """The fastest configuration of each kernel and shape, over the one in use."""
    by_shape: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["data"].get("ms") is not None:
            by_shape.setdefault((row["data"]["case"], row["data"]["kernel"]), []).append(row["data"])
    lines = []
    for (case, kernel), found in by_shape.items():
        best = min(found, key=lambda d: d["ms"])
        used = next((d["ms"] for d in found if d["in_use"]), None)
        gain = "" if used is None else f"{used / best['ms']:.2f}x"
        lines.append([case, kernel, str(best["config"]), f"{best['ms']:.4g}", gain, str(len(found))])
    return markdown(["case", "kernel", "fastest", "ms", "over the one in use", "tried"], lines)


def training_table(rows: Sequence[Row]) -> str:
    """Figures of training, as each case names them."""
    lines = [[row["name"], key, f"{value:.6g}" if isinstance(value, float) else str(value)]
             for row in rows for key, value in row["data"].items()]  # fmt: skip
    return markdown(["case", "figure", "value"], lines)


def _where(key: str, *stages: str) -> Callable[[Sequence[Row]], list[Row]]:
    return lambda rows: [row for row in rows if row["stage"] in stages and key in row["data"]]


SECTIONS: dict[str, tuple[Callable[[Sequence[Row]], list[Row]], Callable[[Sequence[Row]], str]]] = {
    "Error over that of PyTorch in the same dtype (at most 2 is right)": (
        _where("shape", "smoke"),
        smoke_table,
    ),
    "Milliseconds": (_where("times_ms", "bench", "autotune"), bench_table),
    "Cost of a loop": (_where("slope_ms", "bench"), slope_table),
    "Tuning": (_where("ms", "tune"), tune_table),
    "Training": (lambda rows: [r for r in rows if r["stage"] == "training" and r["data"]], training_table),
}
"""By heading: which rows, and how they are shown."""


def text(machine: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The whole report."""
    parts = ["\n".join(f"{key}: {value}" for key, value in machine.items())]
    for heading, (choose, show) in SECTIONS.items():
        if chosen := choose(rows):
            parts.append(f"{heading}\n\n{show(chosen)}")
    if faults := fault_list(rows):
        parts.append(f"Faults\n\n{faults}")
    parts.append(f"Stages\n\n{count_table(rows)}")
    return "\n\n".join(parts) + "\n"
