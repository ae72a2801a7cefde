"""The flat optimisers are torch's: same weights, same state, and views that stay views."""

import dataclasses
import itertools
import json

import pytest
import torch
from tiny_runs import rows, tiny

from shift.build import build_model, build_task
from shift.config import OptimiserConfig, ScheduleConfig
from shift.run import checkpoint
from shift.run.optim import build_optimizer, go_back, kinds_of, learning_rate
from shift.run.trainer import Trainer, TrainingInterrupted
from shift_kernels import ShiftInputError

CONFIG = OptimiserConfig(lr=1e-2, weight_decay=0.1)
MUON = dataclasses.replace(CONFIG, kind="muon", momentum=0.9)
each_kind = pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adamw", "muon"])


class Both:
    """Torch's two optimisers, one behind the other."""

    def __init__(self, groups):
        self.all = [
            kind([g for g in groups if ("momentum" in g) == (kind is torch.optim.Muon)], **options)
            for kind, options in ((torch.optim.Muon, {}), (torch.optim.AdamW, {"lr": 1e-2}))
            if any(("momentum" in g) == (kind is torch.optim.Muon) for g in groups)
        ]
        self.state = {p: state for optimizer in self.all for p, state in optimizer.state.items()}

    def step(self):
        for optimizer in self.all:
            optimizer.step()
            self.state |= optimizer.state

    def zero_grad(self):
        for optimizer in self.all:
            optimizer.zero_grad()


def models(optimiser=CONFIG):
    """A model with its flat optimiser, and its twin with torch's."""
    config = tiny()
    flat, plain = (build_model(config, build_task(config)) for _ in range(2))
    optimizer = build_optimizer(flat, optimiser)
    names = {id(p): name for name, p in flat.named_parameters()}
    twins = dict(plain.named_parameters())
    groups = [
        {**group, "params": [twins[names[id(p)]] for p in group["params"]], "fused": False}
        for group in optimizer.param_groups
    ]
    return flat, optimizer, plain, Both(groups)


def give_gradients(*models, seed):
    """Random gradients, the same for each model; added, as autograd does."""
    for model in models:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)


def flat_step(optimizer, clip, skipped=False):
    norm = torch.linalg.vector_norm(optimizer.gradients)
    optimizer.clip_and_step(norm, clip, torch.tensor(skipped))
    optimizer.zero_grad()
    return norm


@each_kind
@pytest.mark.parametrize("clip", [0.5, float("inf")])
def test_steps_are_those_of_torch_with_clipped_gradients(config, clip):
    flat, optimizer, plain, theirs = models(config)
    for seed in range(3):
        give_gradients(flat, plain, seed=seed)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        theirs.step()
        theirs.zero_grad()
        torch.testing.assert_close(flat_step(optimizer, clip), norm)
    for (name, p), q in zip(flat.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
        matrix = config.kind == "muon" and kinds_of(flat)[name] == "matrices"
        for key in ("momentum_buffer",) if matrix else ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[p][key], theirs.state[q][key], msg=f"{name} {key}")


@each_kind
def test_a_skipped_step_changes_nothing(config):
    flat, optimizer, _, _ = models(config)
    give_gradients(flat, seed=0)
    flat_step(optimizer, 1.0)

    def all_states():
        states = [x for state in optimizer.state.values() for x in state.values()]
        return [x.clone() for x in (optimizer.weights, *states)]

    before = all_states()
    give_gradients(flat, seed=1)
    optimizer.gradients[::7] = float("nan")
    flat_step(optimizer, 1.0, skipped=True)
    assert all(map(torch.equal, all_states(), before))


@each_kind
def test_going_back_keeps_a_share_of_the_way_and_no_moments(config):
    flat, optimizer, plain, _ = models(config)
    start = optimizer.weights.clone()
    give_gradients(flat, seed=0)
    flat_step(optimizer, 1.0)
    there = {name: p.detach().clone() for name, p in flat.named_parameters()}
    go_back(optimizer, [start], 0.25)
    for (name, p), first in zip(flat.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, first + 0.25 * (there[name] - first), msg=name)
        assert not any(x.any() for x in optimizer.state[p].values())


