"""Accuracy by length and loops: against the trainer's own evaluation, and answers known beforehand."""

import dataclasses
import json

import pytest
import torch
from tiny_runs import tiny
from torch import nn

import shift.trained
from shift.build import build_model
from shift.config import ModelConfig, ScheduleConfig, TaskConfig
from shift.eval import main
from shift.length.report import write
from shift.length.sweep import SweepConfig, sweep
from shift.run.checkpoint import newest_valid
from shift.run.evaluate import evaluate
from shift.run.trainer import Trainer
from shift.tasks.parity import Parity
from shift_kernels import ShiftInputError

MODEL = ModelConfig(n_loops=3, d_model=16, n_heads=2, d_ff=32, learned_positions=False)
SCALED = dataclasses.replace(MODEL, residual_scale="1/T")


def parity(model):
    task = TaskConfig("parity", options={"max_length": 4})
    return tiny(task=task, model=model, schedule=ScheduleConfig("constant"))


PARITY = parity(MODEL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "parity"
    Trainer(PARITY, path).fit()
    return path


@pytest.mark.parametrize("config", [PARITY, parity(SCALED)], ids=["plain", "scaled by 1/T"])
@pytest.mark.parametrize(("rule", "allowed"), [("as trained", 3), ("oracle", 99)])
def test_it_finds_what_the_trainers_evaluation_finds(tmp_path, config, rule, allowed):
    run = tmp_path / "run"
    Trainer(config, run).fit()
    found = sweep(run, SweepConfig(lengths=(2, 7), samples=20))
    for row in found["rows"]:
        task = Parity(max_length=4, eval_length=row["length"])
        model = build_model(config, task)
        newest_valid(run / "checkpoints")[0].restore_weights(model)
        scores = evaluate(model, task, n_loops=allowed, n_samples=20, batch_size=8)
        own = min(row["length"], allowed)
        assert row["needed"] == row["length"]
        assert row["rules"][rule] == {**{k: scores[k] for k in ("exact", "accuracy")}, "loops": own}
        assert (row["exact"][own - 1], row["accuracy"][own - 1]) == (scores["exact"], scores["accuracy"])
    assert (found["trained_length"], found["trained_loops"], found["max_loops"]) == (4, 3, 17)


class SureAt(nn.Module):
    """Right after loop ``right`` alone; how sure, by a sample's first bit and the loop: ``sure``, else 1."""

    def __init__(self, right, sure):
        super().__init__()
        self.weight, self.right, self.sure = nn.Parameter(torch.zeros(())), right, sure

    def load_state_dict(self, state):
        pass

    def read(self, logits):
        return logits

    def states(self, tokens, n_loops, **_):
        odd = (tokens == 1).sum(1, keepdim=True) % 2
        answer = torch.where(tokens == 2, odd, 3)  # else EOS
        logits = torch.zeros(n_loops, *tokens.shape, 6)
        for t in range(1, n_loops + 1):
            given = answer if t == self.right else (answer + 1) % 6
            sure = torch.tensor([self.sure[bit].get(t, 1.0) for bit in tokens[:, 0].tolist()])
            logits[t - 1].scatter_(-1, given[..., None], sure[:, None, None].expand(*given.shape, 1))
        return logits


@pytest.mark.parametrize(("right", "sure", "score"), [(6, 6, 1.0), (6, 5, 0.0), (5, 6, 0.0)])
@pytest.mark.parametrize("rule", ["confidence", "joint confidence"])
def test_confidence_stops_where_the_answer_is_surest(run, monkeypatch, rule, right, sure, score):
    model = SureAt(right, {bit: {sure: 9.0} for bit in (0, 1)})
    monkeypatch.setattr(shift.trained, "build_model", lambda run, task: model)
    (row,) = sweep(run, SweepConfig(lengths=(5,), max_loops=8))["rows"]
    assert row["rules"][rule] == {"exact": score, "accuracy": score, "loops": sure}
    assert row["rules"]["oracle"]["exact"] == (right == 5)
    assert row["exact"] == [float(t == right) for t in range(1, 9)]


def test_joint_confidence_is_that_of_the_mean(run, monkeypatch):
    model = SureAt(6, {0: {2: 9.0}, 1: {2: 5.0, 6: 9.0}})
    monkeypatch.setattr(shift.trained, "build_model", lambda run, task: model)
    (row,) = sweep(run, SweepConfig(lengths=(5,), max_loops=8))["rows"]
    ones = row["rules"]["confidence"]["exact"]  # those that begin with 1 stop at 6
    assert 0.3 < ones < 0.7
    assert row["rules"]["confidence"]["loops"] == pytest.approx(2 + 4 * ones)
    assert row["rules"]["joint confidence"] == {"exact": 0.0, "accuracy": 0.0, "loops": 2.0}


@pytest.mark.parametrize(
    ("sure", "right", "loops"),
    [
        ({3: 9.0, 6: 5.0}, 3, 6),  # the answer of loop 3 is another one than that of loop 2: not trusted
        ({4: 9.0, 6: 5.0}, 8, 4),
        ({1: 9.0, 6: 5.0}, 8, 6),  # nothing was before loop 1
    ],
)
def test_an_answer_that_does_not_stay_is_not_trusted_however_sure(run, monkeypatch, sure, right, loops):
    model = SureAt(right, dict.fromkeys((0, 1), sure))
    monkeypatch.setattr(shift.trained, "build_model", lambda run, task: model)
    (row,) = sweep(run, SweepConfig(lengths=(5,), max_loops=8))["rows"]
    assert row["rules"]["stable confidence"]["loops"] == loops
    assert row["rules"]["confidence"]["loops"] == max(sure, key=sure.get)


def test_the_budget_is_in_proportion_to_the_length(run):
    # Trained with 3 loops on lengths up to 4: 0.75 loops a unit of length.
    rows = sweep(run, SweepConfig(lengths=(1, 4, 5, 7), samples=8))["rows"]
    assert [row["rules"]["budget"]["loops"] for row in rows] == [1, 3, 4, 6]
    assert rows[2]["rules"]["budget"]["exact"] == rows[2]["exact"][4 - 1]


def test_a_task_without_lengths_is_one_row_without_an_oracle(tmp_path):
    Trainer(tiny(), tmp_path).fit()
    found = sweep(tmp_path, SweepConfig(samples=8))
    (row,) = found["rows"]
    assert (row["length"], row["needed"], found["trained_length"]) == (None, None, None)
    assert set(row["rules"]) == {"as trained", "confidence", "joint confidence", "stable confidence"}
    assert len(row["exact"]) == found["max_loops"] == 6
    lines = write({"hop": found}, tmp_path).read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("|")][2:] == ["| all"]


