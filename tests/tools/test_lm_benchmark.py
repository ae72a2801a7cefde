"""The suite of language models: its arithmetic by hand, its declarations, and the whole in miniature."""

import dataclasses
import json
import math
import shutil

import pytest
from token_data import token_folder

from benchmarks.gpu import lm as gpu
from benchmarks.lm import run as lm
from benchmarks.lm.multiplier import Point, best_fixed, cost_at, interval, multiplier
from benchmarks.lm.suite import BEYOND, SUITES, Suite, arms_of, load_suite, run_config, step_flops
from benchmarks.lm.text import standard_library
from shift.build import build_model, build_schedule, build_task
from shift.flops import train_step_flops
from shift.run.trainer import Trainer
from shift_kernels import ShiftInputError


def points(*pairs):
    return [Point({"flops": cost, "wall": 2 * cost}, loss) for cost, loss in pairs]


REFERENCE = points((1.0, 4.0), (10.0, 3.0), (100.0, 2.5))


@pytest.mark.parametrize(
    ("loss", "cost"), [(3.5, 10**0.5), (3.0, 10.0), (2.75, 10**1.5), (2.5, 100.0), (4.0, 1.0)]
)
def test_costs_lie_on_straight_lines_in_the_logarithm(loss, cost):
    assert cost_at(loss, REFERENCE, "flops") == pytest.approx(cost)
    assert cost_at(loss, REFERENCE, "wall") == pytest.approx(2 * cost)


@pytest.mark.parametrize("loss", [4.1, 2.4, math.nan])
def test_nothing_is_extrapolated(loss):
    assert cost_at(loss, REFERENCE, "flops") is None


def test_a_multiplier_holds_every_seed_against_its_own_reference():
    reference = {10.0: {0: Point({"flops": 10.0}, 3.0), 1: Point({"flops": 10.0}, 3.2)}}
    reference |= {
        b: {s: Point({"flops": b}, p.loss + d) for s, p in reference[10.0].items()}
        for b, d in ((1.0, 1), (100.0, -1))
    }
    arm = {10.0: {0: Point({"flops": 10.0}, 2.5), 1: Point({"flops": 10.0}, 3.2)}}
    found = multiplier(arm, reference, 10.0, "flops")
    assert found["per_seed"] == {"0": pytest.approx(10**0.5), "1": pytest.approx(1.0)}
    assert found["mean"] == pytest.approx(10**0.25)
    low, high = found["ci95"]
    assert low == pytest.approx(1.0)
    assert high == pytest.approx(10**0.5)


def test_a_seed_beyond_the_reference_leaves_no_mean():
    reference = {b: {s: Point({"flops": b}, 5 - math.log10(b)) for s in (0, 1)} for b in (1.0, 10.0)}
    arm = {10.0: {0: Point({"flops": 10.0}, 4.5), 1: Point({"flops": 10.0}, 3.5)}}
    found = multiplier(arm, reference, 10.0, "flops")
    assert (found["mean"], found["ci95"], found["per_seed"]["1"]) == (None, None, None)


def test_an_interval_is_the_same_at_every_call_and_needs_two_seeds():
    assert interval([1.0, 1.2, 1.1]) == interval([1.0, 1.2, 1.1])
    assert interval([1.0]) is None


def test_the_reference_is_the_fixed_number_of_loops_of_the_least_loss():
    curves = {
        name: {1.0: {0: Point({}, loss)}, 2.0: {0: Point({}, other)}}
        for name, loss, other in (("looped:2", 3.0, 2.9), ("looped:4", 3.1, 2.7), ("shift", 1.0, 1.0))
    }
    assert best_fixed(curves, ("looped:2", "looped:4"), (1.0, 2.0)) == "looped:4"
    assert best_fixed(curves, ("looped:2", "looped:4"), (1.0,)) == "looped:2"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return token_folder(tmp_path_factory.mktemp("text"))


@pytest.fixture
def mini(shards):
    """quick, with runs of a few steps."""
    quick = load_suite("quick")
    task = {"name": "tokens", "options": {"seq_len": 16}}
    config = {**quick.config, "task": task, "batch_size": 2, "eval_samples": 8, "log_every": 2}
    config["model"] = {**quick.config["model"], "d_model": 16, "n_heads": 2, "d_ff": 16}
    each = step_flops(arms_of(dataclasses.replace(quick, config=config), shards)["looped:2"].config)
    return dataclasses.replace(
        quick,
        arms=("looped:2", "grow"),
        seeds=(0,),
        budgets=tuple(each * steps for steps in (4, 8, 16)),
        rates=(1.0,),
        config=config,
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in SUITES.glob("*.toml")))
def test_a_suite_builds_and_has_every_control(name, shards):
    suite = load_suite(name)
    arms = arms_of(suite, shards)
    assert {"single", "deep", "looped:2", "looped:3", "looped:4", "shift", "climb", "grow", "ramp"} <= set(
        arms
    )
    assert not set(suite.seeds) & set(suite.tuning_seeds)
    for arm in arms.values():
        build_schedule(arm.config)


def test_every_arm_spends_the_budget(mini, shards):
    arms = arms_of(dataclasses.replace(mini, arms=(*mini.arms, "looped:4", "deep", "ramp", "shift")), shards)
    budget = 400 * step_flops(arms["looped:4"].config)
    for name, arm in arms.items():
        config = run_config(arm, budget, step_flops(arm.config), 2.0, seed=3)
        assert config.optimiser.lr == 2 * arm.config.optimiser.lr
        task = build_task(config)
        model, schedule = build_model(config, task), build_schedule(config)
        if name != "shift":  # a criterion decides: it spends what it does
            spent = sum(
                train_step_flops(model, config.batch_size, task.max_seq_len, schedule.step(i, None).n_loops)
                for i in range(config.steps)
            )
            assert spent == pytest.approx(budget, rel=0.01), name


