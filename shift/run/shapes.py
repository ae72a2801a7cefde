"""The shapes that a training run calls its loop body with: what there is to calibrate before it starts."""

from __future__ import annotations

import torch

from shift.build import build_task, find_device
from shift.config import TrainConfig
from shift_kernels.call import Problem


def problems_of(config: TrainConfig) -> list[Problem]:
    """Training steps of Stage I and of Stage II, and the evaluation of all loops."""
    task, device = build_task(config), find_device(config.device)
    spec, dtype = config.model.block_spec(task.causal), torch.float32
    compute = torch.bfloat16 if config.precision == "bf16" else dtype

    def problem(n_loops: int, grad: bool) -> Problem:
        return Problem(
            spec, config.batch_size, task.max_seq_len, dtype, compute, device, grad, n_loops=n_loops
        )

    stages = sorted({1, config.model.n_loops})
    return [problem(n, grad=True) for n in stages] + [problem(stages[-1], grad=False)]
