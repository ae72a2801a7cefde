"""Each schedule answers with the loops it promises, at every step, before and after a resume."""

import json
import math
from operator import attrgetter

import pytest
import torch
from tiny_runs import tiny

from shift.build import build_schedule
from shift.comparison.arms import FAMILIES, colours, make_arm
from shift.comparison.results import seed_facts
from shift.config import ScheduleConfig, TrainConfig
from shift.flops import forward_flops, train_step_flops
from shift.report.document import Key
from shift.run.record import read_run
from shift.run.trainer import Trainer
from shift.schedules import SCHEDULES, Signals, make_schedule
from shift.schedules.ramps import Ramp
from shift.schedules.registry import switch_step
from shift_kernels import ShiftInputError


def plateau_after(step, flat):
    loss = 2.0 * 0.99 ** min(step, flat)
    return Signals(torch.tensor(loss), torch.tensor(1.0))


def decisions(schedule, steps, start=0, flat=100):
    return [schedule.step(s, plateau_after(s, flat) if s else None) for s in range(start, steps)]


def loops(schedule, steps, start=0, flat=100):
    return [decision.n_loops for decision in decisions(schedule, steps, start, flat)]


def make(kind, max_loops=4, total_steps=800, **options):
    return make_schedule(kind, max_loops=max_loops, total_steps=total_steps, **options)


def test_constant_is_looped_or_single():
    assert set(loops(make("constant"), 50)) == {4}
    assert set(loops(make("constant", n_loops=1), 50)) == {1}


@pytest.mark.parametrize(("at", "step"), [(0.25, 200), (300, 300), (0, 0)])
def test_fixed_switches_at_its_step(at, step):
    assert loops(make("fixed", at=at), 800) == [1] * step + [4] * (800 - step)


@pytest.mark.parametrize(
    ("options", "first", "switch"), [({}, 2, 640), ({"first": 3, "at": 0.5}, 3, 400), ({"at": 10}, 2, 10)]
)
def test_growth_is_late_and_from_half_of_the_loops(options, first, switch):
    assert loops(make("grow", **options), 800) == [first] * switch + [4] * (800 - switch)


def test_the_backward_pass_deepens_over_its_share_of_the_steps():
    got = [d.n_grad_loops for d in decisions(make("backward_warmup", max_loops=8, last=5), 800)]
    assert [got.count(k) for k in (2, 3, 4, 5)] == [54, 53, 53, 640]
    assert got == sorted(got)
    assert set(loops(make("backward_warmup"), 20)) == {4}
    deep = [d.n_grad_loops for d in decisions(make("backward_warmup", first=1, fraction=1.0), 800)]
    assert [deep.count(k) for k in (1, 2, 3)] == [267, 267, 266]


def test_a_run_back_propagates_as_deep_as_the_schedule_and_the_config_say(tmp_path):
    schedule = ScheduleConfig("backward_warmup", {"first": 1, "fraction": 0.5})
    for name, limit, depths in (("free", None, [1, 1, 1, 2, 2, 2, 3]), ("limited", 2, [1, 1, 1, 2, 2, 2, 2])):
        trainer = Trainer(tiny(schedule=schedule, n_grad_loops=limit, steps=12), tmp_path / name)
        given = []
        trainer.model.block.register_forward_pre_hook(
            lambda _block, _args, kwargs, given=given: (
                given.append(kwargs["n_grad_loops"]) if torch.is_grad_enabled() else None
            ),
            with_kwargs=True,
        )
        trainer.fit()
        train = read_run(tmp_path / name).of_kind("train")
        assert given[:7] == [row["n_grad_loops"] for row in train[:7]] == depths
        costs = [train_step_flops(trainer.model, 8, 6, 3, k) for k in given]
        assert train[-1]["flops"] == sum(costs)


def test_shift_switches_once_when_the_criterion_fires():
    got = decisions(make("shift"), 800)
    switch = [decision.n_loops for decision in got].index(4)
    assert [decision.n_loops for decision in got] == [1] * switch + [4] * (800 - switch)
    assert [step for step, decision in enumerate(got) if decision.switched] == [switch]
    looks = [look for decision in got for look in decision.looks]
    assert [look.step for look in looks if look.fired] == [switch]
    assert looks[-1].step == switch  # nothing is looked at afterwards


def test_shift_that_never_sees_a_plateau_stays_single():
    assert set(loops(make("shift"), 800, flat=800)) == {1}


