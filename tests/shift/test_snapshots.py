"""What a run records of its weights, and that recording changes nothing else."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_runs import tiny

from shift.build import build_model, build_task
from shift.config import LandscapeConfig, OptimiserConfig, TrainConfig
from shift.landscape.cli import main
from shift.landscape.recording import open_recording
from shift.report.style import STYLE
from shift.run.snapshots import SNAPSHOTS, read_snapshots
from shift.run.trainer import Trainer, TrainingInterrupted
from shift_kernels import ShiftInputError

CONFIG = tiny(landscape=LandscapeConfig(every=5, burst=3))
SIZE = sum(p.numel() for p in build_model(CONFIG, build_task(CONFIG)).parameters())


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("recorded")
    trainer = Trainer(CONFIG, run_dir)
    trainer.fit()
    return run_dir, trainer


def test_bursts_of_successive_states_and_the_last_are_recorded(recorded):
    run_dir, trainer = recorded
    found = read_snapshots(run_dir, SIZE)
    assert found.steps.tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    assert [(s.start, s.stop) for s in found.bursts()] == [(0, 3), (3, 6), (6, 9)]
    np.testing.assert_array_equal(found.weights[0], flat(build_model(CONFIG, build_task(CONFIG))))
    np.testing.assert_array_equal(found.weights[-1], flat(trainer.model))
    assert not found.second_moments[0].any()
    moments = [trainer.optimizer.state[p]["exp_avg_sq"].flatten() for p in trainer.model.parameters()]
    np.testing.assert_array_equal(found.second_moments[-1], torch.cat(moments).numpy())


def test_recording_changes_neither_weights_nor_metrics(recorded, tmp_path):
    run_dir, _ = recorded
    Trainer(tiny(), tmp_path).fit()
    assert (tmp_path / "metrics.jsonl").read_bytes() == (run_dir / "metrics.jsonl").read_bytes()
    assert not (tmp_path / SNAPSHOTS).exists()


@pytest.mark.parametrize("stop_at", [1, 6, 10])
def test_a_resumed_run_records_the_same_bytes(recorded, tmp_path, stop_at):
    trainer = Trainer(CONFIG, tmp_path)
    with pytest.raises(TrainingInterrupted):
        trainer.fit(lambda done, _: trainer.stop() if done == stop_at else None)
    with open(tmp_path / SNAPSHOTS, "ab") as file:
        file.write(b"what a killed run wrote after its checkpoint")
    Trainer(CONFIG, tmp_path, resume=True).fit()
    assert (tmp_path / SNAPSHOTS).read_bytes() == (recorded[0] / SNAPSHOTS).read_bytes()


def test_recording_may_begin_in_a_resumed_run(tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    with pytest.raises(TrainingInterrupted):
        trainer.fit(lambda done, _: trainer.stop() if done == 5 else None)
    Trainer(CONFIG, tmp_path, resume=True).fit()
    assert read_snapshots(tmp_path, SIZE).steps.tolist() == [6, 7, 10, 11, 12]


def test_a_run_that_was_extended_has_each_state_once(tmp_path):
    Trainer(CONFIG, tmp_path).fit()
    Trainer(dataclasses.replace(CONFIG, steps=14), tmp_path, resume=True, extend=True).fit()
    assert read_snapshots(tmp_path, SIZE).steps.tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12, 14]


@pytest.mark.parametrize(
    ("optimiser", "ages"),
    [({}, [2, 10]), ({"keep_moments": 0.0}, [2, None]), ({"kind": "muon"}, [None, None])],
)
def test_the_age_of_adams_moments_is_known_or_said_to_be_unknown(tmp_path, optimiser, ages):
    options = OptimiserConfig(warmup=4, **optimiser)  # the switch is at step 6
    Trainer(dataclasses.replace(CONFIG, optimiser=options), tmp_path).fit()
    run = open_recording(tmp_path)
    assert [run.moments_age(step) for step in (2, 10)] == ages


def test_a_config_with_recording_survives_toml_and_refuses_nonsense():
    assert TrainConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ShiftInputError, match=r"landscape\.every"):
        dataclasses.replace(CONFIG, landscape=LandscapeConfig(every=-1))


def test_a_run_without_snapshots_or_of_another_model_is_refused(recorded, tmp_path):
    with pytest.raises(ShiftInputError, match=r"landscape\.every"):
        read_snapshots(tmp_path, SIZE)
    with pytest.raises(ShiftInputError, match="another model"):
        read_snapshots(recorded[0], SIZE + 1)


def test_the_command_surveys_a_recorded_run(recorded, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(STYLE, "figure.dpi", 20)  # most of the time would go into pixels
    run, out = str(recorded[0]), tmp_path / "landscape"
    look = "--look.points 2 --look.samples 4 --look.leading 2 --look.lanczos-steps 8 --look.lanczos-vectors 1"
    look += " --look.heights 0.1"
    assert main([run, "--out", str(out), *look.split()]) == 0
    (found,) = json.loads((out / "surveys.json").read_text()).values()
    assert len(found["points"]) == 2
    assert {p.name for p in (out / "figures").glob("*.png")} == {
        f"{name}.png" for name in ("spectrum", "plane", "cut", "signals")
    }
    assert "data:image/png" in (out / "report.html").read_text()
    assert main([run, run, "--out", str(out)]) == 2
    assert "'runs'" in capsys.readouterr().err
