"""The tables of README.md and docs/, each from the committed results. ``benchmarks.readme`` writes them."""

from __future__ import annotations

import functools
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import scaling
from benchmarks.lm.suite import arms_of, load_suite
from benchmarks.savings.families import Results, label
from benchmarks.savings.recompile import stalls
from benchmarks.savings.report import interval, ratio_table, restricted_table, sentences, summary_table
from benchmarks.savings.restricted import Choice, best_fixed, best_t, headline, named, restricted_mean
from benchmarks.savings.scp_sweep import front_table
from benchmarks.savings.tune import rates_table
from benchmarks.training import throughput
from shift.comparison.arms import AGAIN
from shift.comparison.summary import read_summary
from shift.length.sweep import RULES
from shift.report.document import Block, Table, block_markdown
from shift.report.rows import read_rows
from shift.report.words import flops, percent
from shift_kernels import BlockSpec
from shift_kernels.backends.cpu import CPU
from shift_kernels.backends.cuda import CUDA
from shift_kernels.backends.torch import TORCH
from shift_kernels.backends.torch_graph import TORCH_GRAPH
from shift_kernels.backends.triton.backend import TRITON
from shift_kernels.bench.cases import LIBRARY
from shift_kernels.bench.timing import speedup
from shift_kernels.call import OWN_OPTIONS
from shift_kernels.spec import CHOICES, ONE_OVER_T

RESULTS = Path(__file__).parent / "results"


@functools.cache
def read(name: str) -> Any:
    """``benchmarks/results/<name>.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text())


@functools.cache
def comparisons(name: str) -> dict[str, dict[str, Any]]:
    """``benchmarks/results/<name>/summary.json``, by task."""
    return read_summary(RESULTS / name / "summary.json")


def demo() -> str:
    """Every way to train of the demo: answers, compute to the target over Looped's, compute in all."""
    (r,) = comparisons("demo").values()
    rows = []
    for arm in r["arms"].values():
        against = arm["against_looped"]
        each = ", ".join(f"{x:.2f}" for x in against["per_seed"].values() if x is not None)
        ratio = "never" if against["mean"] is None else f"{against['mean']:.2f} ({each})"
        right = percent(statistics.mean(s["final_accuracy"] for s in arm["seeds"]))
        total = flops(statistics.mean(s["flops_total"] for s in arm["seeds"]))
        rows.append([arm["label"], right, ratio, total])
    target = f"{100 * r['target_accuracy']:.0f}%"
    return _table(["way to train", "right answers", f"compute to {target}, × Looped", "compute in all"], rows)


def savings() -> str:
    """SHIFT and the best of ours over all tasks: mean ratio, runs lost and late of those that Looped won."""
    r = comparisons("savings/full")
    won = sum(s["flops_to_target"] is not None for t in r.values() for s in t["arms"]["looped"]["seeds"])
    rows = []
    for name in dict.fromkeys(("shift", headline(r)["arm"], AGAIN)):
        rows.append([label(r, name), *_over_tasks(r, named(name))])
    rows.append(["Best fixed switch of each task, by hindsight", *_over_tasks(r, best_fixed)])
    rows.append(["Best constant T of each task, by hindsight", *_over_tasks(r, best_t)])
    header = [
        "schedule",
        "no run left out, × Looped (95%)",
        "mean of pairs, × Looped",
        f"of {won} runs lost",
        "late",
    ]
    return _table(header, rows)


def _over_tasks(results: Results, choice: Choice) -> list[str]:
    arms = [choice(r) for r in results.values()]
    against = [arm["against_looped"] for arm in arms if arm is not None]
    means = [a["mean"] for a in against if a["mean"] is not None]
    lost, late = (sum(len(a[key]) for a in against) for key in ("seeds_never", "seeds_late"))
    pairs = f"{statistics.mean(means):.2f}, {len(means)} of {len(arms)} tasks"
    return [interval(restricted_mean(results, choice)), pairs, str(lost), str(late)]


def savings_tasks() -> str:
    """A row a task."""
    return _markdown(summary_table(comparisons("savings/full")))


def savings_arms() -> str:
    """Every arm on every task."""
    return _markdown(ratio_table(comparisons("savings/full")))


def savings_restricted() -> str:
    """Every arm, with no run left out."""
    return _markdown(restricted_table(comparisons("savings/full")))


def savings_wsd() -> str:
    """The same where the learning rate falls at the end of the run."""
    return _markdown(restricted_table(comparisons("savings/wsd")))


def savings_rates() -> str:
    """The learning rate of every arm."""
    return _markdown(rates_table("full"))


def scp_sweep() -> str:
    """The criterion's settings that no other beats, and its defaults."""
    return _markdown(front_table(read_rows(RESULTS / "savings/scp/summary.json")[0]))


