"""shift-compare: arms, what is read out of run directories, ratios, and the checks of fairness."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import threading
import time
from pathlib import Path

import pytest
from synthetic_runs import (
    LOOP_FLOPS,
    PLAN,
    collected,
    reaches,
    read_arms,
    switches,
    write_arm,
)
from tiny_runs import processes, tiny

from shift.build import build_schedule
from shift.compare import main
from shift.comparison import runs as compared
from shift.comparison.arms import (
    SMALLEST,
    check_variants,
    colours,
    make_arm,
    rate_name,
    seeded,
    used_variants,
)
from shift.comparison.fairness import fairness
from shift.comparison.plan import alone_in, matched_mean
from shift.comparison.pool import Display, train_all
from shift.comparison.ratios import against_looped
from shift.comparison.results import first_crossing, share_of_looped
from shift.comparison.verdict import verdict
from shift.config import ModelConfig, OptimiserConfig, ScheduleConfig, TrainConfig
from shift.run.record import read_run
from shift.run.trainer import Trainer
from shift_kernels import ShiftInputError

SEEDS = [0, 1]


def always(n_loops: int):
    return lambda step: n_loops


def costs(*flops: float | None) -> list[dict]:
    return [{"seed": seed, "flops_to_target": cost, "late": False} for seed, cost in enumerate(flops)]


def check(results: dict, rule: str) -> dict:
    return next(c for c in results["fairness"] if rule in c["rule"])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Looped reaches .99 at steps 50 and 60; SHIFT at 60, but never on seed 1; T = 2 at 70."""
    write_arm(tmp_path, "single", {0: reaches(200), 1: reaches(200)}, always(1))
    write_arm(tmp_path, "looped", {0: reaches(50), 1: reaches(60)}, always(4))
    write_arm(tmp_path, "shift", {0: reaches(60), 1: reaches(200)}, switches(40))
    write_arm(tmp_path, "looped:2", {0: reaches(70), 1: reaches(70)}, always(2))
    return tmp_path


NAMES = ["single", "looped", "shift", "looped:2"]


# --- arms ------------------------------------------------------------------------------------------------


def test_an_arm_changes_the_schedule_and_nothing_else():
    base = TrainConfig(steps=7, seed=3)
    arm = make_arm("fixed:0.25", base)
    assert arm.config == TrainConfig(steps=7, seed=3, schedule=ScheduleConfig("fixed", {"at": 0.25}))
    assert (arm.label, arm.directory) == ("Fixed switch at 0.25", "fixed-0.25")


def test_options_of_the_config_reach_the_arm_of_their_kind_only():
    base = TrainConfig(schedule=ScheduleConfig("shift", {"delta_1": 0.03}))
    assert make_arm("shift", base).config.schedule.options == {"delta_1": 0.03}
    assert make_arm("looped:2", base).config.schedule.options == {"n_loops": 2}


VARIANTS = {
    "normed": {"model": {"loop_norm": True}},
    "scaled": {"model": {"residual_scale": "1/T"}, "optimiser": {"lr": 0.5}},
}