def test_a_look_names_the_step_of_the_run_though_skipped_steps_do_not_count():
    schedule = make("shift")
    skipped = Signals(torch.tensor(math.nan), torch.tensor(1.0))
    told = [skipped if 50 < step <= 57 else plateau_after(step, 100) for step in range(1, 101)]
    got = [schedule.step(step, signals) for step, signals in enumerate([None, *told])]
    assert [look.step for decision in got for look in decision.looks] == [40, 67, 87]


def test_ladder_climbs_rung_by_rung_with_a_fresh_criterion():
    got = loops(make("ladder", max_loops=6), 800)
    assert sorted(set(got)) == [1, 2, 4, 6]
    assert got == sorted(got)
    times = [got.count(r) for r in (2, 4)]
    assert min(times) >= 120  # six looks of 20 steps on each rung: the first has nothing to compare with
    assert set(loops(make("ladder", max_loops=6, rungs=[2, 6]), 800)) == {2, 6}


def test_a_rung_of_the_ladder_is_left_at_its_share_of_the_steps_at_the_latest():
    never = {"delta_1": 1e-9, "delta_2": 1e-9}
    got = loops(make("ladder", max_loops=4, shares=[0.1, 0.3], **never), 800)
    assert [got.count(n) for n in (1, 2, 4)] == [80, 240, 480]
    # A share says at most: it counts before min_steps.
    got = loops(make("ladder", max_loops=4, shares=[0.5, 0.05], min_steps=60), 800)
    assert got.count(2) == 40


def test_climb_leaves_each_rung_in_its_time_and_not_before():
    standing_still = loops(make("climb", max_loops=8), 800, flat=1)
    assert [standing_still.count(n) for n in (1, 4, 8)] == [40, 360, 400]
    learning_a_little = loops(make("climb", max_loops=8), 800, flat=20)
    assert learning_a_little == standing_still
    assert [loops(make("climb", max_loops=3), 800, flat=1).count(n) for n in (1, 3)] == [40, 760]
    not_a_multiple_of_20 = loops(make("climb", max_loops=2, total_steps=900), 900, flat=1)
    assert [not_a_multiple_of_20.count(n) for n in (1, 2)] == [45, 855]
    no_longer_than_a_look = loops(make("climb", max_loops=2, total_steps=400), 400, flat=1)
    assert [no_longer_than_a_look.count(n) for n in (1, 2)] == [20, 380]
    assert set(loops(make("climb", max_loops=1), 800, flat=1)) == {1}


def test_climb_stays_where_most_of_the_loss_is_gone_until_it_stands_still():
    learning = loops(make("climb", shares=[0.2, 0.2]), 800, flat=2000)
    assert set(learning) == {1}
    till_400 = loops(make("climb", shares=[0.2, 0.2]), 800, flat=400)
    assert 400 + 5 * 20 < till_400.count(1) < 700  # SCP sees five quiet looks, and its average lags
    assert loops(make("climb", shares=[0.2, 0.2], enough=0.1), 800, flat=2000).count(1) == 160


def test_linear_ramp_costs_what_the_docs_say():
    got = loops(make("linear"), 800)
    assert got == sorted(got)
    assert got[400:] == [4] * 400
    assert got[399] == 3
    assert sum(got) == 134 * 1 + 133 * 2 + 133 * 3 + 400 * 4 == 2399


def test_square_root_ramp_loops_earlier_than_the_linear_one():
    linear, root = loops(make("linear"), 800), loops(make("sqrt"), 800)
    assert all(a <= b for a, b in zip(linear, root, strict=True))
    assert sum(root) > sum(linear)


def test_staged_ramp_doubles():
    got = loops(make("staged", max_loops=8, fraction=0.75), 800)
    assert got == [1] * 200 + [2] * 200 + [4] * 200 + [8] * 200
    assert sorted(set(loops(make("staged", max_loops=6), 800))) == [1, 2, 4, 6]


@pytest.mark.parametrize("distribution", ["uniform", "poisson_lognormal", "two_point", "inverse_flops"])
def test_random_draws_depend_on_seed_and_step_alone(distribution):
    a, b = (make("random", seed=1, distribution=distribution) for _ in range(2))
    forward = loops(a, 300)
    assert forward == [b.step(s, None).n_loops for s in reversed(range(300))][::-1]
    assert forward != loops(make("random", seed=2, distribution=distribution), 300)
    assert set(forward) == ({1, 4} if distribution == "two_point" else {1, 2, 3, 4})


def test_poisson_lognormal_has_the_mean_it_is_given():
    got = loops(make("random", max_loops=100, distribution="poisson_lognormal", mean=5.0), 4000)
    assert sum(got) / 4000 == pytest.approx(5.0, abs=0.3)  # five standard errors


