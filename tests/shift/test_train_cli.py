"""The command line and its configuration: what wins, what is refused, what the exit codes mean."""

import dataclasses
import errno
import math
import os
import re
import signal
import time

import numpy as np
import pytest
import tomli_w
from tiny_runs import TINY, processes, tiny

from shift import compare, eval
from shift.build import SCHEDULE_FIELDS, build_model, build_schedule, build_task
from shift.comparison import runs as comparison_runs
from shift.config import (
    PRESETS,
    LandscapeConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TaskConfig,
    TrainConfig,
    load_config,
)
from shift.landscape import cli as landscape
from shift.landscape.survey import SurveyConfig
from shift.length.sweep import SweepConfig
from shift.reading import tomllib
from shift.run import checkpoint
from shift.run.checkpoint import checkpoints
from shift.train import main, parse
from shift_kernels import ShiftInputError
from shift_kernels.console import INTERRUPTED

PRESET_NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))


@pytest.fixture
def tiny_toml(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(TINY.to_dict()))
    return path


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text("steps = 7\nbatch_size = 3\n[optimiser]\nlr = 1\n")
    config = parse(["--run-dir", "x", "--config", str(path), "--batch-size", "5"]).train
    assert (config.steps, config.batch_size, config.eval_every) == (7, 5, TrainConfig().eval_every)
    assert config.optimiser.lr == 1.0


@pytest.mark.parametrize(("word", "value"), [("16", 16), ("1:64,4:16", "1:64,4:16"), ("auto", "auto")])
def test_a_micro_batch_is_a_number_or_a_word(word, value):
    assert parse(["--run-dir", "x", "--micro-batch", word]).train.micro_batch == value


def test_help_names_every_word_that_a_field_may_be(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    lines = re.sub(r"[│╭╰─╮╯\s]+", " ", capsys.readouterr().out)
    config = TrainConfig()
    tables = {"": config, **{f"{f.name}.": getattr(config, f.name) for f in dataclasses.fields(config)}}
    for table, part in tables.items():
        for f in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
            choices = f.metadata["rule"].choices if "rule" in f.metadata else ()
            text = lines.partition(f"--{table}{f.name}".replace("_", "-") + " STR ")[2].partition("(default")[
                0
            ]
            assert [word for word in choices if word not in re.findall(r"\w+", text)] == [], f.name


def test_options_join_those_of_the_file_until_the_kind_changes(tiny_toml):
    run = ["--run-dir", "x", "--config", str(tiny_toml)]
    assert parse([*run, "--task.options", "n_nodes=4"]).train.task.options == {"n_nodes": 4, "max_hops": 2}
    ramp = parse(
        [*run, "--schedule.kind", "linear", "--schedule.options", "a=0.5", "b=true", "c=word", "d=[1,2]"]
    )
    assert ramp.train.schedule.options == {"a": 0.5, "b": True, "c": "word", "d": [1, 2]}
    assert parse([*run, "--schedule.kind", "constant"]).train.schedule.options == {}


def test_a_config_survives_toml(tiny_toml):
    assert load_config(tiny_toml) == TINY
    assert TrainConfig.from_dict(tiny(n_grad_loops=2).to_dict()).n_grad_loops == 2


@pytest.mark.parametrize(
    ("text", "argument", "allowed"),
    [
        ("step = 3", "'step' = 3", "steps, min_flops"),
        ("[model]\nd_modle = 3", "'model.d_modle' = 3", "model.d_model"),
        ("steps = 3.5", "'steps' = 3.5", "a value of type int"),
        ("steps = true", "'steps' = True", "a value of type int"),
        ("model = 3", "'model' = 3", "table"),
        ("n_grad_loops = 'all'", "'n_grad_loops' = 'all'", "a value of type int"),
        ("[optimiser]\nbetas = [0.9]", "'optimiser.betas' = [0.9]", "tuple"),
        ("[task.options.a]\nb = 1", "'task.options.a' = {'b': 1}", "a number, bool, string or list"),
        ("steps = ", "'config'", "a TOML file"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_what_is_allowed(tmp_path, text, argument, allowed):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ShiftInputError) as error:
        load_config(path)
    for part in (path.name, argument, allowed):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"steps": 0}, "steps"),
        ({"log_every": 0}, "log_every"),
        ({"keep": 0}, "keep"),
        ({"precision": "fp16"}, "precision"),
        ({"optimiser": {"lr_schedule": "linear"}}, "optimiser.lr_schedule"),
        ({"min_flops": -1}, "min_flops"),
        ({"min_flops": 1, "optimiser": {"lr_schedule": "cosine"}}, "min_flops"),
        ({"min_flops": 1, "landscape": {"every": 50}}, "min_flops"),
        ({"optimiser": {"lr": 0.0}}, "optimiser.lr"),
        ({"optimiser": {"clip": float("nan")}}, "optimiser.clip"),
        ({"optimiser": {"warmup": -1}}, "optimiser.warmup"),
        ({"optimiser": {"betas": [0.9, 1.0]}}, "optimiser.betas"),
        ({"optimiser": {"weight_decay": -0.1}}, "optimiser.weight_decay"),
        ({"n_grad_loops": 0}, "n_grad_loops"),
        ({"model": {"n_loops": 0}}, "model.n_loops"),
        ({"micro_batch": "1:8,1:2"}, "micro_batch"),
        ({"model": 3}, "model"),
    ],
)
def test_a_value_that_cannot_be_is_refused(changes, argument):
    with pytest.raises(ShiftInputError, match=f"'{argument}'"):
        TrainConfig.from_dict(changes)


