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

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shift_kernels.extras import require

if TYPE_CHECKING:
    from shift.exports import *  # noqa: F403
    from shift.exports import __all__ as __all__


# A command without its extra must start all the same, to say so: what is exported is imported when asked for.
def __getattr__(name: str) -> Any:
    if "__all__" not in globals():
        require("train", "shift")
        exports = import_module("shift.exports")
        globals().update({each: getattr(exports, each) for each in ("__all__", *exports.__all__)})
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module 'shift' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("shift.exports").__all__})
