"""``results.json``, ``summary.json``, ``report.md`` and ``report.html`` of the study."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.landscape import figures
from benchmarks.landscape.claims import CLAIMS, FAILS, HOLDS, UNDECIDED, Claim, Verdict, judge
from benchmarks.landscape.figures import LABELS, NAMES, Study
from benchmarks.landscape.seen import Seen, cost, final_accuracy, hopping, late, log_cost_ratio, spectra
from benchmarks.landscape.study import ARMS, SURVEYS, SWITCHES, arms_of, run_dir, tasks
from shift.landscape.plane import plane
from shift.landscape.plots import draw
from shift.landscape.report import CAPTIONS
from shift.landscape.valley import split, threshold
from shift.report.document import (
    Block,
    Cell,
    Code,
    Heading,
    Items,
    Paragraph,
    Picture,
    Table,
    markdown,
    web_page,
)
from shift.report.rows import write_rows
from shift.run.files import replace_atomically

TITLE = "Does the river-valley picture of looped training hold?"


def write_study_report(study: Study, work: Path, out: Path) -> list[Path]:
    """Write all three and the pictures; returns the two reports' paths.

    Args:
        study: what was seen.
        work: where the runs lie, for the pictures of the first seed's.
        out: a directory.
    """
    out.mkdir(parents=True, exist_ok=True)
    verdicts = judge_all(study)
    found = results(study, verdicts)
    replace_atomically(out / "results.json", json.dumps(found).encode())
    write_rows(out / "summary.json", summary_rows(found), {key: found[key] for key in ABOUT})
    pictures = figures.draw(study, out / "figures") | run_pictures(study, work, out / "figures")
    blocks = content(study, verdicts, pictures)
    paths = [out / "report.md", out / "report.html"]
    replace_atomically(paths[0], markdown(TITLE, blocks, out).encode())
    replace_atomically(paths[1], web_page(TITLE, blocks).encode())
    return paths


Judged = Mapping[tuple[Claim, str], tuple[Sequence[float | bool | None], Verdict]]
"""Claim and task -> a value a seed, and the verdict."""


def judge_all(study: Study) -> Judged:
    """Every claim on every task it is about."""
    judged = {}
    for claim in CLAIMS:
        for task in (task for task in study if task in claim.tasks):
            values = [claim.measure(seen) for seen in study[task]]
            judged[claim, task] = values, judge(claim, values)
    return judged


def results(study: Study, judged: Judged) -> dict[str, Any]:
    """What the report says, as plain values."""
    result = next(iter(study.values()))[0].runs["looped"].result
    return {
        "machine": result["machine"],
        "versions": result["versions"],
        "configs": {task: config.to_dict() for task, config in tasks().items() if task in study},
        "surveys": {task: dataclasses.asdict(SURVEYS[task]) for task in study},
        "switches": {task: SWITCHES[task] for task in study},
        "claims": [
            {
                "task": task,
                "topic": claim.topic,
                "prediction": claim.prediction,
                "measured": claim.measured,
                "rule": claim.rule,
                "per_seed": values,
                "values_are_logs": claim.log,
                **dataclasses.asdict(verdict),
            }
            for (claim, task), (values, verdict) in judged.items()
        ],
        "points": {
            task: {
                arm: [[_numbers(p) for p in seen.surveys[arm]["points"]] for seen in seeds] for arm in ARMS
            }
            for task, seeds in study.items()
        },
        "upstream": {task: [seen.upstream for seen in seeds] for task, seeds in study.items()},
        "runs": {
            task: {
                arm: [
                    {
                        "seed": seen.runs[arm].config["seed"],
                        "switch_step": seen.runs[arm].result["switch_step"],
                        "accuracy": final_accuracy(seen, arm),
                        "flops_to_target": cost(seen, arm),
                        "flops_total": seen.runs[arm].result["flops_total"],
                    }
                    for seen in seeds
                    if seen.runs[arm].result
                ]
                for arm in arms_of(task)
            }
            for task, seeds in study.items()
        },
    }


ABOUT = ("machine", "versions", "configs", "surveys", "switches", "claims")
"""What ``summary.json`` holds beside its rows; each claim has its value on each seed."""


def summary_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a run."""
    return [
        {"task": task, "arm": arm, **run}
        for task, arms in found["runs"].items()
        for arm, runs in arms.items()
        for run in runs
    ]


def _numbers(point: dict[str, Any]) -> dict[str, Any]:
    """A point without its curves and eigenvalues."""
    cuts = {height: cut["margin"] for height, cut in point["cuts"].items()}
    return {k: v for k, v in point.items() if k not in ("spectrum", "cuts")} | {"cut_margins": cuts}