def recompile() -> str:
    """What the first step with another number of loops stalls for."""
    return _markdown(stalls(RESULTS / "savings/recompile.json"))


def savings_sentences() -> str:
    """A sentence an arm."""
    return _markdown(sentences(comparisons("savings/full")))


COLUMNS = [(dtype, threads) for dtype in ("float32", "bfloat16") for threads in (1, 2)]


def _threads(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def cpu() -> str:
    """Ours over the faster of eager and torch.compile, for three of the widths."""
    rows = {(r["name"], r["dtype"], r["threads"]): r for r in read("cpu/cpu")["rows"]}
    found = []
    for d_model in (64, 128, 256):
        name, cells = f"d{d_model} n32 b32 T8", [str(d_model)]
        for column in COLUMNS:
            ms = rows[(name, *column)]["ms"]
            ours = statistics.median(ms["cpu"])
            factor = speedup(ms, "cpu", LIBRARY)
            cells.append(f"{ours:.0f} / {factor * ours:.0f}, {factor:.2f}x")
        found.append(cells)
    return _table(["d_model", *(f"{dtype}, {_threads(t)}" for dtype, t in COLUMNS)], found)


def cpu_all() -> str:
    """Every block that was timed."""
    from benchmarks.kernels.cpu import table

    return table(read("cpu/cpu")["rows"])


def cpu_sizes() -> str:
    """Eager's time over ours for one sequence of every size: with one loop / with two."""
    rows = [
        (isa if isa != "best" else "all of the machine's", r)
        for isa in ("best", "avx2")
        for r in read(f"cpu/sizes_{isa}")["rows"]
    ]
    lengths = sorted({r["seq_len"] for _, r in rows})
    cells: dict[tuple[str, str, int], dict[int, list[str]]] = {}
    for isa, r in rows:
        mark = "" if r["auto"] == "cpu" else "*"
        cell = f"{speedup(r['ms'], 'cpu', ['eager']):.2f}{mark}"
        cells.setdefault((isa, r["dtype"], r["d_model"]), {}).setdefault(r["seq_len"], []).append(cell)
    found = [[*map(str, key), *(" / ".join(row[n]) for n in lengths)] for key, row in cells.items()]
    return _table(["instructions", "dtype", "d_model", *(f"n = {n:,}" for n in lengths)], found)


def cpu_long() -> str:
    """Long sequences."""
    from benchmarks.kernels.long import table

    return table(read("cpu/long")["rows"])


def training() -> str:
    """Samples a second of ours over those of eager and of torch.compile."""
    rows = read("training/throughput")["rows"]
    names = {"the demo, T = 4": throughput.DEMO, "Fan's parity, T(n)": throughput.FAN}
    found = []
    for words, title in names.items():
        cells = [words]
        for suffix in ("", ", bf16"):
            for threads in throughput.THREADS:
                (row,) = (r for r in rows if (r["case"], r["threads"]) == (title + suffix, threads))
                factors = [throughput.speedup(row["clock_s"], name) for name in LIBRARY]
                cells.append(" / ".join(f"{x:.2f}" for x in factors))
        found.append(cells)
    header = [f"{dtype}, {_threads(t)}" for dtype in ("float32", "bfloat16") for t in throughput.THREADS]
    return _table(["", *header], found)


def training_all() -> str:
    """Samples a second of every runner."""
    return throughput.table(read("training/throughput")["rows"])


def lm_throughput() -> str:
    """Windows a second of every runner, for language models."""
    return throughput.table(read("lm/throughput")["rows"])


def profile() -> str:
    """Where a step's time goes."""
    from benchmarks.training.profile import table

    return table(read("training/profile")["ms"])


BEYOND = 1.5
"""Times the longest length of training."""


def length() -> str:
    """Exact match beyond the lengths of training, by task and by the rule that says how many loops count."""
    found = []
    for path in sorted((RESULTS / "length").glob("*/summary.json"), reverse=True):
        rows, about = read_rows(path)
        longest = round(BEYOND * about["trained_length"])
        at = about["lengths"].index(longest)
        for arm in dict.fromkeys(row["arm"] for row in rows):
            cells = [about["config"]["task"]["name"], str(longest), arm]
            for rule in RULES:
                each = [
                    row[key][at] for row in rows if row["arm"] == arm and (key := f"{rule}: exact") in row
                ]
                seeds = ", ".join(f"{100 * x:.0f}" for x in each)
                cells.append(f"{percent(statistics.mean(each))} ({seeds})" if each else "–")
            found.append(cells)
    return _table(["task", "length", "arm", *RULES], found)


def landscape() -> str:
    """How many of the predictions of each topic held."""
    _, about = read_rows(RESULTS / "landscape/summary.json")
    outcomes = ("holds", "does not hold", "undecided")
    topics = dict.fromkeys(claim["topic"] for claim in about["claims"])
    found = []
    for topic in topics:
        of_topic = [claim["outcome"] for claim in about["claims"] if claim["topic"] == topic]
        found.append([topic, *(str(of_topic.count(outcome)) for outcome in outcomes)])
    return _table(["topic", *outcomes], found)


def options() -> str:
    """Options of the block and of a call, and the backends that serve them, as these say themselves."""
    backends = (TORCH, TORCH_GRAPH, CPU, TRITON, CUDA)
    samples: dict[str, Sequence[object]] = {
        **CHOICES,
        "residual_scale": (ONE_OVER_T,),
        **{"qk_norm": (True,), "window": (8,), "softcap": (30.0,), "attn_scale": (0.1,)},
        **{"rope_freqs": ((1.0, 0.1),), "qkv_bias": (True,)},
    }
    default = vars(BlockSpec(8, 2))
    found: dict[str, list[bool]] = {}
    for name, values in samples.items():
        for value in values:
            if value != default[name]:
                word = f'{name}="{value}"' if isinstance(value, str) else name
                found[word] = [b is TORCH or b.served.serves(name, value) for b in backends]
    for name in OWN_OPTIONS:
        found[f"{name} of a call"] = [b is TORCH or name in b.served.call for b in backends]
    rows = [[word, *("yes" if x else "no" for x in served)] for word, served in found.items()]
    some = [row for row in rows if "no" in row]
    return _table(["option", *(b.name for b in backends)], [["all others", *len(backends) * ["yes"]], *some])


def triton() -> str:
    """Warp instructions a token and loop, and bytes spilled, of resident Triton kernels, by architecture."""
    kinds = ("block", "wide-heads", "wide")
    rows = [
        row
        for row in read("offline/triton")["rows"]
        if row["kernel"].startswith("resident") and row["case"].endswith("bf16")
    ]
    architectures = sorted({row["sm"] for row in rows})
    found: dict[tuple[str, str], dict[int, str]] = {}
    for kind, row in itertools.product(kinds, rows):
        if row["case"].split()[0] == kind:
            name = row["case"].removesuffix(" bf16"), row["kernel"].removeprefix("resident_")
            found.setdefault(name, {})[row["sm"]] = f"{row['instructions']}, {row['spill_stores']}"
    return _table(
        ["block, rows x d_model", "kernel", *(f"sm_{sm}" for sm in architectures)],
        [[*name, *(cells.get(sm, "streamed") for sm in architectures)] for name, cells in found.items()],
    )


def lm() -> str:
    """Compute multipliers of language models over the best fixed T: FLOPs, then seconds, by budget."""
    summary = read("lm/summary")
    budgets, labels = list(next(iter(summary["multiplier"].values()))), arms_of(load_suite("quick"), Path())
    rows = []
    for arm, by_budget in summary["multiplier"].items():
        cells = [
            " / ".join(_times(by_budget[b][unit]["mean"]) for unit in ("flops", "wall")) for b in budgets
        ]
        rows.append([labels[arm].label, *cells])
    return _table(["arm", *(f"{flops(float(b))}" for b in budgets)], rows)


def _times(multiplier: float | None) -> str:
    return "–" if multiplier is None else f"{multiplier:.2f}"


def matrix() -> str:
    """One sentence: with which versions of Python and torch tests passed, and how many; ``make matrix``."""
    rows = [row for row in read("matrix") if not row["failed"]]
    found = (f"{r['python']} with torch {r['torch'].partition('+')[0]} ({r['passed']:,} tests)" for r in rows)
    return f"Passed (`make matrix`): Python {'; '.join(found)}."


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "matrix": matrix,
    "savings": savings,
    "savings_tasks": savings_tasks,
    "savings_arms": savings_arms,
    "savings_restricted": savings_restricted,
    "savings_sentences": savings_sentences,
    "savings_wsd": savings_wsd,
    "savings_rates": savings_rates,
    "scp_sweep": scp_sweep,
    "recompile": recompile,
    "cpu": cpu,
    "cpu_all": cpu_all,
    "cpu_sizes": cpu_sizes,
    "cpu_long": cpu_long,
    "training": training,
    "training_all": training_all,
    "profile": profile,
    "length": length,
    "lm": lm,
    "lm_throughput": lm_throughput,
    "landscape": landscape,
    "options": options,
    "triton": triton,
    "scaling": lambda: _markdown(scaling.table(scaling.Assumed())),
}
"""By the name that stands in a mark."""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return _markdown(Table(header, rows))


def _markdown(block: Block) -> str:
    return block_markdown(block, RESULTS)