@pytest.mark.parametrize(
    ("table", "name", "field"),
    [
        ("task", "seed", "task.seed"),
        ("task", "name", "task.name"),
        *(("schedule", name, field) for name, field in SCHEDULE_FIELDS.items()),
    ],
)
def test_a_field_of_the_config_is_no_option(table, name, field):
    config = TrainConfig.from_dict({table: {"options": {name: 3}}})
    with pytest.raises(ShiftInputError, match=rf"{table}\.options\.{name}.*{field}"):
        build_task(config) if table == "task" else build_schedule(config)


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (TrainConfig, "steps", "5"),
        (TrainConfig, "steps", True),
        (TrainConfig, "steps", None),
        (TrainConfig, "steps", 10**400),
        (TrainConfig, "seed", -1),
        (TrainConfig, "seed", 2**64),
        (TrainConfig, "batch_size", np.float64(2)),
        (TrainConfig, "device", "meta"),
        (TrainConfig, "device", "mps"),
        (TrainConfig, "device", "cuda:-1"),
        (TrainConfig, "precision", None),
        (TrainConfig, "backend", 3),
        (TrainConfig, "n_grad_loops", 2**70),
        (TrainConfig, "model", None),
        (TaskConfig, "seed", 1.0),
        (TaskConfig, "options", None),
        (TaskConfig, "options", {1: 2}),
        (TaskConfig, "options", {"a": [[1]]}),
        (ModelConfig, "d_model", 2**70),
        (ModelConfig, "d_model", 62),  # no multiple of n_heads
        (ModelConfig, "n_loops", 2**31),
        (ModelConfig, "norm", "batchnorm"),
        (ModelConfig, "loop_norm", 1),
        (OptimiserConfig, "lr", math.inf),
        (OptimiserConfig, "lr", math.nan),
        (OptimiserConfig, "lr", 10**400),
        (OptimiserConfig, "betas", None),
        (OptimiserConfig, "betas", (0.9, "0.99")),
        (OptimiserConfig, "betas", (0.9, math.nan)),
        (OptimiserConfig, "weight_decay", True),
        (ScheduleConfig, "kind", 1),
        (LandscapeConfig, "burst", 0),
        (SweepConfig, "lengths", (2, 0)),
        (SweepConfig, "max_loops", 1.5),
        (SurveyConfig, "heights", (0.1, -1.0)),
        (SurveyConfig, "rule", "widest"),
    ],
)
def test_every_field_of_a_config_is_checked_by_type_and_range(config, name, value):
    with pytest.raises(ShiftInputError, match=r"argument '.*is not supported; allowed: "):
        config(**{name: value})


def test_numbers_of_numpy_become_pythons():
    config = TrainConfig(
        steps=np.int64(5),
        optimiser=OptimiserConfig(lr=np.float32(0.5), betas=[0, np.float64(0.5)]),
        task=TaskConfig(options={"a": np.int32(1), "b": (1, np.bool_(True))}),
    )
    found = [config.steps, config.optimiser.lr, *config.optimiser.betas, *config.task.options["b"]]
    assert [(value, type(value)) for value in found] == [
        (5, int), (0.5, float), (0.0, float), (0.5, float), (1, int), (True, bool)
    ]  # fmt: skip
    assert tomllib.loads(tomli_w.dumps(config.to_dict()))["task"]["options"] == {"a": 1, "b": [1, True]}


def test_flags_are_checked_as_fields_are(tmp_path, capsys):
    for flag, value in (("--optimiser.lr", "inf"), ("--seed", "-1"), ("--device", "meta")):
        try:
            code = main(["--run-dir", str(tmp_path / "run"), flag, value])
        except SystemExit as end:  # as argparse ends on a flag it can't use
            code = end.code
        assert code == 2
        assert f"'{flag.removeprefix('--')}' = " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("encoding", "code"), [("utf-8-sig", 0), ("utf-8", 0), ("utf-16", 2), ("latin-1", 2)]
)
def test_a_config_is_utf_8_with_or_without_a_mark(tmp_path, encoding, code, capsys):
    path = tmp_path / "some.toml"
    path.write_text("# Größe\n" + tomli_w.dumps(tiny(steps=1).to_dict()), encoding=encoding)
    assert main(["--run-dir", str(tmp_path / "run"), "--config", str(path)]) == code
    assert code == 0 or "save it as UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_here_is_unusable_input(tiny_toml, tmp_path, device, capsys):
    run = ["--run-dir", str(tmp_path / "run"), "--config", str(tiny_toml), "--device", device]
    assert main(run) == 2
    assert f"'device' = '{device}'" in capsys.readouterr().err