def run_pictures(study: Study, work: Path, directory: Path) -> dict[str, Path]:
    """Spectrum, path, cuts and signals of the toy's first seed, a column an arm."""
    task = next(iter(study))
    seen = study[task][0]
    surveys = {LABELS[arm]: seen.surveys[arm] for arm in ARMS}
    planes = {}
    for arm in ARMS:
        last = seen.surveys[arm]["points"][-1]
        start = seen.surveys[arm]["switch_step"] or 0
        seed = seen.runs[arm].config["seed"]
        planes[LABELS[arm]] = plane(
            run_dir(work, task, arm, seed), start, last["n_loops"], SURVEYS[task].samples
        )
    return draw(surveys, planes, directory)


TASKS = {
    "markov": "Markov language: the next token of sequences that follow a map; simple samples are those "
    "below the median information content (mostly one map for all, which weights can hold), complex ones "
    "those above (mostly a map of their own). One attention layer, no MLP, three loops, d_model "
    "{d_model}, {n} weights, {steps} steps.",
    "hop": "Hop: a map of twelve nodes applied one to four times. One layer of attention and MLP, four "
    "loops, d_model {d_model}, {n} weights, {steps} steps.",
}
"""What each task is, by its name."""

WORDS = [
    "Hessian: the matrix of second derivatives of the loss; its eigenvalues λ say how strongly "
    "the loss curves along as many directions of the weights. Valley: directions with λ above a "
    "threshold; river: those with |λ| below it.",
    "κ, the condition number: largest over smallest λ in the valley. C, the cumulative force: "
    "the sum of 1/λ over the valley.",
    "U or V: along the sharpest direction a parabola and a V are fitted to the loss; the margin "
    "goes from 1 (all U) to -1 (all V).",
    "Effective rank: in how many directions the loss would be curved if it were curved in all of "
    "them alike. Collapse: it falls from the start by a factor of 1.5 or more; diversification: "
    "then it rises by as much; stabilisation: from then on it stays within that factor.",
    "Hops: how much more often the gradient of successive steps changes its sign across the "
    "valley than across random directions out of it, in standard deviations.",
]
"""What the report calls things."""

READING = [
    (
        "Each claim is one number a seed and a bound, written down in ",
        Code("benchmarks/landscape/claims.py"),
        " before the runs were surveyed. Holds: the 95% interval of the mean over seeds "
        "(Student's t) lies wholly on the predicted side of the bound; does not hold: wholly on "
        "the other side; else undecided. Yes-or-no claims: yes on every seed, on "
        "none, else.",
    ),
    "Each line may err one time in twenty, and there are many lines.",
    "Landscape measures are means over the second half of training; κ and C of the Markov "
    "language are of all eigenvalues at the end, those of hop of stochastic Lanczos densities, "
    "from few random vectors: its effective ranks scatter widely. "
    "A target never reached counts as all of the run's compute.",
]
"""How to read the table of claims."""


def content(study: Study, judged: Judged, pictures: Mapping[str, Path]) -> list[Block]:
    """The report, most important first."""
    n_seeds = len(next(iter(study.values())))
    return [
        Paragraph(
            "Gong et al. (arXiv 2510.10089) explain by the shape of the loss why a looped transformer beats "
            "the same block applied once. Applied once (Single) it stands in a flat U-shaped valley; looped, "
            "it hops between the walls of a steep V-shaped one and is driven along the river at its bottom. "
            "SHIFT starts with Single and switches to Looped. We test that account on two small tasks with "
            f"{n_seeds} seeds. The quantities are ours: the paper's body was not available to us."
        ),
        Paragraph(summary(judged), "lead"),
        Items([*_by_outcome(judged)]),
        Heading("Tasks and words"),
        Items([TASKS[task].format(**_sizes(study[task][0])) for task in study]),
        Items(
            WORDS,
            "note",
        ),
        Heading("Prediction by prediction"),
        *(verdict_table(judged, task) for task in study),
        Items(
            READING,
            "note",
        ),
        Heading("Accuracy"),
        Picture(
            pictures["accuracy"], "A line a seed. Easy: what one pass can learn; hard: what takes loops."
        ),
        Heading("The shared upstream, and when to switch"),
        Picture(
            pictures["upstream"],
            "Left: do Single's and Looped's gradients agree at Single's weights (1: the same direction, 0: "
            "unrelated)? Mean and range over seeds. Right: training compute to 98% of Looped's accuracy when "
            "switching at that point, over Looped's own; a line a seed.",
        ),
        Heading("Phases"),
        Picture(
            pictures["phases"],
            "In how many directions the loss is curved; a line a seed, SHIFT's switches dashed.",
        ),
        Heading("The numbers behind"),
        *(numbers_table(study, task) for task in study),
        Items(
            [
                "Mean and standard deviation over seeds of the means over the second half of training.",
                (
                    f"Edges of stability: η λ_max = 2; in Adam's coordinates {_adam_edge(study):.0f} (see ",
                    Code("shift.landscape.survey"),
                    "). Above them a quadratic bounces higher with each step.",
                ),
            ],
            "note",
        ),
        Heading("One seed from near: the toy"),
        *(Picture(pictures[name], CAPTIONS[name]) for name in ("spectrum", "plane", "cut", "signals")),
    ]


