"""``shift-report RUN``: one run, finished or not, as Markdown, one HTML file and pictures.

    shift-report runs/first
    shift-report runs/first --out runs/first-report

Exit codes: 0 done; 2 unusable input. Needs matplotlib (extra ``plots``).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from shift.report.document import (
    Block,
    Cell,
    Code,
    Heading,
    Paragraph,
    Picture,
    Table,
    markdown,
    web_page,
)
from shift.report.style import FAINT, INK, WIDTH, save_figures
from shift.report.words import count, duration, flops, percent
from shift.run.files import make_directory, refuse_to_overwrite, replace_atomically
from shift.run.record import Run, read_run
from shift.schedules.registry import switch_step
from shift_kernels.console import command
from shift_kernels.errors import input_error

FILES = ("report.md", "report.html", "figures")
BLUE, ORANGE = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Command:
    """One run as a report."""

    run: tyro.conf.Positional[Path]
    """A run directory."""
    out: Path | None = None
    """Gets report.md, report.html and figures/; default: the run directory, whose own are renewed."""
    force: bool = False
    """Overwrite what an earlier call wrote into --out."""


@command("shift-report")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    flags = tyro.cli(Command, args=argv, prog="shift-report")
    if flags.out is not None and not flags.force:
        refuse_to_overwrite(flags.out, FILES, "shift-report")
    for path in write_report(flags.run, flags.out or flags.run):
        print(path)
    return 0


def write_report(run_dir: Path, out: Path) -> list[Path]:
    """Write the report of a run; returns its two files.

    Args:
        run_dir: of the run.
        out: gets the files; made if need be.

    Raises:
        ShiftInputError: no run, or one that has not written a training step.
    """
    run = read_run(run_dir)
    if not run.of_kind("train"):
        raise input_error(
            "shift-report", "run", str(run_dir), "a run that has trained some steps",
            "Name the directory that --run-dir named.",
        )  # fmt: skip
    make_directory(out, "shift-report", "out")
    pictures = save_figures(
        {"curves": lambda: curves_figure(run), "criterion": lambda: criterion_figure(run)}, out / "figures"
    )
    blocks: list[Block] = [Paragraph(headline(run), "lead"), facts_table(run)]
    blocks += [Picture(path, CAPTIONS[name]) for name, path in pictures.items()]
    blocks += tables(run)
    title = ("Run ", Code(run_dir.resolve().name))
    texts = {"report.md": markdown(title, blocks, out), "report.html": web_page(title, blocks)}
    for name, text in texts.items():
        replace_atomically(out / name, text.encode())
    return [out / name for name in texts]


CAPTIONS = {
    "curves": "From above: the training loss of each step (grey) and its running mean, with the held-out "
    "loss (dots); the learning rate; the loops of each step. The dashed line is the last switch.",
    "criterion": "What the criterion compares with its limits, look by look.",
}


def headline(run: Run) -> str:
    """The run in a sentence."""
    train, evals = run.of_kind("train"), run.of_kind("eval")
    end = f"{train[-1]['step']} steps, {flops(train[-1]['flops'])}"
    state = "Finished" if run.result else f"Stopped ({run.failure})"
    if not evals:
        return f"{state}: {end}."
    last = evals[-1]
    bits = last.get("bits_per_byte")
    shown = f"loss {_number(last['loss'])}" if bits is None else f"{bits:.4f} bits per byte"
    right = f"{percent(last['accuracy'])} right with {count(last['n_loops'], 'loop')}"
    return f"{state}: {end}; held-out {shown}, {right}."


def facts_table(run: Run) -> Table:
    """What was run, and what it took."""
    config, result, train = run.config, run.result, run.of_kind("train")
    switch = switch_step(config["schedule"]["kind"], [row["n_loops"] for row in train])
    share = result.get("flops_share")
    memory = result.get("memory_bytes")
    rate = result.get("tokens_per_s")
    milliseconds = result.get("switch_ms")
    most_loops = config["schedule"]["options"].get("n_loops", config["model"]["n_loops"])
    facts: dict[str, str] = {
        "task": config["task"]["name"],
        "schedule": f"{config['schedule']['kind']}, T = {most_loops}",
        "optimiser": f"{config['optimiser']['kind']}, lr {config['optimiser']['lr']:g}",
        "last switch at step": "–" if switch is None else str(switch),
        "the switch took": "–" if milliseconds is None else f"{milliseconds:.1f} ms beyond a looped step",
        "steps skipped": str(sum(row["skipped"] for row in train)),
        "training": duration(result.get("train_s")),
        "tokens a second": "–" if rate is None else f"{rate:,.0f}",
        "share of the device's peak (MFU)": "unknown" if share is None else percent(share),
        "memory at most": "–" if memory is None else f"{memory / 2**20:,.0f} MiB",
        "device": result.get("machine", {}).get("device", "–"),
    }
    return Table(("", ""), list(facts.items()))


def tables(run: Run) -> list[Block]:
    """The evaluations, and the sweep over loops where there is one."""
    blocks: list[Block] = []
    if evals := run.of_kind("eval"):
        rows = [(str(row["step"]), flops(row["flops"]), *_scores(row["n_loops"], row)) for row in evals]
        blocks += [Heading("Evaluations"), Table(("step", "compute", *SCORES), rows)]
    if sweep := run.result.get("sweep"):
        rows = [_scores(n_loops, scores) for n_loops, scores in sweep.items()]
        blocks += [Heading("The finished model by loops"), Table(SCORES, rows)]
    return blocks


SCORES = ("loops", "loss", "bits per byte", "right", "all right")


def _scores(n_loops: object, scores: Mapping[str, Any]) -> tuple[Cell, ...]:
    bits = scores.get("bits_per_byte")
    return (
        str(n_loops),
        _number(scores["loss"]),
        "–" if bits is None else f"{bits:.4f}",
        percent(scores["accuracy"]),
        percent(scores["exact"]),
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def curves_figure(run: Run) -> Figure:
    """Loss, learning rate and loops against steps."""
    train = run.of_kind("train")
    evals = [row for row in run.of_kind("eval") if row["loss"] is not None]
    steps = [row["step"] for row in train]
    switch = switch_step(run.config["schedule"]["kind"], [row["n_loops"] for row in train])
    figure = Figure(figsize=(WIDTH, 6.0))
    loss, rate, loops = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    known = [(row["step"], row["loss"]) for row in train if row["loss"] is not None]
    loss.plot(*zip(*known, strict=True) if known else ((), ()), color=FAINT, lw=0.6, alpha=0.5)
    loss.plot(*_running_mean(known, max(1, len(train) // 50)), color=BLUE, lw=1.5)
    loss.plot([row["step"] for row in evals], [row["loss"] for row in evals], "o", color=ORANGE, ms=4)
    rate.plot(steps, [row.get("lr", 0.0) for row in train], color=INK, lw=1.2)
    loops.plot(steps, [row["n_loops"] for row in train], color=INK, lw=1.2, drawstyle="steps-post")
    for axes, name in ((loss, "loss"), (rate, "rate"), (loops, "loops")):
        axes.set_ylabel(name)
        if switch is not None:
            axes.axvline(switch, color=ORANGE, lw=1, ls="--")
    loops.set_xlabel("step")
    return figure


def _running_mean(points: Sequence[tuple[int, float]], width: int) -> tuple[list[int], list[float]]:
    """(steps, means of the last ``width`` values)."""
    values = [value for _, value in points]
    means = [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
    return [step for step, _ in points], means


def criterion_figure(run: Run) -> Figure | None:
    """The two signals of the criterion; None where there is none."""
    looks = [row for row in run.of_kind("look") if {"improvement", "grad_change"} <= row.keys()]
    if not looks:
        return None
    figure = Figure(figsize=(WIDTH, 2.6))
    axes = figure.subplots()
    for key, colour in (("improvement", BLUE), ("grad_change", ORANGE)):
        values = [row[key] for row in looks]
        axes.plot([row["step"] for row in looks], values, ".-", color=colour, label=key.replace("_", " "))
    axes.set_xlabel("step")
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
