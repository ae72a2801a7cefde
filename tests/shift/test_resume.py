"""A run that was killed and resumed ends with the bytes of a run that was left alone."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_runs import processes, rows, tiny

from shift.config import OptimiserConfig, ScheduleConfig, load_config
from shift.run.trainer import Progress, Trainer, TrainingInterrupted
from shift_kernels import ShiftInputError

STEPS, SWITCH = 60, 24
CONFIG = tiny(
    steps=STEPS,
    # The first look is at step 4, and every look is a hit: SCP fires at the fifth hit.
    schedule=ScheduleConfig(
        "shift", {"interval": 4, "patience": 5, "delta_1": 1e3, "delta_2": 1e3, "keep": 0.5}
    ),
    eval_every=5,
    log_every=4,
    checkpoint_every=3,
)
SAME = (
    "weights_sha256",
    "optimizer_sha256",
    "schedule_sha256",
    "metrics_sha256",
    "switch_step",
    "final_eval",
)


def run(config, run_dir):
    """Child process: resume and train to the end."""
    Trainer(config, run_dir, resume=True).fit()


def run_and_die_after(config, run_dir, step, delay):
    """Child process: resume; ``delay`` seconds after ``step`` SIGKILL, whatever is going on then."""

    def kill():
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def progress(done, _total):
        if done >= step and threading.active_count() == 1:
            threading.Thread(target=kill, daemon=True).start()

    Trainer(config, run_dir, resume=True).fit(progress)


def run_and_die_inside_a_save(config, run_dir, nth):
    """Child process: resume; SIGKILL instead of the ``nth`` wait for the disk or rename."""
    trainer = Trainer(config, run_dir, resume=True)
    calls = iter(range(1, 1000))

    def deadly(real):
        def call(*args):
            if next(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        return call

    os.fsync, os.rename = deadly(os.fsync), deadly(os.rename)
    trainer.fit()


def exit_code(target, *args):
    process = processes().Process(target=target, args=args)
    process.start()
    process.join(60)
    return process.exitcode


def result(run_dir):
    found = json.loads((run_dir / "result.json").read_text())
    return {key: found[key] for key in SAME}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that is not interrupted, in a child process like the others."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    assert exit_code(run, CONFIG, run_dir) == 0
    assert result(run_dir)["switch_step"] == SWITCH
    return run_dir


def test_twenty_kills_at_random_moments_change_nothing(undisturbed, tmp_path):
    rng = random.Random(0)
    anywhere = [rng.uniform(1, STEPS - 15) for _ in range(10)]
    around_the_switch = [rng.uniform(SWITCH - 2, SWITCH + 2) for _ in range(10)]
    for step in sorted(anywhere + around_the_switch):
        code = exit_code(run_and_die_after, CONFIG, tmp_path, int(step), rng.uniform(0, 0.01))
        assert code == -signal.SIGKILL
    assert exit_code(run, CONFIG, tmp_path) == 0
    assert result(tmp_path) == result(undisturbed)


def test_a_kill_at_any_point_inside_a_save_changes_nothing(undisturbed, tmp_path):
    points = 11  # two row files, four files, their directory, rename, parent, rename of an old checkpoint
    for nth in range(1, points + 1):
        assert exit_code(run_and_die_inside_a_save, CONFIG, tmp_path, nth) == -signal.SIGKILL
    assert exit_code(run, CONFIG, tmp_path) == 0
    assert result(tmp_path) == result(undisturbed)
    assert all(p.name.startswith("step-") for p in (tmp_path / "checkpoints").iterdir())


def test_a_run_that_was_asked_to_stop_saves_and_goes_on_to_the_same_end(tmp_path):
    whole = Trainer(tiny(), tmp_path / "whole").fit()
    trainer = Trainer(tiny(), tmp_path / "stopped")
    with pytest.raises(TrainingInterrupted, match="step 5 of 12"):
        trainer.fit(lambda done, _: trainer.stop() if done == 4 else None)
    resumed = Trainer(tiny(), tmp_path / "stopped", resume=True)
    assert resumed.progress.step == 5
    assert {k: resumed.fit()[k] for k in SAME} == {k: whole[k] for k in SAME}


def test_a_finished_run_is_resumed_to_the_same_result(tmp_path):
    first = Trainer(tiny(), tmp_path).fit()
    (tmp_path / "result.json").unlink()  # killed just before it was written
    again = Trainer(tiny(), tmp_path, resume=True).fit()
    assert again == first


def test_a_damaged_newest_checkpoint_is_skipped_aloud(tmp_path):
    whole = Trainer(tiny(), tmp_path).fit()
    newest = tmp_path / "checkpoints" / "step-00000012"
    (newest / "model.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"damaged-step-00000012.*model\.safetensors"):
        trainer = Trainer(tiny(), tmp_path, resume=True)
    assert trainer.progress.step == 8
    assert {k: trainer.fit()[k] for k in SAME} == {k: whole[k] for k in SAME}


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    whole = Trainer(tiny(), tmp_path / "whole").fit()
    (tmp_path / "metrics.jsonl").write_text('{"of": "a run killed before its first checkpoint"}\n')
    with pytest.warns(UserWarning, match=r"before-metrics\.jsonl"):
        again = Trainer(tiny(), tmp_path, resume=True)
    assert again.fit()["metrics_sha256"] == whole["metrics_sha256"]


def test_a_config_of_the_users_own_is_set_aside(tmp_path):
    (tmp_path / "config.toml").write_text("# my notes\nsteps = 1\n")
    with pytest.warns(UserWarning, match=r"before-config\.toml"):
        Trainer(tiny(steps=1), tmp_path).fit()
    assert (tmp_path / "before-config.toml").read_text().startswith("# my notes")


def test_a_run_directory_in_use_is_not_overwritten(tmp_path):
    Trainer(tiny(steps=1), tmp_path).fit()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ShiftInputError, match="run_dir"):
        Trainer(tiny(steps=1), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_run_that_another_process_trains_is_left_alone(tmp_path):
    Trainer(tiny(), tmp_path).fit()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    other = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", other, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ShiftInputError, match="no other process"):
            Trainer(tiny(log_every=1), tmp_path, resume=True)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        assert load_config(tmp_path / "config.toml") == tiny()
        process.stdin.close()
    Trainer(tiny(), tmp_path, resume=True)


def answer_to_another_process(run_dir):
    """Child process: what it is told when it wants to resume the run."""
    try:
        Trainer(tiny(), run_dir, resume=True)
    except ShiftInputError as error:
        return str(error)
    return "go on"


def test_a_run_stays_locked_whatever_its_process_opens_and_closes(tmp_path):
    with processes().Pool(1) as other:
        first = Trainer(tiny(), tmp_path)
        with pytest.raises(TrainingInterrupted):
            first.fit(lambda done, _: first.stop() if done == 5 else None)
        second = Trainer(tiny(), tmp_path, resume=True)  # as a notebook does, which still has the first one
        first.run.close()
        for path in filter(Path.is_file, tmp_path.iterdir()):
            path.read_bytes()
        answer = other.apply(answer_to_another_process, (tmp_path,))
        assert "no other process" in answer
        assert "\n" not in answer
        second.fit()
        assert other.apply(answer_to_another_process, (tmp_path,)) == "go on"


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("optimiser.lr", {"optimiser": OptimiserConfig(warmup=4, lr=1.0)}),
        ("schedule.options.at", {"schedule": ScheduleConfig("fixed", {"at": 0.25})}),
        ("n_grad_loops", {"n_grad_loops": 1}),
        ("steps", {"steps": 13}),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_by_the_key_that_differs(tmp_path, key, changes):
    Trainer(tiny(), tmp_path).fit()
    with pytest.raises(ShiftInputError, match=re.escape(f"'{key}'")):
        Trainer(tiny(**changes), tmp_path, resume=True)


def test_what_decides_no_result_may_differ(tmp_path):
    whole = Trainer(tiny(), tmp_path).fit()
    changed = tiny(log_every=1, checkpoint_every=1, keep=5)
    assert Trainer(changed, tmp_path, resume=True).fit()["metrics_sha256"] == whole["metrics_sha256"]


def test_metrics_shorter_than_the_checkpoint_remembers_are_refused(tmp_path):
    Trainer(tiny(), tmp_path).fit()
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(ShiftInputError, match=r"metrics\.jsonl"):
        Trainer(tiny(), tmp_path, resume=True)


def test_timing_rows_stay_one_per_step_across_a_resume(tmp_path):
    trainer = Trainer(tiny(), tmp_path)
    with pytest.raises(TrainingInterrupted):
        trainer.fit(lambda done, _: trainer.stop() if done == 5 else None)
    Trainer(tiny(), tmp_path, resume=True).fit()
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timing] == [row["step"] for row in rows(tmp_path, "train")]
    assert all(a["elapsed_s"] < b["elapsed_s"] for a, b in itertools.pairwise(timing))


def test_a_finished_run_goes_on_as_one_that_was_never_to_stop_there(tmp_path):
    steps = 10  # no multiple of the intervals of evaluations, logs and checkpoints
    config = tiny(steps=steps, checkpoint_every=0)
    flops = Trainer(config, tmp_path / "resumed").fit()["flops_total"]
    longer = dataclasses.replace(config, min_flops=2 * flops)
    resumed = Trainer(longer, tmp_path / "resumed", resume=True).fit()
    whole = Trainer(longer, tmp_path / "whole").fit()
    assert [resumed[key] for key in SAME] == [whole[key] for key in SAME]
    costs = [row["flops"] for row in rows(tmp_path / "whole", "train")]
    assert costs[-2] < 2 * flops <= costs[-1]
    assert costs[steps - 1] == flops
    loops = [row["n_loops"] for row in rows(tmp_path / "whole", "train")]
    assert loops == [1] * 5 + [3] * (
        len(loops) - 5
    )  # the schedule's shares are of the steps, not of all this


@pytest.mark.parametrize("schedule", [ScheduleConfig("constant"), ScheduleConfig("fixed", {"at": 0.75})])
def test_a_run_that_is_extended_goes_on_as_if_it_had_been_planned_so(tmp_path, schedule):
    config = tiny(schedule=schedule)
    Trainer(config, tmp_path / "run").fit()
    trainer = Trainer(dataclasses.replace(config, steps=15), tmp_path / "run", resume=True, extend=True)
    with pytest.raises(TrainingInterrupted):
        trainer.fit(lambda done, _: trainer.stop() if done == 13 else None)
    assert not (tmp_path / "run" / "result.json").exists()  # it would be one of other steps
    assert json.loads((tmp_path / "run" / "before-result.json").read_text())["steps"] == 12
    longer = dataclasses.replace(config, steps=18)
    extended = Trainer(longer, tmp_path / "run", resume=True, extend=True).fit()
    if schedule.kind == "fixed":  # its fraction stays one of the steps that were planned
        longer = dataclasses.replace(longer, schedule=ScheduleConfig("fixed", {"at": 9}))
    whole = Trainer(longer, tmp_path / "whole").fit()
    for key in ("weights_sha256", "optimizer_sha256", "switch_step", "steps"):
        assert extended[key] == whole[key], key
    assert rows(tmp_path / "run", "train") == rows(tmp_path / "whole", "train")


@pytest.mark.parametrize(
    ("lr_schedule", "at", "good"), [("wsd", 8, True), ("wsd", 12, False), ("cosine", 8, False)]
)
def test_a_run_whose_rate_falls_is_extended_before_it_falls_or_not_at_all(tmp_path, lr_schedule, at, good):
    config = tiny(optimiser=OptimiserConfig(warmup=4, lr_schedule=lr_schedule))
    trainer = Trainer(config, tmp_path)
    with contextlib.suppress(TrainingInterrupted):
        trainer.fit(lambda done, _: trainer.stop() if done == at - 1 else None)
    longer = dataclasses.replace(config, steps=18)
    outcome = contextlib.nullcontext() if good else pytest.raises(ShiftInputError, match="begun to fall")
    with outcome:
        assert Trainer(longer, tmp_path, resume=True, extend=True).progress.step == at


def test_a_checkpoint_of_before_that_holds_more_is_still_read():
    assert Progress.from_state({"step": 3, "was_single": True}).step == 3
