"""The savings suite: its declarations, its statistics, its report from hand-made runs."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from synthetic_runs import LOOP_FLOPS, collected, reaches, switches, write_arm

from benchmarks.savings import quiet, recompile, scp_sweep, tune
from benchmarks.savings.overall import hindsight, overall, pooled
from benchmarks.savings.paired import best_fixed_switch, p_cheaper
from benchmarks.savings.report import (
    cost_table,
    fairness_table,
    ratio_table,
    restricted_table,
    sentences,
    summary_table,
    switch_table,
    write_suite_report,
)
from benchmarks.savings.report import (
    test_table as paired_test_table,
)
from benchmarks.savings.restricted import best_fixed, best_t, headline, named, restricted_mean
from benchmarks.savings.restricted import costs as costs_of
from benchmarks.savings.run import Progress, cost, finished
from benchmarks.savings.suite import SUITES, load_suite
from shift.comparison.arms import make_arm
from shift.comparison.summary import read_summary, write_summary
from shift.report.document import block_markdown
from shift.report.rows import read_rows, write_rows
from shift.schedules import Decision, SCPConfig
from shift_kernels import ShiftInputError

COMMITTED = Path(__file__).parents[2] / "benchmarks/results/savings/full"


@pytest.mark.parametrize("name", sorted(p.stem for p in SUITES.glob("*.toml")))
def test_a_suite_has_every_control_and_builds(name):
    suite = load_suite(name)
    for case in suite.cases:
        assert {"single", "looped", "again", "looped:smallest", "shift", "matched", "climb"} <= set(case.arms)
        assert sum(arm.startswith("fixed:") for arm in case.arms) >= 2
    assert {case.used_for for case in suite.cases} == {"tuning", "held out"}


def test_tasks_change_the_demo_and_keep_the_criterions_defaults():
    case = load_suite("full", ("hop_g12",)).cases[0]
    assert case.config.model.n_loops == 3
    assert case.config.model.d_model == 64
    assert case.config.task.options == {"n_nodes": 12, "max_hops": 6}
    assert case.config.schedule.options == {}


@pytest.mark.parametrize(("suite", "tasks", "named"), [("fool", (), "suite"), ("full", ("hip",), "tasks")])
def test_a_wrong_suite_or_task_is_named(suite, tasks, named):
    with pytest.raises(ShiftInputError, match=f"'{named}'"):
        load_suite(suite, tasks)


def numbered(costs):
    return dict(enumerate(costs))


def test_p_is_the_share_of_sign_patterns_at_least_as_cheap():
    cheaper, dearer = numbered([1.0, 2.0, 3.0]), numbered([2.0, 5.0, 9.0])
    assert p_cheaper(cheaper, dearer) == 1 / 8
    assert p_cheaper(dearer, cheaper) == 1.0
    mixed = numbered([1.0, 6.0, 3.0])  # the seed against it has the smallest ratio: two patterns do as well
    assert p_cheaper(mixed, dearer) == 2 / 8


def test_never_is_the_largest_difference_and_ties_say_nothing():
    looped = numbered([2.0, 2.0, 2.0, 2.0])
    once_never = numbered([1.0, 1.0, 1.0, math.inf])
    assert p_cheaper(once_never, looped) > 0.25
    assert p_cheaper(numbered([2.0, math.inf]), numbered([2.0, math.inf])) == 1.0
    assert p_cheaper(numbered([2.0, math.inf, 1.0]), numbered([2.0, math.inf, 2.0])) == 0.5


def test_many_pairs_are_sampled_and_agree_with_the_exact_count():
    few = p_cheaper(numbered([1.0] * 11 + [3.0]), numbered([2.0] * 12))
    many = p_cheaper(numbered([1.0] * 12 + [3.0]), numbered([2.0] * 13))
    assert 0 < many < few < 0.02


def test_p_is_never_0_however_many_pairs_agree():
    assert 0 < p_cheaper(numbered([1.0] * 40), numbered([2.0] * 40)) < 1e-3


@pytest.fixture
def results(tmp_path):
    for name, step, loops in (
        ("looped", 60, lambda s: 4),
        ("single", 999, lambda s: 1),
        ("shift", 60, switches(30)),
        ("fixed:0.1", 999, switches(10)),
        ("fixed:0.25", 50, switches(25)),
    ):
        write_arm(tmp_path / "task", name, {s: reaches(step + s) for s in range(5)}, loops)
    names = ["looped", "single", "shift", "fixed:0.1", "fixed:0.25"]
    return {"a_task": collected(tmp_path / "task", names, list(range(5))) | {"used_for": "held out"}}


def test_the_best_fixed_switch_reaches_the_target(results):
    assert best_fixed_switch(results["a_task"]["arms"]) == "fixed:0.25"


def test_the_sum_over_tasks_counts_what_was_lost_and_what_hindsight_would_do(results):
    text = overall(results, "shift")
    ratio = results["a_task"]["arms"]["shift"]["against_looped"]["mean"]
    assert f"{ratio:.2f} of Looped's compute" in text
    assert "lost 0" in text
    assert "on 0 of 1 task" in text
    fixed = results["a_task"]["arms"]["fixed:0.25"]["against_looped"]["mean"]
    assert f"by hindsight: {fixed:.2f} on 1 task, 0 lost" in text
    assert "lost 5" in overall(results, "single")
    assert "on 1 of 1 task" in overall(results, "fixed:0.25")
    assert pooled(results, "shift", "looped") == 1 / 2**5


def test_hindsight_takes_the_best_arm_of_each_task(results):
    fixed = results["a_task"]["arms"]["fixed:0.25"]["against_looped"]["mean"]
    assert f"hindsight: {fixed:.2f} of Looped's compute on 1 task, 0 lost" in hindsight(results)
    never = {"other": {"arms": {"single": results["a_task"]["arms"]["single"]}}}
    assert hindsight(results | never) == hindsight(results)
    assert hindsight(never) == "No arm got there on any task."


def test_the_restricted_mean_leaves_no_run_out(results):
    task = results["a_task"]
    looped = {s["seed"]: s for s in task["arms"]["looped"]["seeds"]}
    assert restricted_mean(results, named("looped"))[0] == 1
    paid = sum(s["flops_to_target"] for s in looped.values())
    # Single never got there: each of its runs costs what Looped of its seed spent in all.
    never = sum(s["flops_total"] for s in looped.values()) / paid
    assert restricted_mean(results, named("single"))[0] == pytest.approx(never)
    shift = {s["seed"]: s for s in task["arms"]["shift"]["seeds"]}
    reached = sum(s["flops_to_target"] for s in shift.values())
    assert restricted_mean(results, named("shift"))[0] == pytest.approx(reached / paid)
    shift[4]["flops_to_target"] = None
    capped = reached + looped[4]["flops_total"]
    value, (low, high) = restricted_mean(results, named("shift"))
    assert reached / paid < value < capped / paid
    assert low < value < high
    looped[3]["flops_to_target"] = None  # Looped's own failures count, too
    assert restricted_mean(results, named("looped"))[0] == 1
    assert restricted_mean(results, named("shift"))[0] < value


def test_the_headline_is_the_best_of_ours_on_the_tuning_tasks(results):
    found = headline(results)
    assert found["arm"] == "shift"
    assert (found["lost"], found["lost_looped_other_data"]) == (0, 0)
    assert found["best_fixed_by_hindsight"] == restricted_mean(results, best_fixed)[0]
    assert found["oracle"] <= min(found["restricted_mean"], found["best_fixed_by_hindsight"])
    assert found["over_best_t"] is None  # all four loops are needed
    assert restricted_mean(results, named("shift"), best_t)[0] == found["restricted_mean"]
    assert restricted_mean(results, named("no such arm")) is None


def test_the_report_says_where_arms_switched_and_that_some_never_did(results):
    table = switch_table(results)
    assert table.rows == [["SHIFT", "30%"]]
    for seed in results["a_task"]["arms"]["shift"]["seeds"][:2]:
        seed["final_loops"] = 1
    assert switch_table(results).rows == [["SHIFT", "30% [never: 2]"]]


def test_the_report_shows_ratios_tests_and_failures(results, tmp_path):
    markdown, page = write_suite_report(results, tmp_path / "report")
    text = markdown.read_text()
    shift = results["a_task"]["arms"]["shift"]["against_looped"]["mean"]
    assert f"{shift:.2f}" in text
    assert "[never: 5 seeds]" in text
    assert "0.031" in text  # 1 / 2^5: cheaper on all five seeds
    assert "<html" in page.read_text()
    written = json.loads((tmp_path / "report" / "results.json").read_text())
    assert written["a_task"]["arms"]["shift"]["against_looped"]["mean"] == shift


def test_the_time_left_goes_by_what_the_tasks_cost():
    now = [0.0]
    progress = Progress([1.0, 0.0, 3.0], clock=lambda: now[0])
    assert progress.words() == "1 of 3, time left unknown"
    now[0] = 60.0
    progress.advance(1)
    assert progress.words() == "2 of 3, about 3 min left"
    progress.advance(1)
    assert progress.words() == "3 of 3, about 3 min left"
    assert Progress([0.0]).words() == "1 of 1, all trained"


def test_a_wave_is_finished_when_every_arm_was_compared_on_its_seeds(tmp_path):
    case = load_suite("full", ("markov",)).cases[0]
    assert cost(case) > 0
    assert not finished(case, (0,), tmp_path)
    compared = [{"arm": arm, "seed": seed} for arm in case.arms for seed in (0, 1)]
    (tmp_path / case.name).mkdir()
    write_rows(tmp_path / case.name / "summary.json", compared, {})
    assert finished(case, (0, 1), tmp_path)
    assert not finished(case, (0, 1, 2), tmp_path)
    write_rows(tmp_path / case.name / "summary.json", compared[:-1], {})
    assert not finished(case, (0, 1), tmp_path)


def curve(crossing):
    """A run's curve that is right from a cost on; evaluated at 0, 100, .. 1000 FLOPs."""
    flops = list(range(0, 1001, 100))
    return {"step": flops, "flops": flops, "accuracy": [float(f >= crossing) for f in flops]}


