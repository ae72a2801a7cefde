"""The shapes that a training run calls its loop body with, and their calibration before it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from shift.build import build_task, find_device
from shift.config import TrainConfig
from shift.model import once_spec
from shift.run.micro_batches import MicroBatches
from shift.run.ranks import Ranks
from shift_kernels import dispatch, measured
from shift_kernels.calibrate import calibrate
from shift_kernels.call import Problem

When = Literal["auto", "never", "always"]


def problems_of(config: TrainConfig) -> list[Problem]:
    """Training steps of Stage I and of Stage II, and the evaluation; prelude and coda in each."""
    task, device = build_task(config), find_device(config.device)
    spec, dtype = config.model.block_spec(task.causal), torch.float32
    compute = torch.bfloat16 if config.precision == "bf16" else dtype
    sizes = MicroBatches("whole" if config.micro_batch == "auto" else config.micro_batch, config.batch_size)

    def problems(n_loops: int, grad: bool) -> list[Problem]:
        batch = sizes.of(n_loops) if grad else config.batch_size
        return [
            Problem(part, batch, task.max_seq_len, dtype, compute, device, grad, n_loops=loops)
            for part, loops in ((spec, n_loops), *((part, 1) for part in once))
        ]

    once = [once_spec(spec, n) for n in (config.model.n_prelude, config.model.n_coda) if n]
    stages = sorted({1, config.model.n_loops})
    found = [problem for n in stages for problem in problems(n, grad=True)]
    return list(dict.fromkeys(found + problems(stages[-1], grad=False)))


def calibrate_shapes(config: TrainConfig, when: When, say: Callable[[str], object]) -> None:
    """Measure a run's shapes; rank 0 does it, and all ranks take what it found.

    Args:
        config: a run whose backend is "auto"; another one needs no measurement.
        when: "auto" measures on accelerators what has no row in the table yet, "always" everything.
        say: gets lines of progress, on rank 0.
    """
    if when == "never" or config.backend != "auto":
        return
    problems, ranks = problems_of(config), Ranks(config.hang_timeout)

    def told(line: str) -> None:
        say(line)
        ranks.sign_of_life()

    def measure() -> dict[str, measured.Row]:
        new = [p for p in problems if p.device.type != "cpu" and measured.lookup(p) is None]
        calibrate(problems if when == "always" else new, say=told)
        known = {measured.shape_class(p): measured.lookup(p) for p in problems}
        return {key: row for key, row in known.items() if row is not None}

    rows = ranks.from_first(measure)
    if ranks.size > 1:
        measured.adopt(rows)
        dispatch.forget()