def summary(judged: Judged) -> str:
    """The count of the verdicts, and which hold, in one paragraph."""
    outcomes = Counter(verdict.outcome for _, verdict in judged.values())
    return (
        f"Of {len(judged)} claims (each on each task) {outcomes[HOLDS]} hold, {outcomes[FAILS]} do not, "
        f"{outcomes[UNDECIDED]} stay undecided."
    )


def _by_outcome(judged: Judged) -> Iterable[str]:
    """The predictions that hold on every task, and those that hold on none, by topic."""
    for outcome, words in ((HOLDS, "Holds on every task"), (FAILS, "Does not hold on any task")):
        found = [
            claim.prediction.rstrip(".")
            for claim in CLAIMS
            if all(verdict.outcome == outcome for (own, _), (_, verdict) in judged.items() if own is claim)
        ]
        if found:
            yield f"{words}: {'; '.join(found)}."


def _adam_edge(study: Study) -> float:
    beta1 = next(iter(study.values()))[0].surveys["looped"]["config"]["optimiser"]["betas"][0]
    return 2 * (1 + beta1) / (1 - beta1)


def verdict_table(judged: Judged, task: str) -> Table:
    """A row a claim."""
    rows: list[list[Cell]] = []
    for (claim, own), (_, verdict) in judged.items():
        if own == task:
            rows.append(
                [
                    claim.topic,
                    claim.prediction,
                    f"{claim.measured}: {claim.rule}?"
                    if verdict.low is not None
                    else f"{claim.measured}: all?",
                    _value(verdict),
                    verdict.outcome,
                ]
            )
    return Table(
        [NAMES[task], "Prediction", "Measured, and the rule", "Mean [95% interval]", "Verdict"], rows
    )


def _value(verdict: Verdict) -> str:
    if verdict.estimate is None:
        return "–"
    if verdict.low is None or verdict.high is None:
        return f"{verdict.estimate:.3g} of {verdict.n}"
    return f"{verdict.estimate:.3g} [{verdict.low:.3g}, {verdict.high:.3g}]"


def numbers_table(study: Study, task: str) -> Table:
    """A row a quantity, a column an arm."""
    rule, value = SURVEYS[task].rule, SURVEYS[task].threshold

    def of_split(name: str) -> Callable[[Seen, str], float | None]:
        def mean(seen: Seen, arm: str) -> float | None:
            found = [getattr(split(s, threshold(s, rule, value)), name) for s in spectra(seen, arm)]
            return statistics.mean(found) if None not in found else None

        return mean

    def late_mean(of: Callable[[dict[str, Any]], float | None]) -> Callable[[Seen, str], float | None]:
        return lambda seen, arm: late(seen, arm, of)

    quantities: dict[str, Callable[[Seen, str], float | None]] = {
        "sharpest eigenvalue λ_max": late_mean(lambda p: p["split"]["sharpest"]),
        "η λ_max": late_mean(lambda p: p["eta_sharpness"]),
        "η λ_max in Adam's coordinates": late_mean(lambda p: p["adam_eta_sharpness"]),
        f"directions in the valley (above {value:g} λ_max)": of_split("valley"),
        "directions in the river": of_split("river"),
        "falling directions (saddle)": of_split("saddle"),
        "condition number κ of the valley": of_split("condition"),
        "cumulative force C": of_split("force"),
        "effective rank": late_mean(lambda p: p["effective_rank"]),
        "mutual information of successive Hessians (nats)": late_mean(lambda p: p["mutual_information"]),
        **{
            f"U's margin over V, {h} nats high": late_mean(lambda p, h=h: p["cuts"][h]["margin"])
            for h in map(str, SURVEYS[task].heights)
        },
        "hops (z-score)": late_mean(hopping("hops")),
        "cosine of successive valley gradients": late_mean(hopping("valley_cosine")),
        "bounce height (nats)": late_mean(hopping("bounce_height")),
        "river progress a step": late_mean(hopping("river_progress")),
        "final accuracy": final_accuracy,
        "compute to target, × Looped": lambda seen, arm: math.exp(log_cost_ratio(seen, arm)),
    }
    rows: list[list[Cell]] = []
    for name, of in quantities.items():
        cells: list[Cell] = [name]
        for arm in ARMS:
            values = [x for seen in study[task] if (x := of(seen, arm)) is not None]
            few = len(values) < 2
            cells.append("–" if few else f"{statistics.mean(values):.3g} ± {statistics.stdev(values):.2g}")
        rows.append(cells)
    return Table([NAMES[task], *LABELS.values()], rows)


def _sizes(seen: Seen) -> dict[str, Any]:
    survey = seen.surveys["looped"]
    return {
        "d_model": survey["config"]["model"]["d_model"],
        "n": f"{survey['n_parameters']:,}",
        "steps": survey["config"]["steps"],
    }