@each_kind
def test_a_loaded_state_goes_on_as_the_one_that_was_saved(config):
    flat, optimizer, _, _ = models(config)
    other, loaded, _, _ = models(config)
    give_gradients(flat, seed=0)
    flat_step(optimizer, 1.0)
    other.load_state_dict(flat.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    for seed in (1, 2):
        give_gradients(flat, other, seed=seed)
        for group in loaded.param_groups:
            assert group["lr"] == CONFIG.lr
        flat_step(optimizer, 1.0)
        flat_step(loaded, 1.0)
        assert torch.equal(loaded.weights, optimizer.weights)
    for p, q in zip(flat.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(loaded.state[q][key], value), key


def test_every_parameter_begins_where_vectors_may_be_loaded_and_none_overlap():
    flat, optimizer, _, _ = models()
    spans = sorted((p.data_ptr(), p.data_ptr() + 4 * p.numel()) for p in flat.parameters())
    assert all(begin % 64 == spans[0][0] % 64 for begin, _ in spans)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    total = sum(p.numel() for p in flat.parameters())
    assert total <= optimizer.weights.numel() < total + 16 * len(spans)


def test_moments_that_are_scaled_are_those_of_smaller_gradients():
    flat, optimizer, _, _ = models()
    other, smaller, _, _ = models()
    give_gradients(flat, other, seed=0)
    smaller.gradients.mul_(0.5)
    for one in (optimizer, smaller):
        one.clip_and_step(one.gradient_norm(), float("inf"), torch.tensor(False))
    optimizer.scale_moments(0.5)
    for p, q in zip(flat.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            torch.testing.assert_close(smaller.state[q][key], value)


def test_groups_have_the_rates_and_decays_of_their_kinds(tmp_path):
    optimiser = OptimiserConfig(
        lr=0.5,
        weight_decay=0.1,
        warmup=0,
        lr_factors={"embeddings": 4, "head": 0.5},
        decay_factors={"embeddings": 2.0, "matrices": 0},
    )
    trainer = Trainer(tiny(optimiser=optimiser, steps=1), tmp_path)
    trainer.fit()
    kinds = kinds_of(trainer.model)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found = {
        kinds[names[id(p)]]: (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert found == {
        "matrices": (0.5, 0.0),
        "head": (0.25, 0.1),
        "embeddings": (2.0, 0.2),
        "vectors": (0.5, 0.0),
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr_factors": {"matrix": 1}}, "lr_factors"),
        ({"decay_factors": {"head": -1}}, "decay_factors.head"),
        ({"lr_factors": {"head": "x"}}, "lr_factors.head"),
        ({"ema": 1.0}, "ema"),
        ({"keep_moments": 2.0}, "keep_moments"),
        ({"kind": "sgd"}, "kind"),
    ],
)
def test_a_setting_that_cannot_be_is_named(changes, named):
    with pytest.raises(ShiftInputError, match=f"'optimiser.{named}'"):
        OptimiserConfig(**changes)


def test_the_rate_warms_up_again_after_a_switch():
    config = OptimiserConfig(lr=1.0, warmup=0, rewarm=4, lr_schedule="wsd")
    rates = [learning_rate(config, step, 100, switch_step=10) for step in range(10, 16)]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1]
    assert learning_rate(config, 92, 100, switch_step=92) == pytest.approx(0.4 * 0.25)


SWITCHED = dataclasses.replace(CONFIG, warmup=4, rewarm=3, keep_moments=0.5, ema=0.9)


@pytest.mark.parametrize("optimiser", [SWITCHED, dataclasses.replace(SWITCHED, kind="muon", keep_moments=0)])
def test_a_run_with_all_of_it_is_resumed_exactly(tmp_path, optimiser):
    config = tiny(optimiser=optimiser)
    whole = Trainer(config, tmp_path / "whole")
    wanted = whole.fit()
    trainer = Trainer(config, tmp_path / "stopped")
    with pytest.raises(TrainingInterrupted):  # just after the switch at step 6, while the rate is rising
        trainer.fit(lambda done, _: trainer.stop() if done == 6 else None)
    resumed = Trainer(config, tmp_path / "stopped", resume=True)
    assert resumed.progress.step == 7
    got = resumed.fit()
    for key in ("weights_sha256", "optimizer_sha256", "metrics_sha256", "final_eval"):
        assert got[key] == wanted[key], key
    with resumed.average.in_place(), whole.average.in_place():
        assert checkpoint.digest(resumed.model.state_dict()) == checkpoint.digest(whole.model.state_dict())


def test_moments_are_scaled_at_the_switch_alone(tmp_path):
    seen = []
    trainer = Trainer(tiny(optimiser=SWITCHED), tmp_path)
    trainer.optimizer.scale_moments = lambda share: seen.append((trainer.progress.step, share))
    trainer.fit()
    assert seen == [(6, 0.5)]


def test_the_average_is_evaluated_and_saved_and_the_weights_go_on(tmp_path):
    plain = Trainer(tiny(optimiser=CONFIG), tmp_path / "plain")
    averaged = Trainer(tiny(optimiser=dataclasses.replace(CONFIG, ema=0.5)), tmp_path / "averaged")
    average = averaged.optimizer.weights.clone()

    def follow(_done, _total):
        average.lerp_(averaged.optimizer.weights, 0.5)

    assert plain.fit()["weights_sha256"] == averaged.fit(follow)["weights_sha256"]
    assert rows(tmp_path / "plain", "train") == rows(tmp_path / "averaged", "train")
    assert rows(tmp_path / "plain", "eval")[-1]["loss"] != rows(tmp_path / "averaged", "eval")[-1]["loss"]
    with averaged.average.in_place():
        torch.testing.assert_close(averaged.optimizer.weights, average)
    found, _ = checkpoint.newest_valid(tmp_path / "averaged" / "checkpoints")
    model = build_model(tiny(), build_task(tiny()))
    found.restore_weights(model)
    with averaged.average.in_place():
        assert checkpoint.digest(model.state_dict()) == checkpoint.digest(averaged.model.state_dict())
    manifest = json.loads((found.path / "MANIFEST.json").read_text())
    assert "average.safetensors" in manifest


def test_a_checkpoint_of_the_other_optimiser_is_refused_by_its_key(tmp_path):
    schedule = ScheduleConfig("constant")
    Trainer(tiny(steps=1, schedule=schedule), tmp_path).fit()
    other = tiny(steps=1, schedule=schedule, optimiser=OptimiserConfig(warmup=4, kind="muon"))
    with pytest.raises(ShiftInputError, match=r"optimiser\.kind"):
        Trainer(other, tmp_path, resume=True)
