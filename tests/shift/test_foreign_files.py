"""Anybody may have written a run directory: nothing in it leads outside, hangs, or ends in a traceback."""

import hashlib
import json
import math
import os
import shutil

import pytest
from tiny_runs import tiny

from shift.reading import parse_json
from shift.run import checkpoint
from shift.run.checkpoint import DamagedCheckpoint
from shift.run.record import read_run
from shift.run.trainer import Trainer
from shift.train import main
from shift_kernels import ShiftInputError

NEWEST = "step-00000012"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with checkpoints of steps 8 and 12."""
    path = tmp_path_factory.mktemp("finished") / "run"
    Trainer(tiny(), path).fit()
    return path


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of it that a test may ruin."""
    return shutil.copytree(finished, tmp_path / "run")


def forge(run_dir, name, data):
    """Change a file of the newest checkpoint and make its manifest agree."""
    path = run_dir / "checkpoints" / NEWEST
    (path / name).write_bytes(data)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


def state_with(run_dir, **changes):
    state = json.loads((run_dir / "checkpoints" / NEWEST / "state.json").read_text())
    return json.dumps(state | changes).encode()


FOREIGN_STATES = {
    "a file outside": {"lengths": {"metrics.jsonl": 0, "timing.jsonl": 0, "../victim": 0}},
    "an absolute path": {"lengths": {"metrics.jsonl": 0, "timing.jsonl": 0, "/tmp/victim": 0}},
    "the config as a row file": {"lengths": {"metrics.jsonl": 0, "timing.jsonl": 0, "config.toml": 0}},
    "a length below 0": {"lengths": {"metrics.jsonl": -1, "timing.jsonl": 0}},
    "a length that is a bool": {"lengths": {"metrics.jsonl": True, "timing.jsonl": 0}},
    "no lengths": {"lengths": {}},
    "lengths as a list": {"lengths": ["metrics.jsonl"]},
    "another step": {"step": 11},
    "progress as a number": {"progress": 3},
    "no progress": {"progress": {}},
    "a schedule state of another kind": {"signals": ["a", None]},
    "signals of three": {"signals": [1.0, 2.0, 3.0]},
    "generators that are none": {"generators": {"cpu": "AAAA"}},
    "a config of nobody": {"config": {"no_such_key": 1}},
    "a world size in words": {"world_size": "one"},
    "digests of other files": {"sha256": {"/etc/passwd": ""}},
}


@pytest.mark.parametrize("changes", FOREIGN_STATES.values(), ids=FOREIGN_STATES)
def test_a_foreign_state_is_damage_and_the_older_checkpoint_is_taken(run_dir, changes):
    victim = run_dir.parent / "victim"
    victim.write_text("precious")
    forge(run_dir, "state.json", state_with(run_dir, **changes))
    with pytest.warns(UserWarning, match=f"damaged-{NEWEST}"):
        assert Trainer(tiny(), run_dir, resume=True).progress.step == 8
    assert victim.read_text() == "precious"


FOREIGN_CONTENT = {
    "empty": b"",
    "deep": b"[" * 100_000,
    "nested": b'{"a": ' * 60 + b"1" + b"}" * 60,
    "twins": b'{"step": 1, "step": 2}',
    "huge": b"9" * 5000,
    "utf-16": b"\xff\xfe{}",
    "null": b"null",
}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("data", FOREIGN_CONTENT.values(), ids=FOREIGN_CONTENT)
def test_foreign_content_under_a_good_manifest_is_damage(run_dir, name, data):
    forge(run_dir, name, data)
    with pytest.warns(UserWarning, match=f"damaged-{NEWEST}"):
        assert Trainer(tiny(), run_dir, resume=True).progress.step == 8


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "link outside"])
def test_what_is_no_file_of_the_checkpoint_is_damage_and_never_waited_for(run_dir, name, kind):
    path = run_dir / "checkpoints" / NEWEST / name
    outside = run_dir.parent / name
    path.rename(outside)
    make = {
        "fifo": os.mkfifo,
        "device": lambda p: p.symlink_to("/dev/zero"),
        "directory": os.mkdir,
        "link outside": lambda p: p.symlink_to(outside),
    }
    make[kind](path)
    with pytest.raises(DamagedCheckpoint, match=name):
        checkpoint.read(path.parent)


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_rows_are_never_cut_through_a_link(run_dir, name):
    outside = run_dir.parent / "victim"
    (run_dir / name).rename(outside)
    (run_dir / name).symlink_to(outside)
    before = outside.read_bytes() + b"more\n"
    outside.write_bytes(before)
    code = main(["--run-dir", str(run_dir), "--resume", "auto"])
    assert code == (2 if name == "metrics.jsonl" else 0)
    assert outside.read_bytes() == before


def test_a_run_goes_on_without_its_clocks(run_dir):
    for damage in (lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:100])):
        damage(run_dir / "timing.jsonl")
        with pytest.warns(UserWarning, match="lost rows"):
            Trainer(tiny(), run_dir, resume=True).fit()