def at_rate(**crossings):
    """Results of arms whose runs cross at these costs."""
    return {
        "arms": {
            name: {"seeds": [{"seed": 0, "curve": curve(c), "final_accuracy": 1.0, "flops_total": 1000}]}
            for name, c in crossings.items()
        }
    }


def test_every_arm_gets_its_best_rate_and_its_grid_is_widened_where_it_is_best_at_an_end(monkeypatch):
    def compared(case, arms, factor, seeds, out, jobs):
        tried.append(factor)
        best = {"looped": 2, "climb": 8, "single": 1 / 4, "looped:2": 2}
        wanted = {"looped", *({"looped:smallest": "looped:2"}.get(arm, arm) for arm in arms)}
        crossings = {arm: int(100 + 100 * abs(math.log2(factor / best[arm]))) for arm in wanted & best.keys()}
        return at_rate(**crossings)

    tried = []
    monkeypatch.setattr(tune, "_compared", compared)
    case = load_suite("quick", ("addition",)).cases[0]
    found = tune.widened(case, (0,), Path("nowhere"), 1)
    assert sorted(tried) == [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16]
    assert tune.best_factors(found) == {"looped": 2, "climb": 8, "single": 1 / 4, "looped:smallest": 2}
    assert tune.tuning_flops(found) == (2 * 4 + 3 + 5 * 2) * 1000