def test_every_depth_gets_the_same_compute():
    got = loops(make("random", distribution="inverse_flops", rest=0.5), 8000)
    compute = [got.count(t) * (t + 0.5) / 8000 for t in (1, 2, 3, 4)]
    assert compute == pytest.approx([sum(compute) / 4] * 4, rel=0.12)  # three standard errors


def test_a_run_draws_by_the_flops_of_its_own_model(tmp_path):
    schedule = ScheduleConfig("random", {"distribution": "inverse_flops"})
    trainer = Trainer(tiny(schedule=schedule), tmp_path)
    costs = [forward_flops(trainer.model, 1, 6, n_loops) for n_loops in (1, 2, 3)]
    assert [(n + trainer.schedule.rest) * (costs[1] - costs[0]) for n in (1, 2, 3)] == pytest.approx(costs)
    assert trainer.schedule.rest > 0
    given = ScheduleConfig("random", {"distribution": "inverse_flops", "rest": 0.25})
    assert build_schedule(tiny(schedule=given)).rest == 0.25


def test_two_points_have_the_mean_they_are_given():
    got = loops(make("random", distribution="two_point", mean=2.2), 4000)
    assert sum(got) / 4000 == pytest.approx(2.2, abs=0.12)  # five standard errors


def test_draws_may_end_and_t_follow():
    arm = make_arm("inverse_flops:0.25", TrainConfig())
    assert arm.config.schedule.options == {"distribution": "inverse_flops", "until": 0.25}
    got = loops(make("random", distribution="inverse_flops", until=0.25), 800)
    assert set(got[:200]) == {1, 2, 3, 4}
    assert set(got[200:]) == {4}


def test_what_drawn_loops_have_trained_is_evaluated_with_all_of_them(tmp_path):
    schedule = ScheduleConfig("random", {"distribution": "two_point", "mean": 1.5})
    Trainer(tiny(steps=12, eval_every=1, schedule=schedule), tmp_path).fit()
    run = read_run(tmp_path)
    assert {row["n_loops"] for row in run.of_kind("eval")} == {3}
    assert {row["n_loops"] for row in run.of_kind("train")} == {1, 3}


def test_random_ramp_starts_with_one_loop():
    got = loops(make("random", ramp=0.5), 800)
    assert set(got[:20]) == {1}
    assert max(got[:120]) < 4


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("cut", [0, 1, 119, 120, 121, 333])
def test_a_resumed_schedule_goes_on_exactly(kind, cut):
    first, second = make(kind), make(kind)
    whole = loops(make(kind), 400)
    got = loops(first, cut)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert got + loops(second, 400, start=cut) == whole


# Options under which the criterion fires soon, and a schedule changes its loops more than once.
SWITCHING = {
    "shift": {"patience": 1},
    "ladder": {"patience": 1, "rungs": [2, 3, 4]},
    "climb": {"shares": [0.1, 0.2]},
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_switch_step_is_the_last_switch_of_the_schedule(kind):
    got = decisions(make(kind, total_steps=400, **SWITCHING.get(kind, {})), 400, flat=1)
    n_loops = [decision.n_loops for decision in got]
    changes = [step for step in range(1, 400) if n_loops[step] != n_loops[step - 1]]
    if SCHEDULES[kind].decided_by == "chance":
        changes = []
    assert [step for step, decision in enumerate(got) if decision.switched] == changes
    assert switch_step(kind, n_loops) == (changes[-1] if changes else None)
    assert bool(changes) == (SCHEDULES[kind].decided_by in ("time", "criterion"))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_run_records_the_switch_step_of_its_loops(kind, tmp_path):
    # Looks every 2 steps, of which all are hits: the loops change within 24 steps wherever they can.
    scp = {"interval": 2, "patience": 1, "delta_1": 1e3, "delta_2": 1e3}
    options = scp if SCHEDULES[kind].decided_by == "criterion" else {}
    trainer = Trainer(tiny(steps=24, eval_every=0, schedule=ScheduleConfig(kind, options)), tmp_path)
    recorded = trainer.fit()["switch_step"]
    run = read_run(tmp_path)
    assert recorded == seed_facts(run, 0, None)["switch_step"]
    assert (recorded is None) == (SCHEDULES[kind].decided_by in ("nothing", "chance"))
    assert bool(run.of_kind("look")) == (SCHEDULES[kind].decided_by == "criterion")
    assert (trainer.schedule.scp is None) == (SCHEDULES[kind].decided_by != "criterion")


def test_a_ladder_that_starts_with_two_loops_has_a_switch_step():
    got = loops(make("ladder", rungs=[2, 4]), 800)
    assert got.index(4) == switch_step("ladder", got)


def test_no_two_arms_share_a_name_a_label_or_a_colour():
    for facts in (attrgetter("name"), attrgetter("label"), attrgetter("colour")):
        assert len({facts(family) for family in FAMILIES.values()}) == len(FAMILIES)
    declared = [family.name for schedule in SCHEDULES.values() for family in schedule.families]
    assert len(declared) == len(FAMILIES) - 2  # matched and again are a comparison's own


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "matched"])
def test_every_arm_that_a_schedule_declares_can_be_built_and_drawn(name):
    arm = make_arm(name, TrainConfig())
    assert build_schedule(arm.config).step(0, None).n_loops >= 1
    assert Key(arm.label, colours([name])[name])


