"""The benchmarks of training time what they say: every part once, and loops that compute the same."""

import dataclasses

import pytest
from tiny_runs import tiny

from benchmarks.lm import throughput as lm
from benchmarks.training import profile, throughput
from shift.config import OptimiserConfig, ScheduleConfig, TaskConfig

CASE = throughput.Case("tiny", "tiny", steps=2, rounds=2, warm_up=2)
LOOPED = tiny(steps=8, eval_every=0, optimiser=OptimiserConfig(warmup=0), schedule=ScheduleConfig("constant"))
OWN_LOOPS = TaskConfig("parity", options={"max_length": 3})


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(profile, "WARM_UP", 2)
    monkeypatch.setattr(profile, "ROUNDS", 3)
    monkeypatch.setattr(profile, "STEPS", 2)


@pytest.mark.usefixtures("few_steps")
def test_every_part_of_a_step_takes_time():
    ms = profile.profile(tiny(steps=8, eval_every=0, checkpoint_every=0, log_every=1))
    assert set(ms) == set(profile.PARTS)
    assert all(len(rounds) == 3 and min(rounds) > 0 for rounds in ms.values())


@pytest.mark.usefixtures("few_steps")
def test_a_profile_changes_nothing_for_good():
    before = profile.native.run, profile.EagerLoopedBlock.backward
    profile.profile(tiny(steps=8))
    assert (profile.native.run, profile.EagerLoopedBlock.backward) == before


@pytest.fixture
def without_compiler(monkeypatch):
    """Compiling takes seconds."""
    monkeypatch.setattr(throughput, "RUNNERS", ("ours", "eager"))


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("task", [tiny().task, OWN_LOOPS], ids=lambda task: task.name)
@pytest.mark.parametrize("around", [0, 1])
def test_the_plain_loop_learns_as_ours(monkeypatch, task, around):
    model = dataclasses.replace(LOOPED.model, n_prelude=around, n_coda=around)
    config = dataclasses.replace(LOOPED, task=task, model=model)
    monkeypatch.setattr(throughput, "config_of", lambda case: config)
    row = throughput.measure(CASE, threads=1)  # raises if losses differ
    assert {len(rounds) for kind in ("clock_s", "cpu_s") for rounds in row[kind].values()} == {CASE.rounds}


def test_cases_of_language_models_are_those_of_their_titles():
    for case in lm.CASES:
        model = throughput.config_of(case).model
        assert f"d_model {model.d_model}," in case.title
        assert ("no loop" in case.title) == (model.n_loops == 1)


@pytest.mark.usefixtures("without_compiler")
def test_loops_that_do_not_compute_the_same_are_not_timed(monkeypatch):
    monkeypatch.setattr(throughput, "config_of", lambda case: LOOPED)
    other = dataclasses.replace(LOOPED, model=dataclasses.replace(LOOPED.model, n_loops=2))
    plain_loop = throughput.plain_loop
    monkeypatch.setattr(
        throughput,
        "plain_loop",
        lambda model, task, _config, compiled: plain_loop(model, task, other, compiled),
    )
    with pytest.raises(AssertionError, match="eager"):
        throughput.measure(CASE, threads=1)
