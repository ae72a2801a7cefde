"""A step that is cut into micro-batches is the step: gradients, losses, and the batch at the switch."""

import dataclasses

import pytest
import torch
from tiny_runs import Replaced, rows, tiny

from shift.build import build_task
from shift.config import ScheduleConfig, TrainConfig
from shift.run import micro_batches
from shift.run.evaluate import evaluate, loops_of
from shift.run.micro_batches import MicroBatches
from shift.run.trainer import Trainer, TrainingInterrupted
from shift.tasks.base import IGNORE
from shift_kernels import ShiftInputError


def uneven(batch):
    """Read positions that differ widely between samples: the last one alone has all of them."""
    few = torch.arange(batch.targets.shape[1]) > torch.arange(len(batch.tokens))[:, None] % 3
    few[-1] = False
    own = torch.arange(len(batch.tokens)) % 3 + 1
    return dataclasses.replace(batch, targets=batch.targets.masked_fill(few, IGNORE), n_loops=own)


@pytest.mark.parametrize("micro_batch", [1, 3, 7, 8])
@pytest.mark.parametrize("n_loops", [1, 3])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_gradients_are_those_of_the_whole_batch(tmp_path, micro_batch, n_loops, backend):
    trainer = Trainer(tiny(backend=backend), tmp_path)
    batch = uneven(build_task(tiny()).batch(8, 0))
    loops = loops_of(batch, n_loops)
    whole = trainer._step.backward(batch, loops)
    wanted = trainer.optimizer.gradients.clone()
    loss = trainer._step.backward(batch, loops, micro_batch)
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    error = (trainer.optimizer.gradients - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-6


def test_a_random_first_state_is_a_samples_own_however_the_batch_is_cut(tmp_path):
    model = dataclasses.replace(tiny().model, initial_state="random")
    step = Trainer(tiny(model=model, backend="torch"), tmp_path)._step
    batch = build_task(tiny()).batch(8, 0)
    whole = step.backward(batch, 3)
    torch.testing.assert_close(step.backward(batch, 3, 3), whole, rtol=1e-6, atol=0)
    assert step.backward(batch, 3, step=1) != whole
    twins = batch.rows(0, 1)  # the same sample, at two places
    assert step.backward(twins, 3, first_row=1) != step.backward(twins, 3)


def test_the_batch_stays_and_the_micro_batch_falls_at_the_switch(tmp_path):
    whole = Trainer(tiny(), tmp_path / "whole")
    cut = Trainer(tiny(micro_batch="1:8,3:2"), tmp_path / "cut")
    seen = []
    cut.model.register_forward_pre_hook(
        lambda model, args: seen.append((len(args[0]), args[1])) if torch.is_grad_enabled() else None
    )
    for trainer in (whole, cut):
        trainer.task = Replaced(trainer.task, lambda b: dataclasses.replace(uneven(b), n_loops=None))
    whole.fit()
    cut.fit()
    assert seen == [(8, 1)] * 6 + [(2, 3)] * 6 * 4
    theirs, ours = (rows(tmp_path / name, "train") for name in ("cut", "whole"))
    for key in ("loss", "grad_norm", "flops", "block_applications"):
        assert [row[key] for row in theirs] == pytest.approx([row[key] for row in ours], rel=1e-4), key


def test_an_evaluation_in_parts_is_the_whole(tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    task = Replaced(trainer.task, uneven)
    one, other = (
        evaluate(trainer.model, task, n_loops=3, n_samples=20, batch_size=8, micro_batch=size)
        for size in (None, 3)
    )
    assert other.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-6)
    assert other == one


@pytest.mark.parametrize(
    ("setting", "sizes"),
    [
        ("whole", [64, 64, 64, 64]),
        (5, [5, 5, 5, 5]),
        (100, [64, 64, 64, 64]),
        ("1:64,3:16", [64, 16, 16, 16]),
        ("4:8,2:32", [32, 32, 8, 8]),
    ],
)
def test_sizes_by_loops(setting, sizes):
    micro = MicroBatches(TrainConfig(micro_batch=setting).micro_batch, 64)
    assert [micro.of(n_loops) for n_loops in (1, 2, 3, 8)] == sizes


@pytest.mark.parametrize("setting", [0, -1, 1.5, "", "half", "1:0", "1:64,", "0:3", True])
def test_what_is_no_micro_batch_is_refused(setting):
    with pytest.raises(ShiftInputError, match=r"'micro_batch'.*1:64,4:16"):
        TrainConfig(micro_batch=setting)


def test_on_an_accelerator_the_largest_that_fits_is_found():
    room = 100

    def attempt(size, n_loops):
        if size * (n_loops + 1) > room:
            raise torch.OutOfMemoryError

    micro = MicroBatches("auto", 64)
    assert not micro.known
    micro.find(attempt, 6, torch.device("cuda"))
    assert [micro.of(n) for n in (1, 2, 3, 4, 6)] == [32, 32, 16, 16, 8]
    again = MicroBatches("auto", 64)
    again.load_state_dict(micro.state_dict())
    assert [again.of(n) for n in (1, 2, 4, 6)] == [32, 32, 16, 8]
    with pytest.raises(torch.OutOfMemoryError):
        MicroBatches("auto", 4).find(attempt, 128, torch.device("cuda"))


def test_on_the_cpu_the_fastest_is_found_and_of_equals_the_largest(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(micro_batches.time, "perf_counter", lambda: clock[0])

    def attempt(size, n_loops):  # a call costs 1; beyond 16 sequences they fall out of the cache
        clock[0] += 1 + size * (0.5 if size <= 16 or n_loops == 1 else 3)

    micro = MicroBatches("auto", 64)
    micro.find(attempt, 2, torch.device("cpu"))
    assert [micro.of(n) for n in (1, 2)] == [64, 16]


def test_a_run_that_finds_its_sizes_goes_on_with_them(tmp_path, monkeypatch):
    config = tiny(micro_batch="auto", schedule=ScheduleConfig("constant"), steps=6)
    monkeypatch.setattr(micro_batches, "_fastest", lambda attempt, most: attempt(3) or 3)
    whole = Trainer(config, tmp_path / "whole").fit()
    trainer = Trainer(config, tmp_path / "stopped")
    with pytest.raises(TrainingInterrupted):
        trainer.fit(lambda done, _: trainer.stop() if done == 3 else None)
    monkeypatch.setattr(micro_batches, "_fastest", lambda attempt, most: 1)  # of another machine
    resumed = Trainer(config, tmp_path / "stopped", resume=True)
    assert resumed.fit()["weights_sha256"] == whole["weights_sha256"]
    assert resumed.micro_batches.of(3) == 3
    usual = Trainer(tiny(micro_batch=3, schedule=config.schedule, steps=6), tmp_path / "given").fit()
    assert usual["weights_sha256"] == whole["weights_sha256"], "the probe left a trace"
