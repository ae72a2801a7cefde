"""Training on the device: tokens a second of a language model's sizes, the demo, the tasks of Fan et al."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu import device
from benchmarks.gpu.work import UNFINISHED, Case, Finding, Group, lacking, refused, rehearsing, work_folder
from shift.model import LoopedTransformer
from shift_kernels import BlockSpec, ShiftInputError

LIMIT_S = 150.0
FAN_S = 240.0
"""Of Fan's training in one call; it goes on in the next."""
FAN_TASKS = ("parity",)
BACKENDS: tuple[str, ...] = ("torch", "triton", "cuda", "auto")
LM: dict[str, int] = dict(batch=16, seq_len=512, d_model=512, n_heads=8, n_loops=8, vocab_size=32768)
SECONDS = 5.0
if rehearsing():
    LM = dict(batch=1, seq_len=9, d_model=16, n_heads=2, n_loops=2, vocab_size=11)
    BACKENDS = ("torch", "triton")


def groups() -> list[Group]:
    """A process each, one after another: times count."""
    lm = [[Case("training", f"lm / {name}", LIMIT_S, dict(do="lm", backend=name))] for name in BACKENDS]
    demo = [[Case("training", "demo", LIMIT_S, dict(do="demo"))]]
    fan = [[Case("training", f"fan / {t}", FAN_S + 120, dict(do="fan", task=t))] for t in FAN_TASKS]
    return [Group([*lm, *demo, *fan])]


def run(case: Case) -> Finding:
    """What the plan says; a module that is not installed is said, and no fault."""
    arguments = dict(case.arguments)
    do = {"lm": language_model, "demo": demo, "fan": fan}[arguments.pop("do")]
    try:
        return do(**arguments)
    except ModuleNotFoundError as missing:
        return lacking(missing)
    except ShiftInputError as refusal:
        return refused(refusal)


def language_model(backend: str) -> Finding:
    """Steps of AdamW on random tokens: fp32 weights, bf16 autocast; the body is a GPT block, looped."""
    here = device.here()
    torch.manual_seed(0)
    spec = BlockSpec(d_model=LM["d_model"], n_heads=LM["n_heads"], position="rope", injection="add")
    model = LoopedTransformer(
        spec,
        vocab_size=LM["vocab_size"],
        n_classes=LM["vocab_size"],
        max_seq_len=LM["seq_len"],
        learned_positions=False,
    ).to(here.torch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(LM["vocab_size"], (LM["batch"], LM["seq_len"] + 1), device=here.torch)
    loss = torch.zeros(())

    def step() -> None:
        nonlocal loss
        with torch.autocast(here.torch, torch.bfloat16):
            logits = model(tokens[:, :-1], LM["n_loops"], backend=backend)
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(1 if rehearsing() else 5):
        step()
    ms = statistics.median(device.times(here, step, SECONDS))
    rate = 1e3 * LM["batch"] * LM["seq_len"] / ms
    data: dict[str, Any] = dict(tokens_per_s=rate, ms_per_step=ms, peak_mib=here.peak() / 2**20)
    return Finding(data=data | dict(loss=float(loss.detach())))


def demo() -> Finding:
    """The demo's run with SHIFT's schedule: does it learn, and how long does it take?"""
    from shift.config import load_config
    from shift.run.trainer import Trainer

    config = dataclasses.replace(load_config("demo"), device=device.here().torch)
    if rehearsing():
        config = dataclasses.replace(config, steps=2, batch_size=2, eval_samples=2, eval_every=0)
    result = Trainer(config, work_folder() / "demo", resume=True).fit()
    facts = {key: result[key] for key in ("steps", "switch_step", "train_s")}
    return Finding(data=facts | dict(accuracy=result["final_eval"].get("accuracy")))


def fan(task: str) -> Finding:
    """Train what is left of a task, for a while."""
    from benchmarks.gpu import fan as study

    config = dataclasses.replace(study.task_config(task), device=device.here().torch)
    arms: tuple[str, ...] = study.ARMS
    if rehearsing():
        arms = ("looped",)
        model = dataclasses.replace(config.model, n_loops=3, d_model=16, n_heads=2, d_ff=16)
        own = dataclasses.replace(config.task, options={"max_length": 3})
        config = dataclasses.replace(
            config, task=own, model=model, steps=2, batch_size=2, eval_samples=2, eval_every=0
        )
    out = work_folder() / "fan"
    code = study.run({task: config}, arms, (0,), out, FAN_S, "python -m benchmarks.gpu.fan")
    if code == 0:
        return Finding(data=dict(report=str((out / task / "report.md").relative_to(work_folder()))))
    return Finding(UNFINISHED, "goes on in the next call")
