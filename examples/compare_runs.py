"""Train one model in two ways, and compare what each needed to get to the same accuracy.

    python examples/compare_runs.py

`shift-compare` does this for many arms and seeds, with intervals, fairness checks and a report. Here it is by
hand: a run directory holds all that a comparison of your own needs. One seed proves nothing.
"""

import dataclasses
import json
import tempfile
from pathlib import Path

from shift.config import ScheduleConfig, TaskConfig, load_config
from shift.run.trainer import Trainer

TARGET = 0.6
WAYS = {
    "looped": ScheduleConfig("constant"),
    "switch at a quarter": ScheduleConfig("fixed", {"at": 0.25}),
}

base = dataclasses.replace(
    load_config("demo"),
    task=TaskConfig("hop", options={"n_nodes": 8, "max_hops": 2}),
    steps=120,
    batch_size=32,
    eval_every=10,
    eval_samples=64,
    checkpoint_every=0,
    device="cpu",
)


def compute_to(target: float, run: Path) -> int | None:
    """Training FLOPs until an evaluation first saw the target; None: never."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next((r["flops"] for r in rows if r["kind"] == "eval" and r["accuracy"] >= target), None)


with tempfile.TemporaryDirectory() as folder:
    for name, schedule in WAYS.items():
        run = Path(folder) / name
        Trainer(dataclasses.replace(base, schedule=schedule), run).fit()
        result = json.loads((run / "result.json").read_text())
        cost = compute_to(TARGET, run)
        right, total = result["final_eval"]["accuracy"], result["flops_total"]
        reached = "never" if cost is None else f"after {cost / 1e9:.1f} GFLOP"
        print(f"{name}: {TARGET:.0%} right {reached}; {right:.0%} after all {total / 1e9:.1f} GFLOP")
