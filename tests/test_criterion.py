"""SCP fires on a plateau with stable gradients, and on nothing else. Traces are ours, seeded."""

import json
import math

import pytest
import torch

from shift.criterion import SCP, SCPConfig, Signals
from shift_kernels import ShiftInputError


def signals(loss: float, grad_norm: float = 1.0) -> Signals:
    return Signals(torch.tensor(float(loss)), torch.tensor(float(grad_norm)))


def run(losses, grads=None, **options):
    """The looks of a trace."""
    scp = SCP(SCPConfig(**options))
    grads = [1.0] * len(losses) if grads is None else grads
    return [look for x, g in zip(losses, grads, strict=True) if (look := scp.observe(signals(x, g)))]


def fired_at(losses, grads=None, **options):
    return next((look.step for look in run(losses, grads, **options) if look.fired), None)


def falling(rng, n=400, per_look=0.08, noise=0.05):
    """A loss that gains ``per_look`` every 20 steps, with multiplicative noise."""
    return (
        2.0 * (1 - per_look) ** (torch.arange(n) / 20) * (1 + noise * torch.randn(n, generator=rng))
    ).tolist()


def test_a_plateau_fires_after_patience_looks():
    # The first look has nothing to compare with, then five hits: looks at 40, 60, 80, 100, 120.
    assert fired_at([2.0] * 200) == 120
    assert fired_at([2.0] * 200, patience=2, interval=10) == 30


@pytest.mark.parametrize("seed", range(72))
def test_a_falling_loss_does_not_fire_and_its_plateau_does(seed):
    trace = falling(torch.Generator().manual_seed(seed), n=240)
    flat = [trace[-1]] * 300
    assert 240 < fired_at(trace + flat) <= 540


def test_a_rising_loss_is_no_plateau():
    assert fired_at([1.0 * 1.01**t for t in range(600)]) is None


def test_unstable_gradients_forbid_the_switch():
    restless = [10.0 if (t // 20) % 2 else 0.1 for t in range(600)]
    assert fired_at([2.0] * 600, restless) is None
    assert fired_at([2.0] * 600, restless, delta_2=100.0) is not None


@pytest.mark.parametrize("factor", [10.0, 1000.0, 1e30, 0.1, 0.0, math.inf, math.nan])
@pytest.mark.parametrize("which", ["loss", "grad_norm"])
def test_a_lone_spike_never_triggers_the_switch(factor, which):
    # 1,008 traces over the parameters, none of which fires by itself (see above); every other one has its
    # spike just before a look, where it does most.
    for seed in range(72):
        rng = torch.Generator().manual_seed(seed)
        losses, grads = falling(rng, n=240), (1 + 0.1 * torch.randn(240, generator=rng)).tolist()
        at = 19 + 20 * (seed % 11) if seed % 2 else int(torch.randint(240, (1,), generator=rng))
        spoiled = losses if which == "loss" else grads
        spoiled[at] *= factor
        assert fired_at(losses, grads) is None, (seed, at)


def test_a_lone_spike_on_the_first_step_does_not_blind_the_criterion():
    assert fired_at([1e6] + [2.0] * 2000) is not None


def test_a_step_that_is_not_finite_changes_nothing():
    rng = torch.Generator().manual_seed(0)
    trace = falling(rng, n=100)
    clean, spoiled = SCP(), SCP()
    for x in trace:
        clean.observe(signals(x))
    for i, x in enumerate(trace):
        if i % 10 == 3:
            spoiled.observe(signals(math.nan))
            spoiled.observe(signals(x, math.inf))
        spoiled.observe(signals(x))
    assert torch.equal(clean._state[:3], spoiled._state[:3])


def test_skipped_steps_alone_are_no_plateau():
    assert fired_at([2.0] * 40 + [math.nan] * 1000) is None


def test_no_switch_before_min_steps_and_none_after_max_steps():
    assert fired_at([2.0] * 400, min_steps=200) == 280  # hits at 200, 220, .., 280
    rng = torch.Generator().manual_seed(0)
    assert fired_at(falling(rng), max_steps=200) == 200


def test_sequential_mode_waits_for_the_plateau_and_then_for_the_gradients():
    restless_then_calm = [10.0 if (t // 20) % 2 else 0.1 for t in range(200)] + [1.0] * 600
    joint = fired_at([2.0] * 800, restless_then_calm, beta=0.5)
    sequential = fired_at([2.0] * 800, restless_then_calm, beta=0.5, mode="sequential")
    assert joint == sequential == 320  # here the plateau has long held
    assert fired_at([2.0] * 800, mode="sequential") == 220  # five looks for A, five more for B


def test_decaying_reset_forgives_a_miss_that_hard_reset_does_not():
    one_miss = [2.0] * 85 + [2.3] * 400
    hard, decay = (fired_at(one_miss, reset=r, beta=0.0) for r in ("hard", "decay"))
    assert decay < hard


def test_absolute_change_means_what_it_says():
    slowly = [2.0 - 0.001 * t for t in range(400)]  # about 0.02 a look
    assert fired_at(slowly, change="absolute", delta_1=0.05) is not None
    assert fired_at(slowly, change="absolute", delta_1=0.01) is None


@pytest.mark.parametrize("seed", range(20))
def test_more_patience_never_fires_earlier(seed):
    rng = torch.Generator().manual_seed(seed)
    trace = falling(rng, per_look=0.03)
    at = [fired_at(trace, patience=p) or math.inf for p in (1, 2, 3, 5, 8)]
    assert at == sorted(at)


@pytest.mark.parametrize("cut", [0, 1, 19, 20, 21, 59, 100, 119])
@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_state_travels_through_json_exactly(cut, mode):
    rng = torch.Generator().manual_seed(1)
    trace = falling(rng, n=100) + [0.7] * 300
    whole = run(trace, mode=mode)
    first, second = SCP(SCPConfig(mode=mode)), SCP(SCPConfig(mode=mode))
    looks = [look for x in trace[:cut] if (look := first.observe(signals(x)))]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    looks += [look for x in trace[cut:] if (look := second.observe(signals(x)))]
    assert looks == whole


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("delta_1", 0.0), ("delta_2", math.nan), ("patience", 0), ("interval", 1.5), ("beta", 1.0),
        ("mode", "both"), ("change", "log"), ("reset", "soft"), ("min_steps", -1), ("max_steps", 0),
    ],
)  # fmt: skip
def test_bad_options_are_named(name, value):
    with pytest.raises(ShiftInputError, match=f"'{name}'"):
        SCPConfig(**{name: value})
