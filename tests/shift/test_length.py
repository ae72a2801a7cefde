"""The length study: its tables, and the runs at Fan et al.'s budget, which go on where a call stopped."""

import itertools
import json
import types

import pytest
from tiny_runs import tiny

from benchmarks.gpu import fan
from benchmarks.gpu.fan import SIZES, run, task_config
from benchmarks.length.report import mean_sweep, rule_table
from shift.build import build_model, build_task
from shift.config import ModelConfig, TaskConfig
from shift.run.record import FAILURE
from shift.run.trainer import Trainer, TrainingDiverged
from shift_kernels.console import INTERRUPTED

MODEL = ModelConfig(n_loops=3, d_model=16, n_heads=2, d_ff=32, learned_positions=False)
PARITY = tiny(task=TaskConfig("parity", options={"max_length": 3}), model=MODEL, steps=6)


@pytest.mark.parametrize("task", SIZES)
def test_their_tasks_fit_the_loops_and_the_width_of_their_models(task):
    config = task_config(task)
    built = build_task(config)
    assert config.model.d_model == 256
    assert config.steps == 100_000
    assert built.batch(512, config.steps).n_loops.max() == config.model.n_loops
    assert build_model(config, built).block.spec.n_layers == SIZES[task]["n_layers"]


def test_calls_go_on_until_all_is_trained_and_measured(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(monotonic=itertools.count().__next__)  # a second a look
    monkeypatch.setattr(fan, "time", clock)

    def call(seconds):
        return run({"parity": PARITY}, ("single", "looped:2"), (0, 1), tmp_path, seconds, "the command")

    assert call(0) == INTERRUPTED
    assert not list(tmp_path.rglob("result.json"))
    calls = 0
    while call(6) == INTERRUPTED:
        calls += 1
        assert calls < 12
    assert calls > 1
    results = json.loads((tmp_path / "parity" / "results.json").read_text())
    assert {arm: list(seeds) for arm, seeds in results.items()} == {
        "single": ["0", "1"],
        "looped-2": ["0", "1"],
    }
    report = (tmp_path / "parity" / "report.md").read_text()
    assert "the command" in report
    assert (tmp_path / "parity" / "heat_map.png").is_file()
    written = (tmp_path / "parity" / "report.md").stat().st_mtime_ns
    assert call(0) == 0
    assert (tmp_path / "parity" / "report.md").stat().st_mtime_ns == written


def test_a_run_that_diverges_is_not_tried_again_and_stops_no_other(tmp_path, monkeypatch):
    tried = []

    class Diverging(Trainer):
        def fit(self, progress=None):
            if self.config.schedule.options == {"n_loops": 1}:
                tried.append(self.config.seed)
                raise TrainingDiverged("too fast")
            return super().fit(progress)

    monkeypatch.setattr(fan, "Trainer", Diverging)
    for _ in range(2):
        assert run({"parity": PARITY}, ("single", "looped"), (0,), tmp_path, 60, "") == 0
    assert tried == [0]
    assert "too fast" in (tmp_path / "parity" / "single" / "seed-0" / FAILURE).read_text()
    assert list(json.loads((tmp_path / "parity" / "results.json").read_text())) == ["looped"]


def found(exact, by_rule):
    """What :func:`benchmarks.length.report.measure` gives for one run, with one length and two loops."""
    rules = {"oracle": {"exact": by_rule, "accuracy": 1.0, "loops": 2.0}}
    return {"sweep": {"rows": [{"length": 5, "exact": exact, "rules": rules}]}}


def test_the_tables_show_the_mean_and_every_seed():
    results = {"looped": {"0": found([0.5, 1.0], 1.0), "1": found([0.0, 0.5], 0.5)}}
    assert mean_sweep(results["looped"])["rows"][0]["exact"] == [0.25, 0.75]
    table = rule_table(results, "oracle")
    assert (table.header, table.rows) == (["arm", "length 5"], [["looped", "75.0% (100.0, 50.0)"]])