def test_metrics_that_were_changed_before_the_checkpoint_are_refused(run_dir):
    path = run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step": 1,', b'"step": 7,', 1))
    before = path.read_bytes()
    with pytest.raises(ShiftInputError, match=r"metrics\.jsonl.*those of the checkpoint"):
        Trainer(tiny(), run_dir, resume=True)
    assert path.read_bytes() == before


def test_a_checkpoint_without_digests_is_still_read(run_dir):
    state = json.loads(state_with(run_dir))
    del state["sha256"]
    forge(run_dir, "state.json", json.dumps(state).encode())
    assert Trainer(tiny(), run_dir, resume=True).progress.step == 12


def test_without_a_usable_checkpoint_old_rows_are_renamed_and_said(run_dir, capsys):
    rows = (run_dir / "metrics.jsonl").read_bytes()
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "result.json").unlink()  # as if it had been killed before its first checkpoint
    with pytest.warns(UserWarning, match=r"starting at step 0.*before-metrics\.jsonl"):
        Trainer(tiny(), run_dir, resume=True)
    assert (run_dir / "before-metrics.jsonl").read_bytes() == rows


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ("damaged", r"step-00000012/model\.safetensors.*step-00000008/model\.safetensors"),
        ("set aside", r"damaged-step-00000008.*damaged-step-00000012"),
        ("the result", r"result\.json"),
    ],
)
def test_a_run_whose_checkpoints_are_all_lost_is_not_started_over(run_dir, left, said):
    checkpoints = run_dir / "checkpoints"
    for name in ("step-00000008", NEWEST):
        if left == "damaged":
            (checkpoints / name / "model.safetensors").write_bytes(b"damaged")
        elif left == "set aside":
            (checkpoints / name).rename(checkpoints / f"damaged-{name}")
        else:
            shutil.rmtree(checkpoints / name)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(ShiftInputError, match=f"found: .*{said}"):
        Trainer(tiny(), run_dir, resume=True)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.toml", b"steps = [[[[["),
        ("config.toml", b"a = " + b"[" * 5000),
        ("config.toml", b"\xff\xfes\x00"),
        ("metrics.jsonl", b'{"kind": "eval"}\n'),
        ("metrics.jsonl", b"[" * 100_000 + b"\n"),
        ("metrics.jsonl", b'{"kind": ["eval"]}\n'),
        ("metrics.jsonl", b"NaN\n"),
        ("metrics.jsonl", b"\x80\n"),
        ("metrics.jsonl", b""),
        ("result.json", b"[]]"),
        ("result.json", b"[1]"),
        ("result.json", b'{"flops_total": "many"}'),
        ("result.json", b'{"flops_total": NaN}'),
    ],
)
def test_a_file_damaged_by_hand_is_refused_by_its_name(run_dir, name, data):
    (run_dir / name).write_bytes(data)
    with pytest.raises(ShiftInputError) as error:
        read_run(run_dir)
    assert str(run_dir) in str(error.value)
    assert "\n" not in str(error.value)


def test_files_with_a_byte_order_mark_are_read(run_dir):
    whole = read_run(run_dir)
    for name in ("config.toml", "metrics.jsonl", "result.json"):
        (run_dir / name).write_bytes(b"\xef\xbb\xbf" + (run_dir / name).read_bytes())
    assert read_run(run_dir) == whole


@pytest.mark.parametrize(
    "text", ["NaN", "[Infinity]", "1e999", '{"a": 1, "a": 2}', "[" * 51 + "]" * 51, "9" * 5000]
)
def test_json_that_others_would_read_differently_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 (the reasons differ)
        parse_json(text.encode())
    assert parse_json(b"[NaN, 1]", finite=False)[1] == 1
    assert math.isnan(parse_json(b"NaN", finite=False))


def test_a_run_directory_that_was_renamed_is_noticed_at_the_next_save(tmp_path):
    trainer = Trainer(tiny(), tmp_path / "run")
    with pytest.raises(OSError, match=r"deleted, renamed or replaced.*run/metrics"):
        trainer.fit(lambda done, _: done == 5 and (tmp_path / "run").rename(tmp_path / "elsewhere"))
    assert trainer.progress.step == 8
    assert not (tmp_path / "run").exists()


def test_stray_paths_do_not_block_a_save_and_are_not_deleted(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in (".tmp-x", "step-00000004", "step-99999999999999999999", ".tmp-step-00000008"):
        (folder / name).write_text("stray")
    (folder / "step-00000008").mkdir()
    (tmp_path / "run" / ".tmp-result.json").mkdir()
    Trainer(tiny(), tmp_path / "run").fit()
    assert [step for step, _ in checkpoint.checkpoints(folder)] == [8, 12]
    assert (folder / ".tmp-x").read_text() == (folder / "other-step-00000004").read_text() == "stray"


def test_as_many_checkpoints_as_wanted_are_left_after_a_kill_too(run_dir):
    folder = run_dir / "checkpoints"
    shutil.copytree(folder / "step-00000008", folder / "step-00000004")  # killed before it was deleted
    Trainer(tiny(), run_dir, resume=True)
    assert [step for step, _ in checkpoint.checkpoints(folder)] == [8, 12]


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_where_checkpoints_belong_is_refused_before_the_first_step(resume, tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(ShiftInputError, match="checkpoints'"):
        Trainer(tiny(), tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