def test_an_arm_that_never_gets_there_costs_looped_s_whole_run():
    found = {0.5: at_rate(looped=300, shift=900), 1.0: at_rate(looped=200, shift=5000)}
    assert tune.best_factors(found) == {"looped": 1.0, "shift": 0.5}


def test_an_arm_that_never_gets_there_keeps_the_rate_of_the_suite():
    found = {factor: at_rate(looped=100, single=5000) for factor in (0.5, 1.0, 2.0)}
    assert tune.best_factors(found)["single"] == 1.0
    assert not tune.beyond({0.5: at_rate(looped=900), **found, 4.0: at_rate(looped=900)})


def test_arms_run_at_their_tuned_rates():
    rates = {"looped": 0.01, "looped:smallest": 0.02}
    base = load_suite("quick", ("addition",)).cases[0].config
    arms = {name: make_arm(name, base, rates) for name in ("looped", "again", "looped:2", "climb")}
    lr = {name: arm.config.optimiser.lr for name, arm in arms.items()}
    assert lr == {"looped": 0.01, "again": 0.01, "looped:2": 0.02, "climb": base.optimiser.lr}


def test_a_setting_of_the_criterion_is_the_fixed_switch_that_it_makes():
    case = load_suite("full", ("hop_d12",)).cases[0]
    flat = [1.0] * 600, [1.0] * 600
    assert scp_sweep.arm_of(SCPConfig(), flat, case) == "fixed:120"
    assert scp_sweep.arm_of(SCPConfig(patience=3, interval=10), flat, case) == "fixed:30"  # 40, rounded
    falling = [0.9**step for step in range(600)], [1.0] * 600
    assert scp_sweep.arm_of(SCPConfig(), falling, case) == "single"