def test_a_start_that_was_refused_does_not_take_the_directory(tiny_toml, tmp_path):
    run = ["--run-dir", str(tmp_path / "run"), "--config", str(tiny_toml)]
    assert main([*run, "--backend", "nosuch"]) == 2
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main([*run, "--backend", "nosuch"]) == 2
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert main([*run, "--steps", "1"]) == 0
    assert main([*run, "--steps", "1"]) == 2


@pytest.mark.parametrize("below", ["", "below"])
@pytest.mark.parametrize(
    ("command", "argument"),
    [
        ((main, "--config", "demo", "--run-dir"), "run_dir"),
        ((main, "--config", "demo", "--resume", "auto", "--run-dir"), "run_dir"),
        ((compare.main, "--preset", "demo", "--out"), "out"),
        ((eval.main, "runs/first", "--out"), "out"),
        ((landscape.main, "runs/first", "--out"), "out"),
    ],
    ids=["train", "resume", "compare", "eval", "landscape"],
)
def test_a_file_where_a_directory_should_be_is_unusable_input(tmp_path, capsys, command, argument, below):
    (tmp_path / "file").write_bytes(b"")
    main_of, *arguments = command
    assert main_of([*arguments, str(tmp_path / "file" / below)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"'{argument}' = '{tmp_path / 'file' / below}'" in line


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_a_run_with_one_line(tiny_toml, tmp_path, capsys, monkeypatch):
    run = ["--run-dir", str(tmp_path / "run"), "--config", str(tiny_toml)]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_synced", full)
        assert main(run) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("shift-train: [Errno 28] No space left on device")
    assert main([*run, "--resume", "auto"]) == 0


def test_a_full_disk_ends_a_comparison_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison_runs, "train_all", full)
    assert compare.main(["--preset", "demo", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "shift-compare: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset_describes_a_model_that_runs_on_its_task(name):
    config = load_config(name)
    task, schedule = build_task(config), build_schedule(config)
    model = build_model(config, task)
    batch = task.batch(2, 0)
    assert schedule.step(0, None).n_loops >= 1
    assert model(batch.tokens, 1, context=batch.context).shape == (*batch.tokens.shape, task.n_classes)
    if batch.n_loops is not None:
        assert task.batch(256, 0).n_loops.max() <= config.model.n_loops


def test_a_preset_that_is_not_there_is_answered_with_those_that_are(capsys):
    assert main(["--run-dir", "x", "--config", "dmo"]) == 2
    assert "demo" in capsys.readouterr().err


def test_a_run_writes_its_resolved_config_and_resumes_by_it(tmp_path, tiny_toml, capsys):
    run_dir = str(tmp_path / "run")
    assert main(["--run-dir", run_dir, "--config", str(tiny_toml), "--steps", "5"]) == 0
    assert load_config(tmp_path / "run" / "config.toml") == dataclasses.replace(TINY, steps=5)
    assert main(["--run-dir", run_dir, "--config", str(tiny_toml), "--steps", "5"]) == 2  # in use
    assert main(["--run-dir", run_dir, "--resume", "auto", "--batch-size", "6"]) == 2  # another config
    capsys.readouterr()
    assert main(["--run-dir", run_dir, "--resume", "auto"]) == 0
    assert f"{run_dir}: finished at step 5" in capsys.readouterr().err
    assert main(["--run-dir", run_dir, "--resume", "auto", "--steps", "4"]) == 2  # fewer than are done
    assert main(["--run-dir", run_dir, "--resume", "auto", "--steps", "7"]) == 0
    assert load_config(tmp_path / "run" / "config.toml").steps == 7


def test_a_log_that_is_no_terminal_gets_a_line_per_report(tmp_path, tiny_toml, capsys):
    assert main(["--run-dir", str(tmp_path / "run"), "--config", str(tiny_toml)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("step")] == [
        ["step", f"{step}/12"] for step in (3, 6, 9, 12)
    ]
    assert [line.split()[:2] for line in lines if line.startswith("eval")] == [
        ["eval", f"{step}/12"] for step in (0, 4, 8, 12)
    ]
    for word in ("loss", "lr", "grad", "T 3 stage 2", "ms", "tok/s", "eta"):
        assert word in lines[-2]


def train(*argv):
    raise SystemExit(main(argv))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_a_checkpoint_and_the_code_for_start_me_again(tmp_path, tiny_toml, number):
    arguments = ("--run-dir", str(tmp_path / "run"), "--config", str(tiny_toml), "--steps", "100000")
    child = processes().Process(target=train, args=arguments)
    child.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == INTERRUPTED
    saved = checkpoints(tmp_path / "run" / "checkpoints")
    assert saved[-1][0] == len((tmp_path / "run" / "timing.jsonl").read_text().splitlines())
