"""SHIFT: train a looped transformer with one loop first, and with T loops once that has got where it can.

The parts work without the trainer. A training loop of your own asks the schedule at every step:

    import torch
    from shift import Hop, LoopedTransformer, Signals, make_schedule
    from shift_kernels import BlockSpec

    task, steps = Hop(n_nodes=8), 60
    spec = BlockSpec(d_model=32, n_heads=2, d_ff=64, causal=task.causal, injection="add")
    model = LoopedTransformer.for_task(spec, task)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule, signals = make_schedule("shift", max_loops=4, total_steps=steps, interval=5), None
    for step in range(steps):
        batch, n_loops = task.batch(32, step), schedule.step(step, signals).n_loops
        logits = model(batch.tokens, n_loops, context=batch.context)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        signals = Signals(loss.detach(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimiser.step()

With the trainer: ``Trainer(TrainConfig(steps=100), "runs/first").fit()``; from the shell: ``shift-train``.
"""

from shift import requirements as _requirements  # noqa: F401 (first, for its message)
from shift.config import (
    LandscapeConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TaskConfig,
    TrainConfig,
    load_config,
)
from shift.model import LoopedTransformer
from shift.run.trainer import Trainer, TrainingDiverged, TrainingInterrupted
from shift.schedules import SCHEDULES, SCP, Decision, LoopSchedule, SCPConfig, Signals, make_schedule
from shift.tasks import (
    IGNORE,
    TASKS,
    Addition,
    Batch,
    BinarySum,
    Copy,
    Hop,
    Markov,
    Multiplication,
    Parity,
    PHop,
    PrefixProducts,
    Task,
    Text,
    UniqueSet,
    make_task,
)

__all__ = [
    "IGNORE",
    "SCHEDULES",
    "SCP",
    "TASKS",
    "Addition",
    "Batch",
    "BinarySum",
    "Copy",
    "Decision",
    "Hop",
    "LandscapeConfig",
    "LoopSchedule",
    "LoopedTransformer",
    "Markov",
    "ModelConfig",
    "Multiplication",
    "OptimiserConfig",
    "PHop",
    "Parity",
    "PrefixProducts",
    "SCPConfig",
    "ScheduleConfig",
    "Signals",
    "Task",
    "TaskConfig",
    "Text",
    "TrainConfig",
    "Trainer",
    "TrainingDiverged",
    "TrainingInterrupted",
    "UniqueSet",
    "load_config",
    "make_schedule",
    "make_task",
]