def test_the_sweep_costs_a_setting_what_its_switches_cost(results, monkeypatch):
    monkeypatch.setattr(scp_sweep, "SWEPT", {"patience": (5,)})
    case = load_suite("full", ("hop_d12",)).cases[0]
    r = results["a_task"]
    r["arms"]["fixed:120"] = r["arms"]["fixed:0.25"]
    records = {seed: ([1.0] * 600, [1.0] * 600) for seed in range(4)} | {
        4: ([0.9**s for s in range(600)], [1.0] * 600)
    }
    (row,) = scp_sweep.swept([(case, records, r)])
    fixed, single = (costs_of(r, named(name)) for name in ("fixed:0.25", "single"))
    looped = costs_of(r, named("looped")).sum()
    assert row["restricted_mean"] == pytest.approx((fixed[:4].sum() + single[4]) / looped)
    assert (row["lost"], row["never"], row["default"], row["front"]) == (1, 1, True, True)


def test_no_setting_beats_one_of_the_front():
    rows = [
        {"lost": lost, "restricted_mean": mean, "default": default}
        for lost, mean, default in [(2, 0.5, False), (0, 0.9, False), (2, 0.5, True), (1, 0.95, False)]
    ]
    assert scp_sweep.front(rows) == [rows[1], rows[2]]


def test_steps_are_timed_once_for_each_variant_whatever_its_schedule(monkeypatch):
    def ran(*loops):
        return {"seeds": [{"seed": 0, "loops": loops, "curve": {"step": [450]}}]}

    case = load_suite("full", ("markov",)).cases[0]
    monkeypatch.setattr(quiet, "measured", lambda config, kinds: (config, dict(kinds)))
    arms = {"climb@later": ran([1, 1], [31, 3]), "looped@scaled": ran([1, 3])}
    rates = quiet.rates_of(case, {"arms": arms})
    assert rates.keys() == {"later", "scaled"}
    config, kinds = rates["later"]
    assert (config.schedule.kind, config.model.residual_scale) == ("constant", "1/T")
    assert kinds == {quiet.kind_of(Decision(n)): Decision(n) for n in (1, 3)}


def test_seconds_are_the_sum_over_the_steps_that_were_run(results, tmp_path):
    case = load_suite("quick", ("addition",)).cases[0]
    model = dataclasses.replace(case.config.model, n_loops=4)
    case = dataclasses.replace(case, config=dataclasses.replace(case.config, steps=100, model=model))
    r = results["a_task"]
    kinds = {quiet.kind_of(Decision(n)): 10.0 * n for n in (1, 4)}
    quiet.with_seconds(case, r, {"": kinds})
    fixed, shift = r["arms"]["fixed:0.25"]["seeds"][3], r["arms"]["shift"]["seeds"][3]
    assert fixed["quiet_s"] == pytest.approx(25 * 0.01 + 75 * 0.04)
    assert fixed["quiet_s_to_target"] == pytest.approx(25 * 0.01 + 35 * 0.04)  # evaluated every 10 steps
    assert shift["quiet_s_to_target"] == pytest.approx(30 * 0.01 + 40 * 0.04)
    assert r["arms"]["single"]["seeds"][0]["quiet_s_to_target"] is None
    seconds = restricted_mean(results, named("shift"), measure="quiet_s")
    loops = restricted_mean(results, named("shift"))  # a loop costs 10 ms, and nothing else
    assert seconds[0] == pytest.approx(loops[0])
    assert restricted_table(results).rows[0][2] == "1.00 (1.00–1.00)"
    write_summary(tmp_path / "summary.json", results)
    assert restricted_table(read_summary(tmp_path / "summary.json")) == restricted_table(results)


