"""Steps in which samples differ in their loops, and steps with a loss after every loop."""

import dataclasses

import pytest
import torch
from test_micro_batches import uneven
from tiny_runs import rows, tiny

from shift.build import build_task
from shift.config import ModelConfig, ScheduleConfig
from shift.flops import read_flops, train_step_flops
from shift.run.by_sample import DearestDeeper
from shift.run.trainer import Trainer
from shift.schedules import BySample
from shift_kernels import ShiftInputError

WHOLE = ModelConfig(n_loops=3, d_model=16, n_heads=2, d_ff=32, n_prelude=1, n_coda=1)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("own", [False, True], ids=["one T", "own T"])
@pytest.mark.parametrize("micro_batch", [8, 3])
def test_the_dearest_go_on_and_gradients_are_those_of_their_loops(tmp_path, backend, own, micro_batch):
    trainer = Trainer(tiny(backend=backend, model=WHOLE), tmp_path)
    batch = uneven(build_task(tiny()).batch(8, 0))
    loops = batch.n_loops if own else 3
    deeper = DearestDeeper(BySample(1, 0.5, 0), trainer.model, trainer.config, (0, 0, 0))
    loss = trainer._step.backward(batch, loops, micro_batch, summed_loss=deeper.summed_loss)
    found = trainer.optimizer.gradients.clone()
    wanted = trainer._step.backward(batch, deeper.used, micro_batch)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, trainer.optimizer.gradients, rtol=1e-4, atol=1e-7)
    if not own and micro_batch == 8:
        assert sorted(deeper.used.tolist()) == [1] * 4 + [3] * 4
        with torch.no_grad():
            costs = [
                trainer.model(batch.tokens[i : i + 1], 1, context=batch.context[i : i + 1], targets=t[None])
                / (t != -100).sum()
                for i, t in enumerate(batch.targets)
            ]
        dearest = torch.stack(costs).topk(4).indices
        assert set(dearest.tolist()) == set(torch.nonzero(deeper.used == 3)[:, 0].tolist())


def test_some_of_those_that_go_on_are_drawn(tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    batch = build_task(tiny()).batch(8, 0)

    def chosen(drawn, step):
        deeper = DearestDeeper(BySample(1, 0.5, drawn), trainer.model, trainer.config, (0, step, 0))
        deeper.summed_loss(batch, 3)
        return tuple(deeper.used.tolist())

    assert len({chosen(0, step) for step in range(8)}) == 1
    assert len({chosen(1, step) for step in range(8)}) > 4
    assert chosen(1, 3) == chosen(1, 3)


def test_a_sample_is_charged_its_own_loops_and_the_choice_a_read_out(tmp_path):
    config = tiny(schedule=ScheduleConfig("by_sample", {"share": 0.25, "until": 0.5}), model=WHOLE)
    trainer = Trainer(config, tmp_path)
    trainer.fit()
    train = rows(tmp_path, "train")
    model, size = trainer.model, (8, trainer.task.max_seq_len)
    mixed = train_step_flops(model, *size, 1.5) + 8 * read_flops(model, size[1])
    assert train[0]["flops"] == mixed
    assert train[0]["block_applications"] == 1.5
    assert train[-1]["flops"] - train[-2]["flops"] == train_step_flops(model, *size, 3)
    assert {row["n_loops"] for row in rows(tmp_path, "eval")} == {3}


@pytest.mark.parametrize(("key", "value"), [("n_grad_loops", 1), ("loop_loss", (1.0,)), ("compile", True)])
def test_what_cannot_differ_by_sample_is_refused(tmp_path, key, value):
    trainer = Trainer(tiny(schedule=ScheduleConfig("by_sample", {}), **{key: value}), tmp_path)
    with pytest.raises(ShiftInputError, match=f"'{key}'"):
        trainer.fit()


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_the_losses_after_every_loop_train_as_their_mean(tmp_path, micro_batch):
    config = tiny(model=WHOLE)
    trainer = Trainer(config, tmp_path / "a")
    batch = build_task(config).batch(8, 0)
    losses = trainer._step.backward(batch, 3, micro_batch, every_loop=3)
    found = trainer.optimizer.gradients.clone()
    with torch.no_grad():
        each = [
            trainer.model(batch.tokens, n, context=batch.context, targets=batch.targets) for n in (1, 2, 3)
        ]
    n_read = (batch.targets != -100).sum()
    torch.testing.assert_close(losses, torch.stack(each) / n_read, rtol=1e-5, atol=0)
    weighted = Trainer(dataclasses.replace(config, loop_loss=(1.0,)), tmp_path / "b")
    loss = weighted._step.backward(batch, 3, micro_batch)
    torch.testing.assert_close(losses.mean(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, weighted.optimizer.gradients, rtol=1e-4, atol=1e-7)


def test_losses_of_samples_that_have_ended_stay_as_they_were(tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    batch = dataclasses.replace(uneven(build_task(tiny()).batch(8, 0)), n_loops=torch.tensor([1, 2] * 4))
    losses = trainer._step.backward(batch, batch.n_loops, 3, every_loop=3)
    whole = trainer._step.backward(batch, batch.n_loops)
    torch.testing.assert_close(losses[1:], whole.expand(2))
    assert losses[0] != losses[1]


def test_sighting_costs_a_read_out_a_loop_and_what_follows_does_not(tmp_path):
    config = tiny(schedule=ScheduleConfig("sighted", {"until": 0.25, "within": 100.0, "interval": 50}))
    trainer = Trainer(config, tmp_path)
    trainer.fit()
    train = rows(tmp_path, "train")
    model, size = trainer.model, (8, trainer.task.max_seq_len)
    assert train[0]["flops"] == train_step_flops(model, *size, 3, all_loops=True)
    assert [row["n_loops"] for row in train] == [3] * 3 + [1] * 9
    assert train[-1]["flops"] - train[-2]["flops"] == train_step_flops(model, *size, 1)
