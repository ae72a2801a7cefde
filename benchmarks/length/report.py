"""Accuracy beyond the lengths of training, by way to train: tables over seeds, and a heat map.

    python -m benchmarks.length.report runs/length/parity --lengths 10 20 30 40 --out DIR

Reads the finished runs of a comparison, ``<arm>/seed-<n>``. ``benchmarks.length.run`` does all at once.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shift.comparison.arms import FAMILIES
from shift.length.heat_map import heat_map
from shift.length.report import CAPTION
from shift.length.sweep import RULES, SweepConfig, sweep
from shift.reading import read_json
from shift.report.document import Block, Cell, Code, Heading, Items, Paragraph, Picture, Table, markdown
from shift.report.rows import write_rows
from shift.report.words import each, flops, percent
from shift.run.files import replace_atomically

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Arm -> seed -> ``sweep`` (:func:`shift.length.sweep.sweep`) and ``result`` (a run's ``result.json``)."""

KEPT = ("flops_total", "switch_step", "skipped_steps", "machine", "versions", "commit")
"""What is kept of a run's ``result.json``."""


def measure(comparison: Path, config: SweepConfig) -> Results:
    """Sweep the finished runs of a comparison, arms in the order of ``arms.FAMILIES``."""
    order = list(FAMILIES)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    paths = sorted(comparison.glob("*/seed-*/result.json"), key=lambda path: int(path.parts[-2][5:]))
    for path in sorted(paths, key=lambda path: order.index(re.split("[-@]", path.parts[-3])[0])):
        arm, seed = path.parts[-3], path.parts[-2].removeprefix("seed-")
        result = read_json(path, "measure", "comparison")
        kept = {key: result[key] for key in KEPT}
        found.setdefault(arm, {})[seed] = {"sweep": sweep(path.parent, config), "result": kept}
    return found


def write(results: Results, out: Path, commands: Sequence[str]) -> Path:
    """Write ``results.json``, ``summary.json``, ``heat_map.png`` and ``report.md``; returns the last's path.

    Args:
        results: of :func:`measure`.
        out: directory; created if need be.
        commands: that made the results.
    """
    out.mkdir(parents=True, exist_ok=True)
    replace_atomically(out / "results.json", json.dumps(results, indent=1, allow_nan=False).encode())
    write_rows(out / "summary.json", summary_rows(results), about(results, commands))
    picture = heat_map({arm: mean_sweep(seeds) for arm, seeds in results.items()}, out / "heat_map.png")
    first = _first(results)
    found, machine = first["sweep"], first["result"]["machine"]
    task, config = found["config"]["task"], found["config"]
    blocks: list[Block] = [
        Paragraph(
            (
                "Task ",
                Code(task["name"]),
                f", trained on lengths up to {found['trained_length']}; {config['steps']} steps of "
                f"{config['batch_size']} sequences. {found['samples']} held-out sequences of each length. "
                f"Exact match: mean over seeds, in brackets each seed. {machine['device']}, "
                f"{machine['threads']} thread(s), torch {first['result']['versions']['torch']}.",
            )
        ),
        Items([(Code(command),) for command in commands]),
        Picture(picture, f"{CAPTION} Mean over seeds."),
        Heading("What training cost"),
        cost_table(results),
    ]
    for rule, meaning in RULES.items():
        blocks += [Heading(f"{rule.capitalize()}: {meaning}"), rule_table(results, rule)]
    path = out / "report.md"
    replace_atomically(path, markdown("Accuracy beyond the lengths of training", blocks, out).encode())
    return path


def _first(results: Results) -> Mapping[str, Any]:
    return next(iter(next(iter(results.values())).values()))


def summary_rows(results: Results) -> list[dict[str, Any]]:
    """A row a run; lists are by length."""
    rows = []
    for arm, seeds in results.items():
        for seed, found in seeds.items():
            result, lengths = found["result"], found["sweep"]["rows"]
            row = {"arm": arm, "seed": int(seed), "flops": result["flops_total"]}
            row |= {key: result[key] for key in ("switch_step", "skipped_steps")}
            row["trained_loops"] = found["sweep"]["trained_loops"]
            for rule in RULES:
                for key in ("exact", "accuracy", "loops"):
                    row[f"{rule}: {key}"] = [at["rules"][rule][key] for at in lengths]
            rows.append(row)
    return rows


def about(results: Results, commands: Sequence[str]) -> dict[str, Any]:
    """What all runs share."""
    found, result = (_first(results)[key] for key in ("sweep", "result"))
    return {
        "commands": list(commands),
        "lengths": [row["length"] for row in found["rows"]],
        **{key: found[key] for key in ("trained_length", "samples", "max_loops", "config")},
        **{key: result[key] for key in ("machine", "versions", "commit")},
    }


def mean_sweep(seeds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The sweeps of several seeds as one, whose exact match is their mean."""
    sweeps = [found["sweep"] for found in seeds.values()]
    rows = [
        {
            **same[0],
            "exact": [
                statistics.mean(values) for values in zip(*(row["exact"] for row in same), strict=True)
            ],
        }
        for same in zip(*(found["rows"] for found in sweeps), strict=True)
    ]
    return {**sweeps[0], "rows": rows}


def cost_table(results: Results) -> Table:
    """Compute of training, median over seeds, and each seed's switch step."""
    rows: list[list[Cell]] = []
    for arm, seeds in results.items():
        runs = [found["result"] for found in seeds.values()]
        compute = flops(statistics.median(run["flops_total"] for run in runs))
        switches = ["–" if run["switch_step"] is None else str(run["switch_step"]) for run in runs]
        loops = [found["sweep"]["trained_loops"] for found in seeds.values()]
        rows.append([arm, compute, ", ".join(switches), each(loops)])
    return Table(["arm", "compute", "last switch at step (each seed)", "loops at the end"], rows)


def rule_table(results: Results, rule: str) -> Table:
    """Exact match by arm and length under one rule."""
    lengths = [row["length"] for row in mean_sweep(next(iter(results.values())))["rows"]]
    rows: list[list[Cell]] = []
    for arm, seeds in results.items():
        cells = []
        for i in range(len(lengths)):
            scores = [found["sweep"]["rows"][i]["rules"][rule]["exact"] for found in seeds.values()]
            cells.append(f"{percent(statistics.mean(scores))} ({each([f'{100 * s:.1f}' for s in scores])})")
        rows.append([arm, *cells])
    return Table(["arm", *(f"length {n}" for n in lengths)], rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path, help="the --out of shift-compare")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[])
    parser.add_argument("--samples", type=int, default=1024)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    config = SweepConfig(lengths=tuple(args.lengths), samples=args.samples)
    plan = read_json(args.comparison / "results.json", "report", "comparison")["plan"]
    commands = [plan["command"], f"python -m benchmarks.length.report {shlex.join(argv)}"]
    print(write(measure(args.comparison, config), args.out, commands))


if __name__ == "__main__":
    main()