def test_a_variant_changes_what_it_declares_and_has_a_rate_of_its_own():
    base = TrainConfig(schedule=ScheduleConfig("shift", {}))
    plain = make_arm("fixed:0.25", base, {}, VARIANTS)
    normed = make_arm("fixed:0.25@normed", base, {"fixed:0.25": 0.1}, VARIANTS)
    model = dataclasses.replace(base.model, loop_norm=True)
    assert normed.config == dataclasses.replace(plain.config, model=model)
    assert (normed.label, normed.directory) == ("Fixed switch at 0.25, normed", "fixed-0.25@normed")
    assert make_arm("looped@scaled", base, {}, VARIANTS).config.optimiser.lr == 0.5
    assert make_arm("looped@scaled", base, {"looped@scaled": 0.2}, VARIANTS).config.optimiser.lr == 0.2
    names = ["looped:2", "looped:2@scaled", "again", "climb@scaled"]
    assert [rate_name(name) for name in names] == [SMALLEST, "looped:2@scaled", "looped", "climb@scaled"]
    assert make_arm("climb@scaled", base).config.model.residual_scale == "1/T"
    assert used_variants(["climb", "climb@scaled"], VARIANTS) == {"scaled": VARIANTS["scaled"]}
    longer = {"longer": {"schedule": {"options": {"shares": [0.1, 0.6], "middle": "up"}}}}
    climb = make_arm("climb@longer", dataclasses.replace(base, steps=100), {}, longer)
    rungs = build_schedule(dataclasses.replace(climb.config, model=ModelConfig(n_loops=3)))
    assert ((rungs.rungs, rungs.most_steps), climb.config.model) == (((1, 2, 3), [10, 60]), base.model)
    for wrong in ("climb@", "climb@nosuch", "@normed", "climb:@normed"):
        with pytest.raises(ShiftInputError, match="'arms'"):
            make_arm(wrong, base, {}, VARIANTS)
    with pytest.raises(ShiftInputError, match=r"variants\.more.*'steps'"):
        check_variants({"more": {"steps": 10}})
    with pytest.raises(ShiftInputError, match=r"variants\.more.*'schedule\.kind'"):
        check_variants({"more": {"schedule": {"kind": "climb"}}})


def test_arms_in_a_variant_are_fair_if_they_differ_in_what_it_declares_alone(out):
    arms = {"looped@normed": VARIANTS, "climb@normed": VARIANTS}
    for name in arms:
        write_arm(out, name, {0: reaches(40), 1: reaches(40)}, always(4), weights="w1", variants=VARIANTS)
    found = collected(out, [*NAMES, *arms], SEEDS, variants=VARIANTS)
    assert check(found, "initial weights")["ok"]
    assert check(found, "Same model")["ok"]
    assert "normed: model.loop_norm = True" in check(found, "Same model")["detail"]
    # The smallest T that is enough, and the target, are the plain model's.
    assert found["smallest_sufficient"]["arm"] == "looped:2"
    unsaid = collected(out, [*NAMES, *arms], SEEDS, variants=VARIANTS, declared={})
    assert check(unsaid, "Same model")["detail"] == "they differ in model.loop_norm"


def test_a_killed_worker_is_said_in_one_line(tmp_path):
    runs = {tmp_path / "run": tiny(steps=100_000)}

    def kill():
        while not (tmp_path / "run" / "checkpoints").exists():
            time.sleep(0.05)
        for child in multiprocessing.active_children():
            child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ChildProcessError, match="memory"):
        train_all(runs, 1, io.StringIO())
    killer.join()


def test_looped_again_has_the_same_weights_and_other_data():
    base = TrainConfig()
    looped, again = (seeded(make_arm(name, base), 3) for name in ("looped", "again"))
    assert looped.seed == again.seed == looped.task.seed == 3
    assert again.task.seed != 3
    assert dataclasses.replace(again, task=looped.task) == looped


@pytest.mark.parametrize("name", ["loop", "single:2", "looped:", "climb:0.5"])
def test_an_unknown_arm_is_refused_by_name(name):
    with pytest.raises(ShiftInputError, match=f"argument 'arms' = '{name}'.*allowed: single, looped"):
        make_arm(name, TrainConfig())


def test_arms_of_one_family_differ_in_tone():
    assert len(set(colours(["looped", "looped:2", "looped:3", "shift", "single"]).values())) == 5


# --- what a run reached, and at what cost ----------------------------------------------------------------


def test_the_first_evaluation_at_the_target_counts_even_if_accuracy_falls_again():
    evals = [{"step": s, "accuracy": a} for s, a in [(0, 0.1), (10, 0.99), (20, 0.8), (30, 1.0)]]
    assert first_crossing(evals, 0.99) is evals[1]
    assert first_crossing(evals, 1.01) is None


def test_facts_of_a_run_are_read_off_its_rows(out):
    facts = collected(out, NAMES, SEEDS)["arms"]["shift"]["seeds"][0]
    assert facts["steps_to_target"] == 60
    assert facts["block_applications_to_target"] == 40 * 1 + 20 * 4
    assert facts["flops_to_target"] == (40 * 1 + 20 * 4) * LOOP_FLOPS
    assert facts["flops_total"] == (40 * 1 + 60 * 4) * LOOP_FLOPS
    assert (facts["switch_step"], facts["final_accuracy"]) == (40, 0.995)
    assert facts["final_groups"] == {"1 hop": 1.0, "2 hops": 0.995}
    assert facts["loops"] == [[1, 1], [41, 4]]


