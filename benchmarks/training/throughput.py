"""How many samples a second training takes, against a plain PyTorch loop over the same model.

    python -m benchmarks.training.throughput [--out benchmarks/results/training]      # throughput.json, .md

Ours is `Trainer.fit` as `shift-train` runs it, with its schedule, ledger and log, without evaluations and
checkpoints. The plain loop is what people write: library calls, torch.optim.AdamW and clip_grad_norm_ as they
come, nothing logged; eager, and with the body of the loop under torch.compile. All three start from the same
weights, see the same batches and learn the same: their losses are compared during the warm-up. Where ours
trains in bfloat16 (fp32 weights, autocast) so do the others.

In each round all take their turn for some steps in one process, so that a busy machine hurts them alike. A
speed-up is the median of the rounds' ratios, by the clock and by CPU time. Every case and number of threads
has a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.training.report import heading, write
from shift.config import ScheduleConfig, TrainConfig, load_config
from shift.model import LoopedTransformer
from shift.run.evaluate import autocast, loops_of
from shift.run.trainer import Trainer
from shift.tasks.base import IGNORE, Task
from shift_kernels.bench.baseline import PlainBlock
from shift_kernels.bench.timing import spread

THREADS = (1, 2)
RUNNERS = ("ours", "eager", "compile")
TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
"""Relative difference of losses in the warm-up; rounding differs, and training amplifies it."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What to measure and for how long: steps of each runner in a round, rounds, rounds before them.

    Args:
        preset: or a TOML file.
        title: of its rows.
        precision: of all runners.
        model: changes of the preset's.
    """

    preset: str
    title: str
    steps: int
    rounds: int
    warm_up: int
    precision: str = "fp32"
    model: dict[str, int] = dataclasses.field(default_factory=dict)


DEMO = "demo: hop, d_model 64, seq_len 16, batch 64, T=4"
FAN = "Fan's parity: d_model 256, seq_len 22, batch 64, own T(n), mean 10.5"
CASES = (
    Case("demo", DEMO, steps=10, rounds=20, warm_up=3),
    Case("demo", f"{DEMO}, bf16", steps=10, rounds=20, warm_up=3, precision="bf16"),
    Case("fan_parity", FAN, steps=1, rounds=8, warm_up=2),
    Case("fan_parity", f"{FAN}, bf16", steps=1, rounds=8, warm_up=2, precision="bf16"),
)


def config_of(case: Case) -> TrainConfig:
    """The preset with all its loops from the start, and Fan's with all its lengths: no curriculum."""
    preset = load_config(case.preset)
    task = preset.task
    if "curriculum_interval" in task.options:
        task = dataclasses.replace(task, options={**task.options, "curriculum_interval": 0})
    return dataclasses.replace(
        preset,
        task=task,
        model=dataclasses.replace(preset.model, **case.model),
        optimiser=dataclasses.replace(preset.optimiser, warmup=0),
        schedule=ScheduleConfig("constant"),
        precision=case.precision,
        steps=case.steps * (case.warm_up + case.rounds),
        eval_every=0,
        eval_samples=1,
        checkpoint_every=0,
        device="cpu",
    )


