"""The flat optimiser is torch's: same weights, same state, and views that stay views."""

import itertools

import pytest
import torch
from tiny_runs import tiny

from shift.build import build_model, build_task
from shift.config import OptimiserConfig
from shift.run.optim import build_optimizer

CONFIG = OptimiserConfig(lr=1e-2, weight_decay=0.1)


def models():
    """A model with its flat optimiser, and its twin with torch's."""
    config = tiny()
    flat, plain = (build_model(config, build_task(config)) for _ in range(2))
    optimizer = build_optimizer(flat, CONFIG)
    names = {id(p): name for name, p in flat.named_parameters()}
    twins = dict(plain.named_parameters())
    groups = [
        {**group, "params": [twins[names[id(p)]] for p in group["params"]], "fused": False}
        for group in optimizer.param_groups
    ]
    return flat, optimizer, plain, torch.optim.AdamW(groups)


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


@pytest.mark.parametrize("clip", [0.5, float("inf")])
def test_steps_are_those_of_torch_with_clipped_gradients(clip):
    flat, optimizer, plain, theirs = models()
    for seed in range(3):
        give_gradients(flat, plain, seed=seed)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        theirs.step()
        theirs.zero_grad()
        torch.testing.assert_close(flat_step(optimizer, clip), norm)
    for (name, p), q in zip(flat.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[p][key], theirs.state[q][key], msg=f"{name} {key}")


def test_a_skipped_step_changes_nothing():
    flat, optimizer, _, _ = models()
    give_gradients(flat, seed=0)
    flat_step(optimizer, 1.0)
    before = [x.clone() for x in (optimizer.weights, *optimizer.state[flat.head.weight].values())]
    give_gradients(flat, seed=1)
    flat_step(optimizer, 1.0, skipped=True)
    after = [optimizer.weights, *optimizer.state[flat.head.weight].values()]
    assert all(map(torch.equal, after, before))


def test_going_back_keeps_a_share_of_the_way_and_no_moments():
    flat, optimizer, plain, _ = models()
    start = optimizer.weights.clone()
    give_gradients(flat, seed=0)
    flat_step(optimizer, 1.0)
    there = {name: p.detach().clone() for name, p in flat.named_parameters()}
    optimizer.go_back(start, 0.25)
    for (name, p), first in zip(flat.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, first + 0.25 * (there[name] - first), msg=name)
        assert not any(x.any() for x in optimizer.state[p].values())


def test_a_loaded_state_goes_on_as_the_one_that_was_saved():
    flat, optimizer, _, _ = models()
    other, loaded, _, _ = models()
    give_gradients(flat, seed=0)
    flat_step(optimizer, 1.0)
    other.load_state_dict(flat.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    for seed in (1, 2):
        give_gradients(flat, other, seed=seed)
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