def trained(path, **changes):
    Trainer(tiny(steps=1, **changes), path).fit()
    return path


def test_what_cannot_be_tried_is_refused(run, tmp_path):
    positions = ModelConfig(n_loops=2, d_model=16, n_heads=2, d_ff=32)
    learned = trained(tmp_path / "learned", task=PARITY.task, model=positions)
    hop = trained(tmp_path / "hop")
    beyond = TaskConfig("parity", options={"max_length": 4, "eval_length": 6})
    longer = trained(tmp_path / "longer", task=beyond, model=positions)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.toml").write_text("")
    for path, config, argument in [
        (learned, SweepConfig(lengths=(5,)), "learned positions"),
        (longer, SweepConfig(lengths=(7,)), "at most 6"),
        (hop, SweepConfig(lengths=(5,)), "'hop'"),
        (run, SweepConfig(lengths=(9,), max_loops=8), "'max_loops' = 8"),
        (hop, SweepConfig(max_loops=2), "'max_loops' = 2"),
        (tmp_path / "empty", SweepConfig(), "checkpoint"),
        (tmp_path, SweepConfig(), "directory of a run"),
    ]:
        with pytest.raises(ShiftInputError, match=argument):
            sweep(path, config)
    for argument, value in [("samples", 0), ("max_loops", 0), ("lengths", (3, 0))]:
        with pytest.raises(ShiftInputError, match=argument):
            SweepConfig(**{argument: value})
    assert [row["length"] for row in sweep(learned, SweepConfig(samples=4))["rows"]] == [1, 2, 3, 4]
    assert [row["length"] for row in sweep(longer, SweepConfig((2, 6), samples=4))["rows"]] == [2, 6]


def test_the_command_writes_numbers_table_and_picture(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([str(run), "--out", str(out), "--lengths", "2", "6", "--samples", "16"]) == 0
    (found,) = json.loads((out / "eval.json").read_text()).values()
    text = (out / "eval.md").read_text()
    assert "up to 3 loops on lengths up to 4" in text
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("|")][2:] == ["| 2", "| 6"]
    assert f"{100 * found['rows'][1]['rules']['oracle']['exact']:.1f}%" in text
    assert (out / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(run), str(run), "--out", str(out)]) == 2
    assert "different run directories" in capsys.readouterr().err
