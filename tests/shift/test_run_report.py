"""shift-report: one run's report says what its files say, finished or not."""

import json

import pytest
from tiny_runs import rows, tiny

from shift.config import ScheduleConfig
from shift.run.trainer import Trainer, TrainingInterrupted
from shift.run_report import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with a criterion, a switch and a sweep."""
    run_dir = tmp_path_factory.mktemp("runs") / "a_run"
    scp = {"interval": 2, "patience": 1, "delta_1": 1e3, "delta_2": 1e3}
    Trainer(tiny(schedule=ScheduleConfig("shift", scp), sweep_loops=(1, 2)), run_dir).fit()
    return run_dir


def test_the_report_says_what_the_files_say(finished, tmp_path, capsys):
    assert main([str(finished), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "report.md"), str(tmp_path / "report.html")]
    text = (tmp_path / "report.md").read_text()
    result = json.loads((finished / "result.json").read_text())
    last = rows(finished, "eval")[-1]
    assert text.startswith("# Run `a_run`")
    assert f"Finished: 12 steps, {result['flops_total'] / 1e6:.3g}" in text
    assert f"held-out loss {last['loss']:.4g}, {100 * last['accuracy']:.1f}% right with 3 loops" in text
    assert f"| last switch at step | {result['switch_step']} |" in text
    assert f"| tokens a second | {result['tokens_per_s']:,.0f} |" in text
    assert f"| 2 | {result['sweep']['2']['loss']:.4g} |" in text
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"curves.png", "criterion.png"}
    assert "data:image/png" in (tmp_path / "report.html").read_text()


def test_the_loops_of_a_constant_schedule_are_its_own(tmp_path):
    Trainer(tiny(schedule=ScheduleConfig("constant", {"n_loops": 1})), tmp_path / "run").fit()
    assert main([str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    assert "constant, T = 1 " in (tmp_path / "report.md").read_text()


def test_a_report_keeps_no_picture_of_another_run(finished, tmp_path):
    out = tmp_path / "out"
    assert main([str(finished), "--out", str(out)]) == 0
    (out / "figures" / "mine.png").write_bytes(b"")
    Trainer(tiny(schedule=ScheduleConfig("constant")), tmp_path / "run").fit()
    assert main([str(tmp_path / "run"), "--out", str(out), "--force"]) == 0
    assert {path.name for path in (out / "figures").iterdir()} == {"curves.png", "mine.png"}


def test_a_run_that_was_stopped_has_a_report_too(tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    with pytest.raises(TrainingInterrupted):
        trainer.fit(lambda done, _: trainer.stop() if done == 2 else None)
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "Stopped (not finished): 3 steps" in text
    assert "| tokens a second | – |" in text


def test_without_a_run_there_is_no_report(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "a run that has trained some steps" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


def test_a_report_overwrites_no_other_unless_told_to(finished, tmp_path, capsys):
    (tmp_path / "report.md").write_text("mine")
    assert main([str(finished), "--out", str(tmp_path)]) == 2
    assert "a folder without report.md" in capsys.readouterr().err
    assert (tmp_path / "report.md").read_text() == "mine"
    assert main([str(finished), "--out", str(tmp_path), "--force"]) == 0
    assert (tmp_path / "report.md").read_text().startswith("# Run `a_run`")