def test_the_kinds_of_steps_of_an_arm_are_those_it_took():
    base = dataclasses.replace(load_suite("quick", ("addition",)).cases[0].config, steps=20)

    def kinds(name, loops):
        config = make_arm(name, base).config
        return [quiet.kind_of(d) for d in quiet.decisions(config, loops, 20)]

    two, five = quiet.kind_of(Decision(2)), quiet.kind_of(Decision(5))
    assert kinds("climb", [[1, 2], [11, 5]]) == [two] * 10 + [five] * 10
    assert kinds("grow:0.5", [[1, 2], [11, 5]]) == [two] * 10 + [five] * 10
    assert kinds("backward_warmup:0.5", [[1, 5]])[0] == quiet.kind_of(Decision(5, n_grad_loops=2))


def test_a_stall_is_what_a_first_step_takes_beyond_a_later_one(tmp_path):
    rows = [
        {"side": side, "n_loops": n, "first_s": first, "later_s": 0.01}
        for n in recompile.LOOPS
        for side, first in zip(recompile.SIDES, (12.01, 0.11, 0.005), strict=True)
    ]
    (tmp_path / "r.json").write_text(json.dumps({"rows": rows}))
    table = recompile.stalls(tmp_path / "r.json")
    assert [cell.replace("\u00a0", " ") for cell in table.rows[-1]] == [
        "8", "12.0 s", "0.1 s", "0.0 s", "10.0", "10.0", "10.0",
    ]  # fmt: skip


TABLES = (summary_table, ratio_table, paired_test_table, switch_table, cost_table, fairness_table, sentences)


def test_the_report_is_written_where_no_smaller_t_was_run(tmp_path):
    for name, loops in (("looped", lambda s: 4), ("single", lambda s: 1)):
        write_arm(tmp_path / "task", name, {0: reaches(50)}, loops)
    results = {"task": collected(tmp_path / "task", ["looped", "single"], [0]) | {"used_for": "tuning"}}
    assert results["task"]["smallest_sufficient"]["arm"] == "single"
    assert write_suite_report(results, tmp_path)[0].is_file()


@pytest.mark.parametrize("table", TABLES)
def test_the_summary_holds_all_that_a_table_is_made_of(table, results, tmp_path):
    write_summary(tmp_path / "summary.json", results)
    assert table(read_summary(tmp_path / "summary.json")) == table(results)


def test_the_summary_has_a_line_a_run(results, tmp_path):
    write_summary(tmp_path / "summary.json", results)
    lines = (tmp_path / "summary.json").read_text().splitlines()
    assert sum(line.startswith('["a_task", ') for line in lines) == 5 * 5
    rows, about = read_rows(tmp_path / "summary.json")
    assert about["a_task"]["used_for"] == "held out"
    row = next(row for row in rows if (row["arm"], row["seed"]) == ("shift", 1))
    assert (row["reached"], row["switch_step"], row["final_loops"]) == (True, 30, 4)
    assert row["share_of_looped"] == row["flops_to_target"] / (4 * 70 * LOOP_FLOPS)


@pytest.mark.parametrize("table", TABLES)
def test_the_committed_report_says_what_its_summary_says(table):
    made = block_markdown(table(read_summary(COMMITTED / "summary.json")), COMMITTED)
    assert made in (COMMITTED / "report.md").read_text()
