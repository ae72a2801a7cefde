"""Use a schedule in a training loop of your own: the criterion decides when the model starts to loop.

    python examples/own_training_loop.py

The schedule is told the loss and the gradient norm of the step before, and answers with the number of loops
of this one. Nothing is rebuilt at the switch: the number is an argument of the model.
"""

import torch

from shift import Hop, LoopedTransformer, Signals, make_schedule
from shift_kernels import BlockSpec

STEPS = 150

torch.manual_seed(0)
task = Hop(n_nodes=8, max_hops=2)
spec = BlockSpec(d_model=32, n_heads=2, d_ff=64, causal=task.causal, injection="add")
model = LoopedTransformer.for_task(spec, task)
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)

# Looks at the smoothed loss every 10 steps; 2 looks in a row without much progress are enough.
schedule = make_schedule(
    "shift", max_loops=4, total_steps=STEPS, interval=10, patience=2, delta_1=0.1, delta_2=0.5
)
print(schedule.scp)

signals = None
for step in range(STEPS):
    decision = schedule.step(step, signals)
    if decision.switched:
        print(f"step {step}: from here on {decision.n_loops} loops")
    batch = task.batch(64, step)
    logits = model(batch.tokens, decision.n_loops, context=batch.context)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    optimiser.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    signals = Signals(loss.detach(), grad_norm)  # on the device: the criterion reads them when it looks

held_out = task.batch(256, 0, split="eval")
answers = model(held_out.tokens, decision.n_loops, context=held_out.context).argmax(-1)
print(f"after {STEPS} steps: {float((answers == held_out.targets).float().mean()):.0%} right")