@pytest.mark.parametrize("kind", SCHEDULES)
def test_one_loop_is_a_schedule_too(kind):
    assert set(loops(make(kind, max_loops=1), 50)) == {1}


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("scp", {}, "kind"),
        ("constant", {"n_loops": 0}, "n_loops"),
        ("constant", {"n_loops": 5}, "n_loops"),
        ("fixed", {"at": 1.5}, "at"),
        ("fixed", {"at": -1}, "at"),
        ("shift", {"patience": 0}, "patience"),
        ("shift", {"patients": 3}, "options"),
        ("ladder", {"rungs": [4, 2]}, "rungs"),
        ("ladder", {"rungs": [1, 2]}, "rungs"),
        ("linear", {"fraction": 0.0}, "fraction"),
        ("random", {"distribution": "normal"}, "distribution"),
        ("random", {"distribution": "poisson_lognormal", "mean": 0.5}, "mean"),
        ("random", {"ramp": 2.0}, "ramp"),
        ("random", {"rest": -1}, "rest"),
        ("random", {"until": 0}, "until"),
        ("grow", {"first": 5}, "first"),
        ("grow", {"at": 1.0}, "at"),
        ("backward_warmup", {"first": 0}, "first"),
        ("backward_warmup", {"last": 0}, "last"),
        ("backward_warmup", {"fraction": 0}, "fraction"),
        ("random", {"seed": -1}, "seed"),
        ("ladder", {"rungs": 4}, "rungs"),
        ("ladder", {"rungs": []}, "rungs"),
        ("climb", {"shares": [0.1]}, "shares"),
        ("climb", {"shares": [0.1, 0]}, "shares"),
        ("climb", {"enough": 1.0}, "enough"),
        ("climb", {"max_loops": 0}, "max_loops"),
        ("climb", {"middle": "left"}, "middle"),
        ("climb", {"keep": 1.5}, "keep"),
        ("climb", {"min_steps": 5}, "min_steps"),
        ("climb", {"max_steps": 5}, "max_steps"),
        ("ladder", {"shares": [0.1, 0.1], "max_steps": 5}, "max_steps"),
        ("shift", {"keep": -0.1}, "keep"),
        ("ladder", {"shares": [0.1]}, "shares"),
        ("ladder", {"shares": [0.1, 0.0]}, "shares"),
        ("constant", {"max_loops": 0}, "max_loops"),
        ("constant", {"total_steps": 1.5}, "total_steps"),
        ("shift", {"rungs": [1, 4]}, "options"),
    ],
)
def test_bad_options_are_named(kind, options, named):
    with pytest.raises(ShiftInputError, match=f"'{named}'"):
        make(kind, **options)


def test_a_misspelt_kind_is_told_the_nearest_one():
    with pytest.raises(ShiftInputError, match=r"'kind' = 'shft'.*Perhaps 'shift' is meant"):
        make("shft")


@pytest.mark.parametrize(
    ("kind", "option", "words"),
    [
        ("fixed", "att", "the options of 'fixed': at.*Perhaps 'at'"),
        ("shift", "patiense", "delta_1, delta_2, patience.*Perhaps 'patience'"),
        ("constant", "zzz", "the options of 'constant': n_loops"),
    ],
)
def test_a_misspelt_option_is_told_beside_those_that_there_are(kind, option, words):
    with pytest.raises(ShiftInputError, match=words):
        make(kind, **{option: 1})


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("shift", {}),
        ("fixed", {"rung": 1}),
        ("shift", {"rung": 2, "switch_step": 5, "criterion": {"pending": []}}),  # of a ladder with more rungs
        ("shift", {"rung": 0, "switch_step": None, "criterion": {}}),
    ],
)
def test_a_state_of_another_schedule_is_refused(kind, state):
    with pytest.raises(ShiftInputError, match="'state'"):
        make(kind).load_state_dict(state)


def test_an_unknown_ramp_is_no_silent_square_root():
    with pytest.raises(ShiftInputError, match="'shape'"):
        Ramp(4, 800, "cosine")