def test_a_run_that_diverged_beyond_its_steps_says_so_and_keeps_its_result(out):
    collected(out, NAMES, SEEDS)
    (out / "shift" / "seed-0" / "failure.txt").write_text("diverged: not finite")
    run = read_run(out / "shift" / "seed-0")
    assert run.result
    assert run.failure == "diverged: not finite"


def test_a_row_that_a_full_disk_cut_short_is_no_row(out):
    results = collected(out, NAMES, SEEDS)
    for name in ("metrics.jsonl", "timing.jsonl"):
        with open(out / "looped" / "seed-0" / name, "a") as file:
            file.write('{"kind": "tra')
    assert collected(out, NAMES, SEEDS) == results


def test_results_can_be_written_as_strict_json(out):
    results = collected(out, NAMES, SEEDS)
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_a_run_that_diverged_or_is_missing_counts_as_never_and_says_why(out):
    write_arm(out, "ramp", {0: reaches(20)}, always(1), failure="diverged: loss was not finite")
    first, second = collected(out, [*NAMES, "ramp"], SEEDS)["arms"]["ramp"]["seeds"]
    assert (first["flops_to_target"], first["failure"]) == (None, "diverged: loss was not finite")
    assert (second["flops_to_target"], second["failure"]) == (None, "not finished")
    assert second["final_accuracy"] is None


def test_the_default_target_is_a_share_of_loopeds_mean(out):
    looped = read_arms(out, ["looped"], SEEDS)["looped"]
    assert share_of_looped(looped, 0.98) == pytest.approx(0.98 * 0.995)
    assert share_of_looped({}, 0.98) is None


def test_without_a_target_nobody_reached_it(out):
    results = collected(out, NAMES, SEEDS, target=None)
    assert all(s["flops_to_target"] is None for arm in results["arms"].values() for s in arm["seeds"])


# --- against Looped --------------------------------------------------------------------------------------


def test_ratios_pair_equal_seeds():
    ratio = against_looped(costs(50, 90), costs(100, 100))
    assert ratio["per_seed"] == {"0": 0.5, "1": 0.9}
    assert (ratio["mean"], ratio["min"], ratio["max"]) == (pytest.approx(0.7), 0.5, 0.9)
    assert against_looped(costs(100, 300), costs(100, 100))["mean"] == 2.0
    assert against_looped(costs(100, 300), costs(100, 200))["mean"] == 1.25
    assert against_looped(costs(100, 300), costs(100, 200))["ratio_of_means"] == pytest.approx(4 / 3)


def test_never_is_counted_and_is_infinite_in_the_median():
    ratio = against_looped(costs(50, None, None), costs(100, 100, 100))
    assert (ratio["mean"], ratio["seeds_never"], ratio["median"]) == (0.5, [1, 2], None)
    assert against_looped(costs(50, 60, None), costs(100, 100, 100))["median"] == 0.6


def test_a_seed_on_which_only_looped_failed_has_no_ratio_and_is_named():
    ratio = against_looped(costs(50, 70), costs(100, None))
    assert (ratio["per_seed"], ratio["seeds_only_looped_never"]) == ({"0": 0.5, "1": None}, [1])


def test_a_run_that_got_there_after_its_steps_is_late():
    late = [
        {"seed": 0, "flops_to_target": 150, "late": True},
        {"seed": 1, "flops_to_target": 50, "late": False},
    ]
    assert against_looped(late, costs(100, 100))["seeds_late"] == [0]
    assert against_looped(late, costs(None, 100))["seeds_late"] == []  # Looped itself did not
    assert against_looped(late, costs(100, 100))["mean"] == 1.0