def test_deep_has_the_flops_of_looped_and_more_weights(mini, shards):
    arms = arms_of(dataclasses.replace(mini, arms=("looped:4", "deep")), shards)
    assert step_flops(arms["deep"].config) == step_flops(arms["looped:4"].config)
    sizes = {
        n: sum(p.numel() for p in build_model(a.config, build_task(a.config)).parameters())
        for n, a in arms.items()
    }
    assert sizes["deep"] > sizes["looped:4"]


def test_the_whole_in_miniature_resumes_and_reports(mini, shards, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    trained = []

    def train(runs):
        trained.extend(runs)
        for path, config in runs.items():
            Trainer(config, path, resume=True).fit()

    monkeypatch.setattr(lm, "WIDEST", (1.0, 1.0))
    report = lm.run(mini, shards, tmp_path, train, "the command")
    assert len(trained) == 2 + 3 + 5  # tuning; three budgets, and two more for a fixed number of loops
    trained.clear()
    shutil.rmtree(lost := next((tmp_path / "runs" / "grow").glob("*/seed-0")))
    lm.run(mini, shards, tmp_path, train, "the command")
    assert trained == [lost]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["multiplier"]) == set(mini.arms)
    at = summary["multiplier"]["grow"]
    assert list(at) == [f"{b:.4g}" for b in mini.budgets]
    assert all(set(kinds) == {"flops", "wall"} for kinds in at.values())
    own = summary["multiplier"][summary["about"]["reference"]]
    assert [kinds["flops"]["mean"] for kinds in own.values()] == pytest.approx([1.0, 1.0, 1.0])
    assert len(summary["rows"]) == 3 + 5
    assert set(summary["about"]["rates"]) == set(mini.arms)
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert "1 seed;" in report.read_text()
    assert "Made by `the command`" in report.read_text()


def test_calls_on_a_gpu_go_on_until_the_time_is_up_and_leave_no_checkpoint(
    mini, shards, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(lm, "WIDEST", (1.0, 1.0))
    monkeypatch.setattr(gpu, "load_suite", lambda _: mini)
    calls, real = iter(range(1, 100)), gpu.train_for_a_while
    monkeypatch.setattr(gpu, "train_for_a_while", lambda *run: next(calls) != 4 and real(*run))
    argv = ["--data", str(shards), "--out", str(tmp_path)]
    assert gpu.main(argv) == 75
    assert gpu.main(argv) == 0
    assert next(calls) == 1 + 10 + 1  # the fourth one twice
    assert not list(tmp_path.glob("**/checkpoints"))
    assert "python -m benchmarks.gpu.lm --data" in (tmp_path / "report.md").read_text()
    capsys.readouterr()
    assert gpu.main(["--data", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "as shift-data writes it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "applications", "flops", "steps"),
    [("looped:2", 4 + 2 * 2, 4.647766e17, 1370), ("grow", 4 + 2 * (0.75 * 2 + 0.25 * 4), 5.453049e17, 1488)],
)
def test_a_step_of_d6_costs_what_its_source_says(name, applications, flops, steps, shards):
    """FLOPs and steps are published; of attention's square they count half, since it is causal."""
    suite = load_suite(str(gpu.D6))
    short = {"name": "tokens", "options": {"seq_len": 256}}  # as these shards are
    suite = dataclasses.replace(suite, config={**suite.config, "task": short, "batch_size": 256 * 8})
    config = arms_of(suite, shards)[name].config
    n_tokens, d_model = 256 * 2048, 768
    read_out = 6 * n_tokens * d_model * (50257 - build_task(config).vocab_size)
    attention = 6 * n_tokens * d_model * applications * (2048 - 2 * 256)
    assert step_flops(config) + read_out + attention == pytest.approx(flops / steps, rel=1e-3)


@pytest.mark.parametrize(
    ("best", "tried", "next_ones"),
    [
        (1.0, {0.5, 1.0, 2.0}, []),
        (0.5, {0.5, 1.0}, [0.25]),
        (4.0, {2.0, 4.0}, [8.0]),
        (16.0, {8.0, 16.0}, []),
    ],
)
def test_the_grid_of_rates_widens_at_its_ends(best, tried, next_ones):
    assert lm.beyond(best, tried) == next_ones


def test_budgets_reach_beyond_for_fixed_numbers_of_loops():
    suite = load_suite("quick")
    assert suite.budgets_of("grow") == suite.budgets
    ends = suite.budgets_of("looped:2")
    assert ends[0] * BEYOND == pytest.approx(suite.budgets[0])
    assert ends[-1] == pytest.approx(suite.budgets[-1] * BEYOND)


def test_the_text_is_no_larger_than_asked_for():
    chosen = standard_library(2e5)
    assert 2e5 <= sum(path.stat().st_size for path in chosen) < 2e5 + max(p.stat().st_size for p in chosen)


@pytest.mark.parametrize("change", [{"arms": ("shift",)}, {"budgets": (1.0, 2.0)}])
def test_a_wrong_suite_is_refused(change, tmp_path):
    tomli_w = pytest.importorskip("tomli_w")
    table = dataclasses.asdict(load_suite("quick")) | change
    path = tmp_path / "wrong.toml"
    path.write_text(tomli_w.dumps({k: list(v) if isinstance(v, tuple) else v for k, v in table.items()}))
    with pytest.raises(ShiftInputError, match="'suite'"):
        load_suite(str(path))
    assert isinstance(load_suite("quick"), Suite)
