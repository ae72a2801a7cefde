"""SCP fires on a plateau with stable gradients, and on nothing else. Traces are synthetic and seeded."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_runs import processes

from shift.schedules.scp import SCP, SCPConfig, Signals
from shift_kernels import ShiftInputError


def each_step(losses, grads=None):
    grads = [1.0] * len(losses) if grads is None else grads
    trace = torch.tensor(np.array([losses, grads]), dtype=torch.float32)
    return [Signals(loss, grad_norm) for loss, grad_norm in zip(*map(torch.unbind, trace), strict=True)]


def run(losses, grads=None, **options):
    """The looks of a trace."""
    scp = SCP(SCPConfig(**options))
    return [look for signals in each_step(losses, grads) if (look := scp.observe(signals))]


def fired_at(losses, grads=None, **options):
    return next((look.step for look in run(losses, grads, **options) if look.fired), None)


def falling(rng, n, per_look, noise=0.03):
    """A loss that falls by the share ``per_look`` every 20 steps, times noise."""
    return 2.0 * (1 - per_look) ** (np.arange(n) / 20) * (1 + noise * rng.standard_normal(n))


def any_trace(rng, n=300):
    """Losses that fall at first and then hardly do, and noisy gradient norms: about half fire."""
    knee = rng.integers(n)
    losses = np.concatenate([falling(rng, knee, 0.1), 2 * 0.9 ** (knee / 20) * falling(rng, n - knee, 0.03)])
    return losses, 1 + 0.2 * rng.standard_normal(n) ** 2


# ------------------------------------------------------------------------------------------- what fires


def test_a_plateau_fires_after_patience_looks():
    # The first look has nothing to compare with, then five hits: looks at 40, 60, 80, 100, 120.
    assert fired_at([2.0] * 200) == 120
    assert fired_at([2.0] * 200, patience=2, interval=10) == 30


@pytest.mark.parametrize("seed", range(20))
def test_a_falling_loss_does_not_fire_and_its_plateau_does(seed):
    trace = falling(np.random.default_rng(seed), 240, 0.08)
    assert 240 < fired_at([*trace, *[trace[-1]] * 300]) <= 540


@pytest.mark.parametrize("seed", range(8))
def test_a_replay_fires_where_the_criterion_that_watched_did(seed):
    losses, grads = any_trace(np.random.default_rng(seed))
    losses[[17, 118]] = [math.nan, math.inf]
    losses, grads = losses.astype(np.float32).tolist(), grads.astype(np.float32).tolist()
    for options in ({}, {"patience": 2, "beta": 0.9}, {"max_steps": 240}):
        watched = enumerate(each_step(losses, grads), start=1)
        scp = SCP(SCPConfig(**options))
        fired = (step for step, signals in watched if (look := scp.observe(signals)) and look.fired)
        recorded = ([x if math.isfinite(x) else None for x in found] for found in (losses, grads))
        assert SCP.replay(SCPConfig(**options), *recorded) == next(fired, None)


def test_a_rising_loss_is_no_plateau():
    assert fired_at(1.01 ** np.arange(600)) is None


def test_unstable_gradients_forbid_the_switch():
    restless = [10.0 if (t // 20) % 2 else 0.1 for t in range(600)]
    assert fired_at([2.0] * 600, restless) is None
    assert fired_at([2.0] * 600, restless, delta_2=100.0) is not None


# ------------------------------------------------------------------------------------------ lone spikes


@pytest.mark.parametrize("hundred", range(10))
def test_a_lone_spike_never_triggers_the_switch(hundred):
    # With patience 1 the first hit fires, so this holds for every look. Every other spike comes right before
    # a look, where it does most.
    for seed in range(100 * hundred, 100 * hundred + 100):
        rng = np.random.default_rng(seed)
        losses, grads = falling(rng, 160, rng.uniform(0.1, 0.2)), 1 + 0.1 * rng.standard_normal(160)
        assert fired_at(losses, grads, patience=1) is None
        at = 20 * rng.integers(1, 8) - 1 if seed % 2 else rng.integers(160)
        spoiled = losses if rng.random() < 0.7 else grads
        spoiled[at] *= math.exp(rng.uniform(0.5, 10) * rng.choice([-1, 1]))
        assert fired_at(losses, grads, patience=1) is None, (seed, at)


@pytest.mark.parametrize("which", [0, 1])
def test_a_spike_counts_like_the_largest_of_its_neighbours_whatever_its_size(which):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        trace = any_trace(rng)
        at = rng.integers(2, 298)
        neighbours = np.delete(trace[which][at - 2 : at + 3], 2)
        trace[which][at] = neighbours.max()
        ordinary = run(*trace)
        for spike in (10 * neighbours.max(), 1e30):
            trace[which][at] = spike
            assert run(*trace) == ordinary
        trace[which][at] = neighbours.min()
        ordinary = run(*trace)
        for spike in (0.0, -1e30):
            trace[which][at] = spike
            assert run(*trace) == ordinary


def test_a_spike_on_the_first_step_does_not_delay_the_switch():
    assert fired_at([1e30] + [2.0] * 200) == fired_at([2.0] * 201)


# ------------------------------------------------------------------------------- steps that are not finite


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_steps_that_are_not_finite_change_nothing(mode):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        trace = np.array(any_trace(rng))
        skipped = trace[:, rng.integers(300, size=rng.integers(1, 60))]
        skipped[seed % 2] = rng.choice([math.nan, math.inf, -math.inf], skipped.shape[1])
        with_skipped = np.insert(trace, np.sort(rng.integers(301, size=skipped.shape[1])), skipped, axis=1)
        assert run(*with_skipped, mode=mode) == run(*trace, mode=mode)


def test_the_look_comes_with_the_step_that_completes_it():
    scp = SCP()
    trace = each_step([2.0] * 30 + [math.nan] * 7 + [2.0] * 20)
    looked = [t for t, signals in enumerate(trace, start=1) if scp.observe(signals)]
    assert looked == [40 + 7]


def test_skipped_steps_alone_are_no_plateau():
    assert fired_at([2.0] * 40 + [math.nan] * 1000) is None


# ---------------------------------------------------------------------------------------------- options


def test_no_switch_before_min_steps_and_none_after_max_steps():
    assert fired_at([2.0] * 400, min_steps=200) == 280  # hits at 200, 220, .., 280
    assert fired_at(falling(np.random.default_rng(0), 400, 0.1), max_steps=190) == 200


def test_max_steps_waits_while_little_of_the_loss_is_left():
    halved = [2.0] * 20 + [1.0 * 0.9 ** (i / 20) for i in range(380)]  # never still
    assert fired_at(halved, max_steps=190, enough=0.15) == 200
    assert fired_at(halved, max_steps=190, enough=0.3) is None


@pytest.mark.parametrize("reset", ["hard", "decay"])
@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_more_patience_never_fires_earlier(mode, reset):
    for seed in range(30):
        trace = any_trace(np.random.default_rng(seed), 400)
        at = [fired_at(*trace, patience=p, mode=mode, reset=reset) or math.inf for p in (1, 2, 3, 5)]
        assert at == sorted(at)


def test_sequential_mode_waits_for_the_plateau_and_then_for_the_gradients():
    assert fired_at([2.0] * 800, mode="sequential") == 220  # five looks for A, five more for B
    restless_then_calm = [10.0 if (t // 20) % 2 else 0.1 for t in range(200)] + [1.0] * 600
    assert fired_at([2.0] * 800, restless_then_calm, beta=0.5, mode="sequential") == 320


def test_decaying_reset_forgives_a_miss_that_hard_reset_does_not():
    one_miss = [2.0] * 85 + [2.3] * 400
    hard, decay = (fired_at(one_miss, reset=r, beta=0.0) for r in ("hard", "decay"))
    assert decay < hard


def test_relative_changes_do_not_depend_on_the_units():
    traces = [any_trace(np.random.default_rng(seed)) for seed in range(10)]
    at = [fired_at(*trace) for trace in traces]
    assert any(at)
    assert [fired_at(1000 * losses, 1000 * grads) for losses, grads in traces] == at


def test_absolute_change_means_what_it_says():
    slowly = 2.0 - 0.001 * np.arange(400)  # about 0.02 a look
    assert fired_at(slowly, change="absolute", delta_1=0.05) is not None
    assert fired_at(slowly, change="absolute", delta_1=0.01) is None


def test_progress_tells_the_plateau_before_learning_from_the_one_after():
    rng = np.random.default_rng(0)
    loss = np.concatenate([np.full(300, 2.0), np.linspace(2.0, 1.0, 200), np.full(500, 1.0)])
    loss += 0.01 * rng.standard_normal(1000)
    assert fired_at(loss) < 300
    assert fired_at(loss, change="progress") > 500
    assert fired_at(loss + 2 * (np.arange(1000) > 600), change="progress") is None  # all in all no progress


def test_progress_does_not_depend_on_the_scale_or_offset_of_the_loss():
    trace = falling(np.random.default_rng(0), 400, 0.15, noise=0.0)
    at = fired_at(trace, change="progress")
    assert at is not None
    assert fired_at(1000 * trace - 5000, change="progress") == at


@pytest.mark.parametrize("level", [0.0, -2.0])
def test_a_loss_of_zero_or_below_keeps_all_numbers_finite(level):
    for change in ("relative", "absolute", "progress"):
        for look in run([level] * 100 + [level - 1] * 100, [0.0] * 100 + [1.0] * 100, change=change):
            assert math.isfinite(look.improvement)
            assert math.isfinite(look.grad_change)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("delta_1", 0.0), ("delta_1", True), ("delta_2", math.nan), ("delta_2", "0.2"), ("patience", 0),
        ("interval", 1.5), ("interval", 0), ("beta", 1.0), ("beta", -0.1), ("mode", "both"),
        ("change", "log"), ("reset", "soft"), ("min_steps", -1), ("max_steps", 0), ("max_steps", 1.0),
        ("enough", 1.0), ("enough", -0.1),
    ],
)  # fmt: skip
def test_bad_options_are_named(name, value):
    with pytest.raises(ShiftInputError, match=f"'{name}'"):
        SCPConfig(**{name: value})


# ------------------------------------------------------------------------------- state, device and ranks


def reloaded(scp):
    other = SCP(scp.config)
    other.load_state_dict(json.loads(json.dumps(scp.state_dict(), allow_nan=False)))
    return other


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_a_reload_at_any_step_changes_no_decision(mode):
    rng = np.random.default_rng(1)
    losses, grads = any_trace(rng, 400)
    losses[rng.integers(400, size=20)] = math.nan
    trace = each_step(losses, grads)
    undisturbed = SCP(SCPConfig(mode=mode))
    looks = [undisturbed.observe(signals) for signals in trace]
    scp = SCP(SCPConfig(mode=mode))
    for t, signals in enumerate(trace):
        once = reloaded(scp)
        assert [once.observe(s) for s in trace[t : t + 45]] == looks[t : t + 45]
        scp = reloaded(scp)  # in the end for the 400th time
        scp.observe(signals)
    assert scp.state_dict() == undisturbed.state_dict()


def test_loading_a_state_leaves_it_as_it_was():
    scp = SCP()
    for signals in each_step([2.0] * 50):
        scp.observe(signals)
    state = scp.state_dict()
    before = json.dumps(state)
    other = SCP()
    other.load_state_dict(state)
    for signals in each_step([1.0] * 50):
        other.observe(signals)
    assert json.dumps(state) == before


def test_nothing_waits_for_the_device_between_looks():
    step = Signals(torch.empty((), device="meta"), torch.empty((), device="meta"))  # has no value to read
    scp = SCP()
    for _ in range(19):
        assert scp.observe(step) is None
    with pytest.raises(NotImplementedError):
        scp.observe(step)


def test_nothing_keeps_the_graph_of_the_loss_alive():
    scp = SCP()
    scp.observe(Signals(torch.ones((), requires_grad=True) * 2, torch.ones(())))
    assert not scp._pending[0].requires_grad


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: SCP().observe(Signals(1.0, 1.0)), "loss"),
        (lambda: SCP().observe(Signals(torch.ones(()), torch.ones(2))), "grad_norm"),
        (lambda: SCP({"patience": 3}), "config"),
        (lambda: SCP().load_state_dict({}), "state"),
        (lambda: SCP.replay(SCPConfig(interval=3), [1.0] * 400, [1.0] * 399), "grad_norms"),
    ],
)
def test_bad_input_is_named(call, argument):
    with pytest.raises(ShiftInputError, match=f"'{argument}'"):
        call()


def as_rank(rank, file, answers):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    losses, grads = any_trace(np.random.default_rng(rank))
    if rank == 1:
        losses[50] = math.nan  # on this rank alone, and yet skipped on both
    answers.put((rank, run(losses, grads)))
    dist.destroy_process_group()


def test_ranks_with_different_losses_decide_alike_and_on_their_mean(tmp_path):
    context = processes()
    answers = context.Queue()
    ranks = [context.Process(target=as_rank, args=(rank, tmp_path / "store", answers)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    looks = dict(answers.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
    assert looks[0] == looks[1]
    mean = np.mean([any_trace(np.random.default_rng(rank)) for rank in (0, 1)], axis=0)
    alone = run(*np.delete(mean, 50, axis=1))
    assert [look.fired for look in looks[0]] == [look.fired for look in alone]
    assert [look.loss_ema for look in looks[0]] == pytest.approx([look.loss_ema for look in alone], rel=1e-6)