def test_an_interval_needs_enough_pairs_and_holds_the_mean():
    assert against_looped(costs(*[50] * 4), costs(*[100] * 4))["ci95"] is None
    ratio = against_looped(costs(50, 60, 70, 80, 90, 95), costs(*[100] * 6))
    low, high = ratio["ci95"]
    assert ratio["min"] < low < ratio["mean"] < high < ratio["max"]


def test_looped_is_stopped_at_shifts_compute_seed_by_seed(out):
    stopped = collected(out, NAMES, SEEDS)["looped_at_shift_compute"]
    budget = (40 * 1 + 60 * 4) * LOOP_FLOPS  # 280 block applications: Looped's step 70
    assert stopped["valid"]
    assert [s["budget_flops"] for s in stopped["seeds"]] == [budget, budget]
    assert [(s["step"], s["final_accuracy"]) for s in stopped["seeds"]] == [(70, 0.995), (70, 0.995)]


def test_looped_stopped_early_is_not_read_off_a_run_whose_learning_rate_decays(tmp_path):
    base = TrainConfig(steps=100, eval_every=10, optimiser=OptimiserConfig(lr_schedule="cosine"))
    for name, n_loops in (("looped", 4), ("shift", 1)):
        write_arm(tmp_path, name, {0: reaches(50)}, always(n_loops), base=base)
    assert not collected(tmp_path, ["looped", "shift"], [0])["looped_at_shift_compute"]["valid"]


def test_clocks_are_read_at_the_crossing(out):
    looped = collected(out, NAMES, SEEDS)["arms"]["looped"]["seeds"]
    assert [s["cpu_s_to_target"] for s in looped] == [4 * 50 / 200, 4 * 60 / 200]
    assert [s["wall_s_to_target"] for s in looped] == [4 * 50 / 100, 4 * 60 / 100]


def test_seeds_that_come_later_join_the_matched_arm_of_the_first(out):
    (out / "plan.json").write_text(json.dumps(PLAN))
    runs = read_arms(out, ["shift", "looped"], SEEDS)
    assert matched_mean(out, runs["shift"]) == (40 + 60 * 4) / 100
    assert matched_mean(out, runs["looped"]) == (40 + 60 * 4) / 100
    assert json.loads((out / "plan.json").read_text())["target_rule"] == PLAN["target_rule"]


def test_the_smallest_sufficient_t_must_reach_the_target_on_all_seeds(out):
    assert collected(out, NAMES, SEEDS)["smallest_sufficient"] == {
        "tried": [1, 2, 4],
        "n_loops": 2,
        "arm": "looped:2",
    }
    write_arm(out, "looped:3", {0: reaches(70), 1: reaches(200)}, always(3))
    smallest = collected(out, ["single", "looped", "looped:3"], SEEDS)["smallest_sufficient"]
    assert smallest == {"tried": [1, 3, 4], "n_loops": 4, "arm": "looped"}


def test_looped_again_is_a_measure_of_chance_and_no_way_to_train(out):
    write_arm(out, "again", {0: reaches(40), 1: reaches(200)}, always(4))
    results = collected(out, ["single", "looped", "again"], SEEDS)
    assert results["smallest_sufficient"] == {"tried": [1, 4], "n_loops": 4, "arm": "looped"}


def test_looped_again_is_not_praised_as_cheaper(out):
    write_arm(out, "again", {0: reaches(20), 1: reaches(20)}, always(4))
    assert "other data" not in " ".join(verdict(collected(out, [*NAMES, "again"], SEEDS)))


def test_what_is_reached_after_the_steps_is_late(out):
    for seed, late in ((0, True), (1, False)):
        path = out / "shift" / f"seed-{seed}" / "config.toml"
        assert collected(out, NAMES, SEEDS)["arms"]["shift"]["seeds"][seed]["late"] is False
        path.write_text(path.read_text().replace("steps = 100", "steps = 50"))
        assert collected(out, NAMES, SEEDS)["arms"]["shift"]["seeds"][seed]["late"] is late


# --- fairness --------------------------------------------------------------------------------------------


def test_a_fair_comparison_has_nothing_crossed_but_what_is_missing(out):
    crossed = [c["rule"] for c in collected(out, NAMES, SEEDS)["fairness"] if not c["ok"]]
    assert crossed == ["The strong baselines are there"]  # no ramp, no fixed switch


