"""The landscape study: its runs, the rule that decides its claims, its report."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from tiny_runs import tiny

from benchmarks.landscape import report, study
from benchmarks.landscape.claims import CLAIMS, FAILS, HOLDS, UNDECIDED, Claim, judge
from benchmarks.landscape.seen import read_seed, two_phases
from shift.config import LandscapeConfig, ModelConfig, TaskConfig
from shift.landscape.survey import SurveyConfig
from shift.report.style import STYLE
from shift.run.trainer import Trainer

TOY = tiny(
    task=TaskConfig("markov", options={"vocab": 4, "length": 6}),
    model=ModelConfig(n_loops=3, d_model=4, n_heads=2, d_ff=0, injection="none"),
    landscape=LandscapeConfig(every=4, burst=3),
    steps=16,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """One seed of the toy alone, tiny."""
    work = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(study.SWITCHES, "markov", (4, 8))
        look = SurveyConfig(
            points=2, samples=4, leading=2, lanczos_steps=6, lanczos_vectors=1, heights=(0.1,)
        )
        patch.setitem(study.SURVEYS, "markov", look)
        for arm in study.arms_of("markov"):
            path = study.run_dir(work, "markov", arm, 0)
            Trainer(study.config_of(TOY, arm, 0), path).fit()
            if arm in study.ARMS:
                study.look(path)
        yield work


def losses(work, arm):
    rows = (study.run_dir(work, "markov", arm, 0) / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, rows) if row["kind"] == "train"]


def test_a_fixed_switch_leaves_from_the_weights_where_singles_cosine_was_taken(work):
    single, switched = losses(work, "single"), losses(work, "fixed:8")
    assert single[:8] == switched[:8]
    assert single[8:] != switched[8:]


def claim(**changes):
    return dataclasses.replace(Claim("", "", "", lambda seen: None), **changes)


@pytest.mark.parametrize(
    ("changes", "values", "outcome"),
    [
        ({}, [1.0, 1.1, 0.9, 1.0, 1.0], HOLDS),
        ({}, [-1.0, -1.1, -0.9, -1.0, -1.0], FAILS),
        ({}, [-1.0, 1.1, 0.9, -1.0, 1.0], UNDECIDED),
        ({"side": "below"}, [1.0, 1.1, 0.9, 1.0, 1.0], FAILS),
        ({"bound": 2.0, "log": True}, list(np.log([2.5, 2.6, 2.4, 2.5])), HOLDS),
        ({"bound": 2.0, "log": True}, list(np.log([1.5, 1.6, 1.4, 1.5])), FAILS),
        ({}, [1.0, 1.0, 1.0, None], UNDECIDED),
        ({}, [None] * 5, UNDECIDED),
        ({}, [True] * 5, HOLDS),
        ({}, [False] * 5, FAILS),
        ({}, [True] * 4 + [False], UNDECIDED),
    ],
)
def test_the_rule_decides_as_it_is_stated(changes, values, outcome):
    assert judge(claim(**changes), values).outcome == outcome


def test_a_log_is_shown_as_what_it_is_the_log_of():
    found = judge(claim(bound=1.0, log=True), list(np.log([2.0, 2.0, 4.0, 4.0])))
    assert found.estimate == pytest.approx(8**0.5)
    assert found.low < found.estimate < found.high


X = np.linspace(0, 1, 61)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (1 - np.exp(-6 * X), False),
        (X, False),
        (np.full(61, 0.5), False),
        (0.4 * np.minimum(X / 0.2, 1) + 0.4 * np.clip((X - 0.7) / 0.2, 0, 1), True),
        (0.4 * np.minimum(X / 0.2, 1) + 0.05 * np.maximum(X - 0.7, 0), False),
    ],
)
def test_two_phases_need_a_rise_a_lull_and_a_rise(curve, expected):
    assert two_phases(curve) is expected


def test_the_report_has_a_verdict_on_every_claim(work, tmp_path, monkeypatch):
    # Most of the time would go into pixels.
    monkeypatch.setitem(STYLE, "figure.dpi", 20)
    monkeypatch.setattr(report, "plane", functools.partial(report.plane, grid=3))
    seen = read_seed(work, "markov", 0)
    markdown, page = report.write_study_report({"markov": [seen] * 4}, work, tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert [c["prediction"] for c in found["claims"]] == [c.prediction for c in CLAIMS]
    text = markdown.read_text()
    for c in found["claims"]:
        assert f"{c['prediction']} |" in text
    assert page.read_text().count("data:image/png") == 7