def plain_loop(
    model: LoopedTransformer, task: Task, config: TrainConfig, compiled: bool
) -> Callable[[int], torch.Tensor]:
    """A step of training written in library calls; it returns the loss."""
    model = copy.deepcopy(model)
    parts = {name: PlainBlock(block) for name, block in model.parts.items()}
    if compiled:
        for part in parts.values():
            part.compile()
    c = config.optimiser
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    decayed = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings]
    kept = [p for p in model.parameters() if p.ndim < 2 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": c.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=c.betas)

    def step(index: int) -> torch.Tensor:
        batch = task.batch(config.batch_size, index)
        with autocast(batch.tokens.device, config.precision == "bf16"):
            h, loops = model.embed(batch.tokens, batch.context), loops_of(batch, config.model.n_loops)
            for name, part in parts.items():
                h = part(h, loops if name == "block" else 1)
            loss = F.cross_entropy(model.read(h).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
        optimizer.step()
        return loss.detach()

    return step


def measure(case: Case, threads: int) -> dict[str, Any]:
    """Seconds of each round by the clock and of CPU time, [runner][round].

    Raises:
        AssertionError: the runners do not compute the same losses.
    """
    torch.set_num_threads(threads)
    config = config_of(case)
    clock: dict[str, list[float]] = {name: [] for name in RUNNERS}
    cpu: dict[str, list[float]] = {name: [] for name in RUNNERS}
    started = (0.0, 0.0)

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def enter(runner: str, since: tuple[float, float]) -> None:
        for kind, before, after in zip((clock, cpu), since, now(), strict=True):
            kind[runner].append(after - before)

    def progress(done: int, _total: int) -> None:
        nonlocal started
        if done % case.steps:
            return
        enter("ours", started)
        assert trainer.signals is not None
        ours = trainer.signals.loss
        for runner, step in plain.items():
            began = now()
            for index in range(done - case.steps, done):
                loss = step(index)
            enter(runner, began)
            if done <= case.warm_up * case.steps:
                torch.testing.assert_close(
                    loss, ours, rtol=TOLERANCE[case.precision], atol=0, msg=f"{runner}: {loss}, {ours}"
                )
        started = now()

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, folder)
        plain = {
            name: plain_loop(trainer.model, trainer.task, config, name == "compile") for name in RUNNERS[1:]
        }
        started = now()
        trainer.fit(progress)
    kept = slice(case.warm_up, None)
    return {
        "case": case.title,
        "threads": threads,
        "samples_a_round": case.steps * config.batch_size,
        "clock_s": {name: values[kept] for name, values in clock.items()},
        "cpu_s": {name: values[kept] for name, values in cpu.items()},
        "warm_up_s": {name: values[: case.warm_up] for name, values in clock.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: samples a second, median (quartiles) of the rounds, and our speed-ups."""
    lines = ["| | threads | " + " | ".join(f"{name}, samples/s" for name in RUNNERS) + " | "]
    lines[0] += " | ".join(f"ours over {name}: clock (CPU time)" for name in RUNNERS[1:]) + " |"
    lines.append("|" + "---|" * (2 + 2 * len(RUNNERS) - 1))
    for row in rows:
        cells = [row["case"], str(row["threads"])]
        cells += [spread([row["samples_a_round"] / s for s in row["clock_s"][name]], 0) for name in RUNNERS]
        for name in RUNNERS[1:]:
            clock, cpu = (speedup(row[kind], name) for kind in ("clock_s", "cpu_s"))
            cells.append(f"{clock:.2f}x ({cpu:.2f}x)")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speedup(seconds: dict[str, list[float]], other: str) -> float:
    """Median over the rounds of the other's time over ours."""
    pairs = zip(seconds[other], seconds["ours"], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def report(rows: list[dict[str, Any]], cases: Sequence[Case], module: str, out: Path) -> None:
    """Write the rows of all cases."""
    of: dict[str, list[str]] = {}
    for c in cases:
        of.setdefault(f"{c.steps}, {c.rounds}, {c.warm_up}", []).append(c.title)
    found = "; ".join(f"{numbers} ({'; '.join(titles)})" for numbers, titles in of.items())
    settings = {"steps a round, rounds, rounds of warm-up": found if len(of) > 1 else next(iter(of))}
    text = heading(f"python -m {module}", settings) + table(rows) + "\n"
    write(out / "throughput", text, {"rows": rows})


def run(cases: Sequence[Case], module: str, words: str | None, out: Path) -> None:
    """The command line of a module that measures cases, each in a process of its own.

    Args:
        cases: of this module.
        module: its name, for the processes.
        words: what it says of itself.
        out: where its results go by default.
    """
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--one", nargs=2, type=int, metavar=("CASE", "THREADS"), help="print as JSON")
    args = parser.parse_args()
    if args.one:
        case, threads = args.one
        print(json.dumps(measure(cases[case], threads)))
        return
    rows = []
    for case in range(len(cases)):
        for threads in THREADS:
            command = [sys.executable, "-m", module, "--one", str(case), str(threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    report(rows, cases, module, args.out)


if __name__ == "__main__":
    run(CASES, "benchmarks.training.throughput", __doc__, Path("benchmarks/results/training"))