@pytest.mark.parametrize(
    ("options", "rule", "detail"),
    [
        (
            {"weights": "w1"},
            "same initial weights",
            "seed 0: w0 (single, looped, shift, looped:2); w1 (ramp)",
        ),
        ({"data": "d1"}, "same data", "d1/d1 (ramp)"),
        ({"base": TrainConfig(steps=100, eval_every=10, batch_size=32)}, "Same model", "batch_size"),
        (
            {"base": TrainConfig(steps=100, eval_every=10, optimiser=OptimiserConfig(lr=1e-3))},
            "Same model",
            "optimiser.lr",
        ),
        ({"failure": "diverged"}, "Every seed", "ramp seed 0"),
    ],
)
def test_an_unfair_arm_is_crossed_and_named(out, options, rule, detail):
    write_arm(out, "ramp", {0: reaches(50), 1: reaches(50)}, always(4), **options)
    found = check(collected(out, [*NAMES, "ramp"], SEEDS), rule)
    assert not found["ok"]
    assert detail in found["detail"]


def test_a_target_changed_after_the_first_run_is_crossed(out):
    runs = read_arms(out, NAMES, SEEDS)
    changed = fairness(runs, 0.9, PLAN | {"target_rule": "accuracy 0.9"})
    found = next(c for c in changed if "target" in c["rule"])
    assert not found["ok"]
    assert "accuracy 0.99" in found["detail"]
    assert "accuracy 0.9" in found["detail"]


def test_runs_of_two_commits_are_crossed(out):
    path = out / "shift" / "seed-0" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": "f00"}))
    found = check(collected(out, NAMES, SEEDS), "one version")
    assert not found["ok"]
    assert "commit" in found["detail"]


def test_runs_of_which_none_finished_make_results_too(tmp_path):
    results = collected(tmp_path, ["looped", "shift"], SEEDS)
    assert not check(results, "Every seed")["ok"]
    assert not check(results, "same initial weights")["ok"]


# --- the command -----------------------------------------------------------------------------------------

TINY = """
steps = 6
batch_size = 4
eval_every = 3
eval_samples = 8
[task]
name = "hop"
options = { n_nodes = 4, max_hops = 2 }
[model]
n_loops = 3
d_model = 8
n_heads = 2
d_ff = 16
"""


def test_the_command_trains_compares_and_reuses_what_is_done(tmp_path, capsys):
    config, out = tmp_path / "tiny.toml", tmp_path / "out"
    config.write_text(TINY)
    command = ["--config", str(config), "--arms", "looped", "fixed:0.5", "--seeds", "5", "--jobs", "1"]
    command += ["--out", str(out), "--target", "0.01"]
    assert main(command) == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results["arms"]) == ["looped", "fixed:0.5"]
    looped, fixed = (arm["seeds"][0] for arm in results["arms"].values())
    assert (looped["switch_step"], fixed["switch_step"]) == (None, 3)
    assert (looped["block_applications"], fixed["block_applications"]) == (6 * 3, 3 * 1 + 3 * 3)
    assert all(c["ok"] for c in results["fairness"] if "same" in c["rule"])
    assert results["target_accuracy"] == 0.01
    assert {path.name for path in out.iterdir()} >= {"report.md", "report.html", "figures", "plan.json"}

    written = (out / "looped" / "seed-5" / "result.json").stat().st_mtime_ns
    assert main(command) == 0
    assert (out / "looped" / "seed-5" / "result.json").stat().st_mtime_ns == written
    assert main([*command, "--steps", "7"]) == 2
    assert "argument 'steps' = 7 is not supported; allowed: 6, as in" in capsys.readouterr().err


