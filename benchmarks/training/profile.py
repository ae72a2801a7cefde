"""Where a training step's time goes.

    python -m benchmarks.training.profile [--out benchmarks/results/training]      # profile.json, profile.md

Steps of `shift-train --config demo` in Stage I (with its criterion) and Stage II, in one thread. Times are
the CPU time of that thread, exclusive of what is nested inside: other processes can lengthen them by using up
caches and memory bandwidth, but not by taking the core. A round of steps gives one time a part; stated are
medians over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.training.report import heading, write
from shift.config import ScheduleConfig, TrainConfig, load_config
from shift.run.trainer import Trainer
from shift_kernels import compiled
from shift_kernels.autograd import EagerLoopedBlock
from shift_kernels.bench.timing import spread

native, _ = compiled.load("_native")
WARM_UP, ROUNDS, STEPS = 40, 15, 20  # steps before the first round, rounds, steps a round
PARTS = (
    "block: C++ calls",
    "block: around them",
    "embedding, head, loss",
    "optimiser, clipping",
    "data",
    "criterion, metrics",
    "the loop itself",
)
OUTSIDE = PARTS[2:]


class Spans:
    """CPU time of this thread by part. A span inside another one is not counted in the outer."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time entered."""

        def call(*args: Any, **options: Any) -> Any:
            self._inside.append(0.0)
            start = time.thread_time()
            try:
                return function(*args, **options)
            finally:
                took = time.thread_time() - start
                self.seconds[part] += took - self._inside.pop()
                self._inside[-1] += took

        return call


@contextlib.contextmanager
def instrumented(trainer: Trainer, spans: Spans) -> Iterator[None]:
    """The parts of this trainer's steps are timed."""
    with contextlib.ExitStack() as changes:
        for owner, name, part in (
            (native, "run", PARTS[0]),
            (EagerLoopedBlock, "backward", PARTS[1]),
            (trainer.model.block, "forward", PARTS[1]),
            (trainer._step, "backward", PARTS[2]),
            (trainer._step, "update", PARTS[3]),
            (trainer.task, "batch", PARTS[4]),
            (trainer.schedule, "step", PARTS[5]),
            (trainer, "_flush", PARTS[5]),
        ):
            timed = spans.timed(part, getattr(owner, name))
            changes.enter_context(mock.patch.object(owner, name, timed))
        yield


def profile(config: TrainConfig) -> dict[str, list[float]]:
    """Milliseconds a step of each part, one a round."""
    spans, rounds, started = Spans(), [], 0.0

    def progress(done: int, _total: int) -> None:
        nonlocal started
        if done >= WARM_UP and (done - WARM_UP) % STEPS == 0:
            now = time.thread_time()
            if done > WARM_UP:
                inside = dict(spans.seconds)
                rounds.append(inside | {PARTS[-1]: now - started - sum(inside.values())})
            spans.seconds.clear()
            started = time.thread_time()

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, folder)
        with instrumented(trainer, spans):
            trainer.fit(progress)
    return {part: [1e3 * r.get(part, 0.0) / STEPS for r in rounds] for part in PARTS}


def configs() -> dict[str, TrainConfig]:
    """The demo's two stages, without evaluations and checkpoints."""
    demo = load_config("demo")
    steps = WARM_UP + ROUNDS * STEPS
    base = dataclasses.replace(demo, steps=steps, eval_every=0, checkpoint_every=0, device="cpu")
    never = ScheduleConfig("shift", {**demo.schedule.options, "patience": steps})
    return {
        "Stage I, T=1": dataclasses.replace(base, schedule=never),
        f"Stage II, T={demo.model.n_loops}": dataclasses.replace(base, schedule=ScheduleConfig("constant")),
    }


def table(stages: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: median ms (quartiles) and share of the step, by part."""
    lines = ["| part | " + " | ".join(f"{name}: ms a step | share" for name in stages) + " |"]
    lines.append("|" + "---|" * (1 + 2 * len(stages)))

    def row(name: str, parts: tuple[str, ...]) -> None:
        cells = [name]
        for ms in stages.values():
            rounds = [sum(values) for values in zip(*(ms[p] for p in parts), strict=True)]
            whole = [sum(values) for values in zip(*ms.values(), strict=True)]
            share = statistics.median(a / b for a, b in zip(rounds, whole, strict=True))
            cells += [spread(rounds), f"{share:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")

    for part in PARTS:
        row(part, (part,))
    row("**outside the block**", OUTSIDE)
    row("step", PARTS)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    stages = {name: profile(config) for name, config in configs().items()}
    settings = {"warm_up_steps": WARM_UP, "rounds": ROUNDS, "steps_a_round": STEPS}
    text = heading("python -m benchmarks.training.profile", settings) + table(stages) + "\n"
    print(text)
    write(args.out / "profile", text, settings | {"ms": stages})


if __name__ == "__main__":
    main()
