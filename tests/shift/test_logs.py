"""What watches a run is told the same numbers as its files, once each, also by a run that was resumed."""

import builtins
import json
import sys
import types

import pytest
import tomli_w
import torch
from tiny_runs import rows, tiny

from shift.run import speed
from shift.run.logs import TensorBoard, WeightsAndBiases
from shift.run.speed import Pace, matmul_peak, memory_bytes
from shift.run.trainer import Trainer, TrainingInterrupted
from shift.train import main
from shift_kernels import extras


class Events:
    """What is in the event files of a TensorBoard folder: name -> {step: value}, the latest of each."""

    def __init__(self, folder):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(folder))
        found.Reload()
        self.values = {
            name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]
        }


def interrupted_and_resumed(run_dir, watcher):
    """A tiny run that was killed after it had reported more than its last checkpoint holds."""

    class Killed(Exception):
        pass

    def kill(done, _total):
        if done == 10:  # the checkpoint is of step 8, the last report of step 9
            raise Killed

    first = watcher()
    with pytest.raises(Killed):
        Trainer(tiny(), run_dir, console=first).fit(kill)
    first.close()
    second = watcher()
    Trainer(tiny(), run_dir, resume=True, console=second).fit()
    second.close()


def test_tensorboard_holds_each_reported_step_once(tmp_path):
    interrupted_and_resumed(tmp_path, lambda: TensorBoard(tmp_path))
    found = Events(tmp_path / "tensorboard").values
    train = {row["step"]: row["loss"] for row in rows(tmp_path, "train") if row["step"] % 3 == 0}
    assert [step for step, _ in found["train/loss"]] == list(train)
    assert dict(found["train/loss"]) == pytest.approx(train)
    evals = {row["step"]: row for row in rows(tmp_path, "eval")}
    assert dict(found["eval/accuracy"]) == pytest.approx({s: row["accuracy"] for s, row in evals.items()})
    assert {"train/n_loops", "train/flops", "pace/tokens_per_s", "pace/memory_bytes"} <= found.keys()
    assert any(name.startswith("eval/accuracy/") for name in found)


@pytest.fixture
def wandb(monkeypatch):
    """A fake of the package: the keywords of each init, the rows of each log, and the ends."""
    calls = types.SimpleNamespace(inits=[], rows=[], finished=0)

    class Run:
        def log(self, row):
            calls.rows.append(row)

        def finish(self):
            calls.finished += 1

    fake = types.ModuleType("wandb")
    fake.init = lambda **options: calls.inits.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return calls


def test_a_resumed_run_goes_on_with_its_run_there(tmp_path, wandb):
    interrupted_and_resumed(tmp_path, lambda: WeightsAndBiases(tiny(), tmp_path))
    first, second = wandb.inits
    assert first["id"] == second["id"] == (tmp_path / "wandb-id.txt").read_text()
    assert (first["resume"], first["config"]["batch_size"], first["name"]) == ("allow", 8, tmp_path.name)
    assert wandb.finished == 2
    told = {row["step"]: row["train/loss"] for row in wandb.rows if "train/loss" in row}
    assert told == {row["step"]: row["loss"] for row in rows(tmp_path, "train") if row["step"] % 3 == 0}


@pytest.mark.parametrize("log", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_and_no_directory(tmp_path, monkeypatch, capsys, log):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == log:
            raise ModuleNotFoundError(f"No module named {name!r}", name=log)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(extras, "_extras", lambda: {log: ("log",)})  # whatever is installed here
    assert main(["--run-dir", str(tmp_path / "run"), "--config", "demo", "--log", log]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert log in line
    assert "pip install 'shift-kernels[log]'" in line
    assert not (tmp_path / "run").exists()


def test_the_command_tells_all_that_it_is_asked_to(tmp_path, wandb):
    config = tmp_path / "tiny.toml"
    config.write_text(tomli_w.dumps(tiny(steps=3).to_dict()))
    run = ["--run-dir", str(tmp_path / "run"), "--config", str(config), "--log", "tensorboard", "wandb"]
    assert main(run) == 0
    assert (tmp_path / "run" / "tensorboard").is_dir()
    assert wandb.finished == len(wandb.inits) == 1


# --- pace -------------------------------------------------------------------------------------------------


def test_a_pace_is_of_all_its_steps():
    timing = [{"ms": 10.0, "tokens": 100, "memory_bytes": 7}, {"ms": 30.0, "tokens": 100, "memory_bytes": 9}]
    assert Pace.of(timing, flops=4e9, peak=1e12) == Pace(20.0, 5000.0, 0.1, 9)
    assert Pace.of(timing, flops=4e9, peak=None).flops_share is None


def test_the_peak_is_measured_where_it_can_be(monkeypatch):
    matmul_peak.cache_clear()
    assert matmul_peak(torch.device("cpu"), False) > 1e8
    assert matmul_peak(torch.device("meta"), False) is None
    monkeypatch.setattr(speed, "_matmul_seconds", lambda a, b: 1e-3 * (1 + b.element_size()))
    matmul_peak.cache_clear()
    assert matmul_peak(torch.device("cpu"), True) == pytest.approx(2 * 512**3 / 3e-3)
    matmul_peak.cache_clear()


def test_a_result_has_the_pace_of_the_whole_run_and_the_sweep(tmp_path, monkeypatch):
    result = Trainer(tiny(sweep_loops=(1, 5, 1)), tmp_path).fit()
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    seconds = sum(row["ms"] for row in timing) / 1e3
    assert result["tokens_per_s"] == pytest.approx(12 * 8 * 6 / seconds)
    assert result["flops_share"] == pytest.approx(
        result["flops_total"] / seconds / result["peak_flops_per_s"]
    )
    assert 2**20 < result["memory_bytes"] <= memory_bytes(torch.device("cpu"))
    assert list(result["sweep"]) == ["1", "5"]
    assert result["sweep"]["1"]["loss"] != result["sweep"]["5"]["loss"]
    assert "sweep" not in Trainer(tiny(steps=1), tmp_path / "without").fit()


def test_an_interrupted_run_is_not_summed_over_steps_it_has_no_times_of(tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    with pytest.raises(TrainingInterrupted):
        trainer.fit(lambda done, _: trainer.stop() if done == 5 else None)
    (tmp_path / "timing.jsonl").write_bytes(b"")
    with pytest.warns(UserWarning, match="lost rows"):
        trainer = Trainer(tiny(), tmp_path, resume=True)
    assert trainer.fit()["flops_share"] is None