def test_runs_that_miss_the_target_get_loopeds_compute(tmp_path, monkeypatch):
    def here(runs, jobs):  # processes of their own take seconds to start
        for path, run in runs.items():
            Trainer(run, path, resume=True).fit()

    monkeypatch.setattr(compared, "train_all", here)
    config, out = tmp_path / "tiny.toml", tmp_path / "out"
    config.write_text(TINY)
    command = ["--config", str(config), "--arms", "looped", "single", "--seeds", "5", "--jobs", "1"]
    command += ["--out", str(out), "--target", "1.0"]
    assert main(command) == 0
    before = (out / "single" / "seed-5" / "metrics.jsonl").read_text()
    looped = (out / "looped" / "seed-5" / "metrics.jsonl").read_text()
    assert main([*command, "--overtime"]) == 0
    after = (out / "single" / "seed-5" / "metrics.jsonl").read_text()
    assert after.startswith(before)
    assert (out / "looped" / "seed-5" / "metrics.jsonl").read_text() == looped
    arms = json.loads((out / "results.json").read_text())["arms"]
    spent = {name: arm["seeds"][0]["flops_total"] for name, arm in arms.items()}
    assert "went on until it had spent" in (out / "report.md").read_text()
    steps = after.count('"kind": "train"')
    assert spent["looped"] <= spent["single"] < spent["looped"] * steps / (steps - 1)
    checks = json.loads((out / "results.json").read_text())["fairness"]
    assert all(c["ok"] for c in checks if "Same model" in c["rule"] or "same data" in c["rule"])
    result = (out / "single" / "seed-5" / "result.json").stat().st_mtime_ns
    for again in (command, [*command, "--overtime"]):
        assert main(again) == 0
    assert (out / "single" / "seed-5" / "result.json").stat().st_mtime_ns == result


def hold(out, held, done):
    """Child process: be the one comparison in ``out`` until ``done``."""
    with alone_in(out):
        held.set()
        done.wait(60)


def test_of_two_comparisons_in_one_directory_the_first_goes_on(tmp_path, capsys):
    config, out = tmp_path / "tiny.toml", tmp_path / "out"
    config.write_text(TINY)
    context = processes()
    held, done = context.Event(), context.Event()
    first = context.Process(target=hold, args=(out, held, done))
    first.start()
    assert held.wait(60)
    assert main(["--config", str(config), "--out", str(out), "--jobs", "1"]) == 2
    assert "no other comparison is running" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [".lock"]
    done.set()
    first.join()
    assert first.exitcode == 0
    with alone_in(out):
        pass


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"created": 1, "first_target_rule": "x"}', '{"matched": "2"}', "[" * 9999],
    ids=range(7),
)
def test_a_plan_that_was_changed_by_hand_is_one_line(tmp_path, capsys, content):
    config, out = tmp_path / "tiny.toml", tmp_path / "out"
    config.write_text(TINY)
    out.mkdir()
    (out / "plan.json").write_text(content)
    assert main(["--config", str(config), "--out", str(out), "--target", "0.5", "--jobs", "1"]) == 2
    assert "plan.json" in capsys.readouterr().err


def test_a_mean_without_fraction_is_read_again(out):
    (out / "plan.json").write_text(json.dumps(PLAN))
    looped = read_arms(out, ["looped"], SEEDS)["looped"]
    assert matched_mean(out, looped) == matched_mean(out, looped) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "looped", "matched"], "argument 'arms' = 'matched'"),
        (["--task", "hops"], "argument 'name' = 'hops'"),
        (["--arms", "spiral"], "argument 'arms' = 'spiral'"),
        (["--arms", "fixed:2.5"], "argument 'at' = 2.5"),
        (["--target", "99"], "argument 'target' = 99"),
        (["--target", "0.9", "--arms", "single", "--overtime"], "argument 'overtime' = True"),
        (["--arms", "shift"], "argument 'target' = None"),
        (["--seeds", "1", "1"], "argument 'seeds' = (1, 1)"),
        (["--jobs", "0"], "argument 'jobs' = 0"),
        (["--preset", "nowhere"], "argument 'config' = 'nowhere'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_progress_in_a_log_file_is_a_line_with_what_is_done():
    stream = io.StringIO()
    display = Display(n_runs=2, total_steps=200, stream=stream)
    display.EVERY_S = 0
    display.step("a", 101)  # resumed at step 100
    display.step("a", 150)
    display.show(runs_done=1)
    assert stream.getvalue().startswith("1 of 2 runs, 150 of 200 steps, about ")
