"""The training loop: what it computes, what it writes down, and what it does when numbers go bad."""

import dataclasses
import functools
import json
import math
import re

import pytest
import torch
from tiny_runs import Replaced, rows, tiny

from shift.config import ModelConfig, OptimiserConfig, ScheduleConfig, TaskConfig
from shift.flops import train_step_flops
from shift.run import diagnosis
from shift.run.checkpoint import digest
from shift.run.diagnosis import NOTHING, first_not_finite
from shift.run.evaluate import evaluate
from shift.run.optim import build_optimizer, learning_rate
from shift.run.trainer import Trainer, TrainingDiverged, TrainingInterrupted
from shift.schedules import make_schedule
from shift.tasks import make_task
from shift.tasks.base import IGNORE
from shift_kernels import ShiftInputError

# --- what it writes ---------------------------------------------------------------------------------------


def test_rows_say_what_happened_at_every_step(tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    result = trainer.fit()
    train = rows(tmp_path, "train")
    assert [row["step"] for row in train] == list(range(1, 13))
    assert [row["n_loops"] for row in train] == [1] * 6 + [3] * 6
    assert [row["stage"] for row in train] == [1] * 6 + [2] * 6
    assert not any(row["skipped"] for row in train)
    assert train[-1]["block_applications"] == result["block_applications"] == 6 * 1 + 6 * 3
    single, looped = (train_step_flops(trainer.model, 8, 6, n) for n in (1, 3))
    assert [row["flops"] for row in train[5:7]] == [6 * single, 6 * single + looped]
    assert train[-1]["flops"] == result["flops_total"]
    assert result["switch_step"] == 6
    evals = rows(tmp_path, "eval")
    assert [(row["step"], row["n_loops"]) for row in evals] == [(0, 1), (4, 1), (8, 3), (12, 3)]
    assert [row["flops"] for row in evals] == [0, *(train[step - 1]["flops"] for step in (4, 8, 12))]
    assert result["final_eval"] == evals[-1]
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_each_sample_counts_with_the_loops_that_carry_its_gradient(tmp_path):
    own = torch.tensor([1, 3, 3, 1, 2, 3, 1, 1])  # the mean of all is 1.875, of the last two of each 1.5
    config = tiny(schedule=ScheduleConfig("constant", {"n_loops": 3}), n_grad_loops=2, steps=1)
    trainer = Trainer(config, tmp_path)
    trainer.task = Replaced(trainer.task, lambda batch: dataclasses.replace(batch, n_loops=own))
    alone = [train_step_flops(trainer.model, 1, 6, n, min(n, 2)) for n in own.tolist()]
    assert trainer.fit()["flops_total"] == sum(alone)


def test_more_loops_than_the_models_own_count_in_full(tmp_path):
    trainer = Trainer(tiny(steps=1), tmp_path)
    trainer.schedule = make_schedule("constant", max_loops=5, total_steps=1)  # as one's own may ask
    assert trainer.fit()["flops_total"] == train_step_flops(trainer.model, 8, 6, 5)


def test_a_schedule_without_a_switch_has_no_switch_step(tmp_path):
    for n_loops in (1, 3):
        config = tiny(schedule=ScheduleConfig("constant", {"n_loops": n_loops}), steps=2)
        assert Trainer(config, tmp_path / str(n_loops)).fit()["switch_step"] is None
        assert {row["stage"] for row in rows(tmp_path / str(n_loops), "train")} == {1 if n_loops == 1 else 2}


@pytest.mark.parametrize("changes", [{}, {"log_every": 1, "checkpoint_every": 5}, {"log_every": 100}])
def test_metrics_do_not_depend_on_when_they_are_read(tmp_path, changes):
    usual = Trainer(tiny(), tmp_path / "usual").fit()
    other = Trainer(tiny(**changes), tmp_path / "other").fit()
    assert other["metrics_sha256"] == usual["metrics_sha256"]
    assert other["weights_sha256"] == usual["weights_sha256"]


def test_arms_start_from_the_same_weights_and_see_the_same_data(tmp_path):
    shapes = ("initial_weights_sha256", "first_batches_sha256", "last_batches_sha256")
    switched = Trainer(tiny(), tmp_path / "a").fit()
    single = Trainer(tiny(schedule=ScheduleConfig("constant", {"n_loops": 1})), tmp_path / "b").fit()
    assert [switched[key] for key in shapes] == [single[key] for key in shapes]
    a, b = (rows(tmp_path / name, "train") for name in "ab")
    assert a[:6] == b[:6]
    assert a[6]["loss"] != b[6]["loss"]


def test_seeds_of_model_and_data_are_apart(tmp_path):
    base = Trainer(tiny(steps=1), tmp_path / "0").fit()
    model = Trainer(tiny(steps=1, seed=1), tmp_path / "1").fit()
    task = dataclasses.replace(tiny().task, seed=1)
    data = Trainer(tiny(steps=1, task=task), tmp_path / "2").fit()
    assert model["initial_weights_sha256"] != base["initial_weights_sha256"] == data["initial_weights_sha256"]
    assert model["first_batches_sha256"] == base["first_batches_sha256"] != data["first_batches_sha256"]


def test_progress_is_reported_after_every_step(tmp_path):
    seen = []
    Trainer(tiny(), tmp_path).fit(lambda done, total: seen.append((done, total)))
    assert seen == [(step, 12) for step in range(1, 13)]


# --- what it computes -------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_the_read_positions_only(tmp_path):
    def first_position_only(batch):
        targets = batch.targets.clone()
        targets[:, 1:] = IGNORE
        return dataclasses.replace(batch, targets=targets)

    trainer = Trainer(tiny(steps=1, schedule=ScheduleConfig("constant", {"n_loops": 1})), tmp_path)
    trainer.task = Replaced(trainer.task, first_position_only)
    batch = trainer.task.batch(8, 0)
    with torch.no_grad():
        logits = trainer.model(batch.tokens, 1, context=batch.context)[:, 0]
    wanted = torch.nn.functional.cross_entropy(logits, batch.targets[:, 0])
    trainer.fit()
    assert rows(tmp_path, "train")[0]["loss"] == pytest.approx(wanted.item(), rel=1e-6)


def test_the_schedule_is_asked_once_a_step_and_told_the_step_before(tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    asked, ask = [], trainer.schedule.step

    def spy(step, signals):
        asked.append((step, None if signals is None else (signals.loss.item(), signals.grad_norm.item())))
        return ask(step, signals)

    trainer.schedule.step = spy
    trainer.fit()
    told = [(row["step"], (row["loss"], row["grad_norm"])) for row in rows(tmp_path, "train")]
    assert asked == [(0, None), *told[:-1]]


def test_each_sample_runs_its_own_loops_up_to_what_the_schedule_allows(tmp_path):
    own = torch.tensor([1, 2, 3, 4, 5, 1, 1, 2])
    trainer = Trainer(tiny(steps=4), tmp_path)
    trainer.task = Replaced(trainer.task, lambda batch: dataclasses.replace(batch, n_loops=own))
    given = []
    trainer.model.register_forward_pre_hook(lambda _module, args: given.append(args[1]))
    trainer.fit()
    stage_1 = [loops for loops in given if isinstance(loops, int)]
    stage_2 = [loops.tolist() for loops in given if not isinstance(loops, int)]
    assert stage_1 == [1] * 4  # two evaluation batches and two steps
    assert stage_2 == [own.clamp(max=3).tolist()] * 4
    assert rows(tmp_path, "train")[-1]["block_applications"] == 2 + 2 * own.clamp(max=3).double().mean()


def test_training_learns(tmp_path):
    config = tiny(
        steps=150,
        batch_size=32,
        optimiser=OptimiserConfig(lr=1e-2, warmup=10),
        eval_every=0,
        eval_samples=256,
    )
    config = dataclasses.replace(config, task=TaskConfig("hop", options={"n_nodes": 4, "max_hops": 1}))
    Trainer(config, tmp_path).fit()
    before, after = rows(tmp_path, "eval")
    assert before["accuracy"] < 0.5
    assert after["accuracy"] > 0.9


def test_bf16_is_autocast_around_fp32_weights(tmp_path):
    fp32 = Trainer(tiny(steps=3), tmp_path / "fp32")
    bf16 = Trainer(tiny(steps=3, precision="bf16"), tmp_path / "bf16")
    fp32.fit()
    bf16.fit()
    assert {p.dtype for p in bf16.model.parameters()} == {torch.float32}
    exact, rounded = (rows(tmp_path / name, "train")[0]["loss"] for name in ("fp32", "bf16"))
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.02)  # bf16 keeps 8 bits: 2^-8 a product, averaged


def test_evaluation_counts_positions_sequences_and_groups(tmp_path):
    trainer = Trainer(tiny(), tmp_path)

    class Oracle(torch.nn.Module):
        """Right everywhere but at the first position of every second sequence."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.index = -1

        def forward(self, tokens, n_loops, **_):
            self.index += 1
            targets = trainer.task.batch(len(tokens), self.index, split="eval").targets
            targets[::2, 0] = (targets[::2, 0] + 1) % trainer.task.n_classes
            return 100.0 * torch.nn.functional.one_hot(targets, trainer.task.n_classes)

    scores = evaluate(Oracle(), trainer.task, n_loops=1, n_samples=20, batch_size=8)
    assert scores["exact"] == 0.5
    assert scores["accuracy"] == pytest.approx(1 - 0.5 / 6)
    assert scores["loss"] == pytest.approx(100 * 0.5 / 6)
    assert set(scores["groups"]) == set(trainer.task.group_names)
    assert evaluate(Oracle(), trainer.task, n_loops=1, n_samples=20, batch_size=8) == scores


WHOLE = dataclasses.replace(
    tiny().model, n_prelude=1, n_coda=1, tied=True, logit_softcap=10.0, depth_init=True
)


def test_a_whole_model_with_a_loss_after_every_loop_resumes_exactly(tmp_path):
    config = tiny(model=WHOLE, loop_loss=(0.5, 1.0))
    whole = Trainer(config, tmp_path / "whole").fit()
    trainer = Trainer(config, tmp_path / "stopped")
    with pytest.raises(TrainingInterrupted):
        trainer.fit(lambda done, _total: trainer.stop() if done == 7 else None)
    resumed = Trainer(config, tmp_path / "stopped", resume=True).fit()
    keys = ("weights_sha256", "optimizer_sha256", "metrics_sha256", "final_eval")
    assert [resumed[key] for key in keys] == [whole[key] for key in keys]


def test_micro_batches_change_no_gradient_of_a_whole_model(tmp_path):
    losses = []
    for micro_batch in ("whole", 3):
        config = tiny(model=WHOLE, loop_loss=(1.0,), steps=4, micro_batch=micro_batch)
        Trainer(config, tmp_path / str(micro_batch)).fit()
        losses.append([row["loss"] for row in rows(tmp_path / str(micro_batch), "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- numbers that are not finite --------------------------------------------------------------------------


def poison(trainer, bad_steps, where):
    """Make loss or gradients non-finite at these steps (0-based)."""

    def hook(_module, _args, logits):
        if not torch.is_grad_enabled() or trainer.progress.step not in bad_steps:
            return logits
        if where == "gradient":
            logits.register_hook(lambda gradient: gradient * float("inf"))
            return logits
        return logits * float("nan")

    trainer.model.register_forward_hook(hook)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("bad_step", [0, 3, 7])
def test_a_bad_step_leaves_every_bit_of_weights_and_optimiser(tmp_path, where, bad_step):
    trainer = Trainer(tiny(eval_every=0), tmp_path)
    poison(trainer, {bad_step}, where)
    digests = [digest(trainer.model.state_dict())]
    moments = [digest({})]

    def remember(_done, _total):
        digests.append(digest(trainer.model.state_dict()))
        moments.append(digest(trainer.optimizer.state_dict()["state"]))

    result = trainer.fit(remember)
    unchanged = [step for step in range(12) if digests[step] == digests[step + 1]]
    assert unchanged == [bad_step]
    if bad_step > 0:  # before the first good step there is no state to compare
        assert [step for step in range(12) if moments[step] == moments[step + 1]] == [bad_step]
    assert [row["step"] for row in rows(tmp_path, "train") if row["skipped"]] == [bad_step + 1]
    assert result["skipped_steps"] == 1


def test_five_bad_steps_in_a_row_stop_the_run_with_its_weights(tmp_path):
    trainer = Trainer(tiny(log_every=1, checkpoint_every=0), tmp_path)
    poison(trainer, set(range(4, 100)), "loss")
    weights = {}
    with pytest.raises(TrainingDiverged, match=r"5 steps up to 9.*optimiser\.lr"):
        trainer.fit(lambda done, _: weights.update({done: digest(trainer.model.state_dict())}))
    assert digest(trainer.model.state_dict()) == weights[4]
    assert [row["loss"] for row in rows(tmp_path, "train")][4:] == [None] * 5


def test_five_bad_steps_stop_the_run_whenever_they_are_noticed(tmp_path):
    trainer = Trainer(tiny(log_every=100, checkpoint_every=0), tmp_path)
    poison(trainer, set(range(2, 7)), "loss")
    with pytest.raises(TrainingDiverged, match="5 steps up to 7"):
        trainer.fit()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("block.layers.1.linear1.weight", "the MLP of layer 1 of 2, loop 1"),
        ("block.layers.0.self_attn.out_proj.weight", "the attention of layer 0 of 2, loop 1"),
        ("head.weight", "the logits"),
    ],
)
def test_a_diverged_run_names_the_first_bad_tensor_and_how_to_make_its_batch(tmp_path, name, what):
    model = ModelConfig(n_loops=3, d_model=16, n_heads=2, d_ff=32, n_layers=2, activation="relu")
    config = tiny(eval_every=0, checkpoint_every=0, model=model, schedule=ScheduleConfig("constant"))
    trainer = Trainer(config, tmp_path)
    parameter = dict(trainer.model.named_parameters())[name]
    parameter.data.copy_(torch.where(torch.arange(16) % 2 == 0, 3e38, -3e38))  # finite, but not their sums
    with pytest.raises(TrainingDiverged) as error:
        trainer.fit()
    assert "First not finite: activation" in str(error.value)
    assert what in str(error.value)
    call = re.search(r"make_task\(.*\)\.batch\(.*?\)", str(error.value))[0]
    again = eval(call, {"make_task": make_task})
    assert torch.equal(again.tokens, trainer.task.batch(8, 4).tokens)


def test_a_diverged_run_names_a_weight_or_a_later_loop(tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    batch = trainer.task.batch(8, 0)
    look = functools.partial(first_not_finite, trainer.model, batch, 3, trainer.config)
    assert look() == NOTHING
    parameters = dict(trainer.model.named_parameters())
    with torch.no_grad():
        parameters["block.layers.0.linear2.bias"].fill_(3e38)
    assert "attention of layer 0 of 1, loop 2" in look()  # h_1 is finite; h_1 + e is normalised by infinity
    with torch.no_grad():
        trainer.model.head.bias[1] = math.nan
    assert look() == "weight head.bias"


@pytest.mark.filterwarnings("default::shift_kernels.BackendFallbackWarning")  # not every kernel takes h0
@pytest.mark.parametrize("injection", ["concat", "norm_add"])
def test_a_run_with_any_injection_is_looked_through(injection, tmp_path):
    model = dataclasses.replace(
        tiny().model, injection=injection, residual_scale="1/T", initial_state="learned"
    )
    trainer = Trainer(tiny(model=model), tmp_path)
    batch = trainer.task.batch(8, 0)
    assert first_not_finite(trainer.model, batch, 3, trainer.config) == NOTHING
    last = [what for what, _ in diagnosis._states(trainer.model, batch, 3)][-1]
    states = dict(diagnosis._states(trainer.model, batch, 3))
    torch.testing.assert_close(states[last], trainer.model.states(batch.tokens, 3, context=batch.context))


def test_a_diverged_run_names_a_layer_outside_the_loop(tmp_path):
    trainer = Trainer(tiny(model=WHOLE), tmp_path)
    look = functools.partial(first_not_finite, trainer.model, trainer.task.batch(8, 0), 3, trainer.config)
    assert look() == NOTHING
    with torch.no_grad():
        trainer.model.coda.layers.get_submodule("0.linear1").bias.fill_(3e38)
        trainer.model.coda.layers.get_submodule("0.linear2").weight.fill_(1e3)
    assert "MLP of layer 0 of 1 of the coda" in look()


def test_an_evaluation_that_is_not_finite_is_written_as_such(tmp_path):
    trainer = Trainer(tiny(steps=1), tmp_path)
    trainer.model.register_forward_hook(lambda _module, _args, logits: logits * float("inf"))
    assert trainer.fit()["final_eval"]["loss"] is None
    assert [row["loss"] for row in rows(tmp_path, "eval")] == [None, None]


def test_bad_steps_that_are_not_in_a_row_do_not_stop_the_run(tmp_path):
    trainer = Trainer(tiny(log_every=1), tmp_path)
    poison(trainer, {0, 1, 2, 3, 5, 6, 7, 8}, "loss")
    assert trainer.fit()["skipped_steps"] == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_gpu(tmp_path):
    pytest.importorskip("tomli_w", reason="a run directory needs tomli_w")
    criterion = ScheduleConfig("shift", {"interval": 100})
    config = tiny(device="cuda", schedule=criterion, eval_every=0, log_every=100, checkpoint_every=0)
    trainer = Trainer(config, tmp_path)
    modes = {2: "error", 11: "default"}  # but for the first two steps and the last, which reads and saves
    try:
        trainer.fit(lambda done, _: torch.cuda.set_sync_debug_mode(modes[done]) if done in modes else None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- optimiser --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "run_dir", "argument"), [({}, "run", "config"), (tiny(), None, "run_dir")]
)
def test_what_is_no_config_or_path_is_named(config, run_dir, argument):
    with pytest.raises(ShiftInputError, match=f"'{argument}'"):
        Trainer(config, run_dir)


def test_norms_biases_and_embeddings_are_not_decayed(tmp_path):
    model = Trainer(tiny(), tmp_path).model
    decayed, kept = build_optimizer(model, OptimiserConfig(weight_decay=0.5)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in (decayed, kept))
    assert decayed | kept == set(names.values())
    assert decayed == {
        "head.weight",
        "block.layers.0.self_attn.in_proj_weight",
        "block.layers.0.self_attn.out_proj.weight",
        "block.layers.0.linear1.weight",
        "block.layers.0.linear2.weight",
    }


def test_at_a_switch_the_weights_go_back_as_far_as_the_schedule_says(tmp_path):
    # A look every 2 steps, of which the third is a hit: the two before have nothing to compare.
    scp = {"interval": 2, "patience": 1, "delta_1": 1e3, "delta_2": 1e3, "keep": 0.0}
    trainer = Trainer(tiny(schedule=ScheduleConfig("shift", scp)), tmp_path / "back")
    assert trainer.fit()["switch_step"] == 6

    untouched = Trainer(tiny(steps=1, schedule=ScheduleConfig("constant")), tmp_path / "untouched")
    batch = trainer.task.batch(8, 6)
    logits = untouched.model(batch.tokens, 3, context=batch.context).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE)
    assert rows(tmp_path / "back", "train")[6]["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("lr_schedule", "rates"),
    [("constant", [0.5, 1, 1, 1, 1]), ("cosine", [0.5, 1, 1, 0.5, 0]), ("wsd", [0.5, 1, 1, 1, 0])],
)
def test_learning_rates(lr_schedule, rates):
    config = OptimiserConfig(lr=2.0, warmup=20, lr_schedule=lr_schedule)
    steps = (9, 19, 20, 60, 100)  # of 100; the rate of "step 100" is what the last one tends to
    assert [learning_rate(config, step, 100) / 2 for step in steps] == pytest.approx(rates)


def test_wsd_decays_over_the_last_fifth():
    config = OptimiserConfig(lr=1.0, warmup=0, lr_schedule="wsd")
    assert [learning_rate(config, step, 100) for step in (79, 80, 90)] == pytest.approx([1, 1, 0.5])
