"""``auto`` by measurement: the table, what it decides, and how it is filled."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import fake_backends
import pytest
import torch
from fake_backends import FAKES

from shift_kernels import BlockSpec, LoopedBlock, ShiftInputError, backends, dispatch, explain, measured
from shift_kernels.api import looped_block
from shift_kernels.backends.base import LOOPED_BLOCK
from shift_kernels.calibrate import calibrate
from shift_kernels.call import Problem
from shift_kernels.measured import CRASHED, TIMED_OUT, UNCHECKED, VERIFIED, WRONG, Verdict
from shift_kernels.trial import trial

fake_backends.forget_them()  # until a test wants them
SPEC = BlockSpec(d_model=16, n_heads=2, d_ff=16)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def problem(device=CPU, **changes):
    sizes = dict(batch=3, seq_len=5, dtype=torch.float32, compute_dtype=torch.float32, grad=True, n_loops=2)
    return Problem(SPEC, device=device, **{**sizes, **changes})


def right(ms):
    return Verdict(VERIFIED, "", 1.0, ms, 0.0)


@pytest.fixture(autouse=True)
def fakes(monkeypatch, tmp_path):
    """An empty cache folder, a device name of our own, and the fake backends."""
    monkeypatch.setenv("SHIFT_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "device_name", lambda device: f"Fake {device.type}")
    for fake in FAKES:
        LOOPED_BLOCK.register(fake)
    dispatch.forget()
    yield
    fake_backends.forget_them()
    dispatch.forget()
    measured.kernels_hash.cache_clear()


def test_without_a_row_nothing_unverified_is_taken():
    assert dispatch.plan(problem()).backend in ("cpu", "torch")
    assert dispatch.plan(problem(CUDA)).backend == "torch"


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_auto_takes_the_fastest_that_was_verified(device):
    row = {"torch": right(3.0), "fake_slow": right(9.0), "fake_fast": right(1.0)}
    row["fake_wrong"] = Verdict(WRONG, "h is off", 7.0)
    measured.record(problem(device), row)
    dispatch.forget()
    assert dispatch.plan(problem(device)).backend == "fake_fast"


def test_a_plan_follows_the_number_of_threads():
    measured.record(problem(), {"fake_fast": right(1.0)})
    dispatch.forget()
    before = torch.get_num_threads()
    assert dispatch.plan(problem()).backend == "fake_fast"
    try:
        torch.set_num_threads(before + 1)
        assert dispatch.plan(problem()).backend != "fake_fast"
    finally:
        torch.set_num_threads(before)
    assert dispatch.plan(problem()).backend == "fake_fast"


def test_auto_takes_pytorch_where_it_was_faster():
    measured.record(problem(), {"torch": right(1.0), "cpu": right(2.0)})
    dispatch.forget()
    assert dispatch.plan(problem()).backend == "torch"
    assert "1 ms" in explain(SPEC, 3, 5, n_loops=2)


@pytest.mark.parametrize("changed", [{"grad": False}, {"batch": 9}, {"seq_len": 9}, {"n_loops": 5}])
def test_a_row_holds_for_its_shape_class_alone(changed):
    measured.record(problem(), {"fake_fast": right(1.0)})
    dispatch.forget()
    assert dispatch.plan(problem(batch=4, seq_len=8)).backend == "fake_fast"  # the same powers of two
    assert dispatch.plan(problem(**changed)).backend != "fake_fast"


@pytest.mark.parametrize("fact", ["device", "driver", "torch", "triton", "kernels"])
def test_a_table_of_another_identity_is_not_used(fact, monkeypatch):
    measured.record(problem(), {"fake_fast": right(1.0)})
    other = {**measured.identity(CPU), fact: "another"}
    monkeypatch.setattr(measured, "identity", lambda device: other)
    dispatch.forget()
    assert dispatch.plan(problem()).backend != "fake_fast"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """What an install has of shift_kernels: its sources, a library, and the note beside that."""
    (tmp_path / "tuned.json").write_text("{}")
    (tmp_path / "kernel.py").write_text("x = 1")
    (tmp_path / "_native.sources.txt").write_text("some sources")
    (tmp_path / "_native.so").write_text("bytes of one machine's build")
    monkeypatch.setattr(measured, "HERE", tmp_path)
    return tmp_path


def own_hash():
    measured.kernels_hash.cache_clear()
    return measured.kernels_hash()


@pytest.mark.parametrize("changed", ["tuned.json", "kernel.py", "_native.sources.txt"])
def test_other_sources_are_other_kernels(package, changed):
    before = own_hash()
    (package / changed).write_text("changed")
    assert own_hash() != before


def test_another_build_of_the_same_sources_is_the_same_kernels(package):
    before = own_hash()
    (package / "_native.so").write_text("bytes of another machine's build")
    (package / "_native_cuda.sources.txt").write_text("some sources")  # there was an nvcc
    assert own_hash() == before


def test_a_measured_backend_that_is_gone_is_passed_over():
    measured.record(problem(), {"no_longer_there": right(0.1), "fake_fast": right(1.0)})
    dispatch.forget()
    assert dispatch.plan(problem()).backend == "fake_fast"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"rows": 1}', '{"rows": {"a": {"b": {"c": 1}}}}', "[" * 5000]
)
def test_a_damaged_table_is_said_and_not_used(text):
    path = measured.record(problem(), {"fake_fast": right(1.0)})
    path.write_text(text)
    dispatch.forget()
    with pytest.warns(UserWarning, match="damaged"):
        assert dispatch.plan(problem()).backend != "fake_fast"


def test_rows_of_processes_that_write_at_once_are_all_kept():
    script = (
        "import sys, torch; from test_measured import problem, right; from shift_kernels import measured\n"
        "measured.device_name = lambda device: f'Fake {device.type}'\n"
        "for i in range(8):\n"
        "    measured.record(problem(seq_len=2 ** (8 * int(sys.argv[1]) + i)), {'torch': right(1.0)})"
    )
    path = [p for p in sys.path if p]
    code = (
        f"import sys; sys.path[:0] = {[*path, str(__import__('pathlib').Path(__file__).parent)]!r}\n{script}"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(i)]) for i in range(2)]
    assert [w.wait() for w in writers] == [0, 0]
    table = json.loads(measured.table_path(CPU).read_text())
    assert len(table["rows"]) == 16


def test_ranks_take_the_rows_that_rank_0_measured():
    measured.record(problem(), {"fake_slow": right(1.0)})
    measured.adopt({measured.shape_class(problem()): {"fake_fast": right(1.0)}})
    dispatch.forget()
    try:
        assert dispatch.plan(problem()).backend == "fake_fast"
    finally:
        measured.drop_adopted()


@pytest.mark.parametrize("halting", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_right_backend_is_verified_and_timed(grad, halting):
    found = trial(problem(grad=grad and not halting, halting=halting), "fake_fast")
    assert found.outcome == VERIFIED
    assert found.ms > 0
    assert found.worst_error <= 2


@pytest.mark.skipif(backends()["cpu"] != "available", reason="needs the cpu backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_kernels_are_verified(dtype):
    """Over a thousand rows, whose sums come in another order than PyTorch's."""
    spec = BlockSpec(d_model=64, n_heads=4)
    sizes = dict(batch=32, seq_len=32, n_loops=4, dtype=dtype, compute_dtype=dtype)
    found = trial(dataclasses.replace(problem(**sizes), spec=spec), "cpu")
    assert found.outcome == VERIFIED, found


def test_a_backend_that_is_a_little_off_is_wrong():
    found = trial(problem(), "fake_wrong")
    assert found.outcome == WRONG
    assert "h is off by" in found.why


def test_candidates_that_crash_or_hang_are_marked_and_this_process_goes_on(monkeypatch):
    told, rows = [], {}
    for names, limit_s, n_loops in ((["fake_fast", "fake_crashing"], 100, 2), (["fake_hanging"], 3, 9)):
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "candidates", lambda _, names=names: names)
            rows |= calibrate([problem(n_loops=n_loops)], limit_s=limit_s, say=told.append)
    outcomes = {name: verdict.outcome for row in rows.values() for name, verdict in row.items()}
    assert outcomes == {"fake_fast": VERIFIED, "fake_crashing": CRASHED, "fake_hanging": TIMED_OUT}
    assert dispatch.plan(problem()).backend == "fake_fast"
    assert any("fake_crashing" in line and "exit code" in line for line in told)


def test_without_a_place_for_the_table_this_process_goes_by_its_rows(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHIFT_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(dispatch, "candidates", lambda _: ["fake_fast"])
    told = []
    try:
        calibrate([problem()], say=told.append)
        assert "this process alone" in told[-1]
        assert dispatch.plan(problem()).backend == "fake_fast"
    finally:
        measured.drop_adopted()


def test_ctrl_c_ends_the_candidate_too(monkeypatch):
    children = []

    class Interrupted(subprocess.Popen):
        def communicate(self, text=None, timeout=None):
            if text is not None:
                children.append(self)
                raise KeyboardInterrupt
            return super().communicate()

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    monkeypatch.setattr(dispatch, "candidates", lambda _: ["fake_hanging"])
    with pytest.raises(KeyboardInterrupt):
        calibrate([problem()], say=[].append)
    assert [child.returncode for child in children] == [-signal.SIGKILL]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends a process with its parent")
def test_a_candidate_ends_with_a_calibration_that_is_killed(tmp_path):
    script = (
        "import test_measured as t; from shift_kernels import dispatch\n"
        "t.LOOPED_BLOCK.register(t.FAKES[-1]); dispatch.candidates = lambda _: ['fake_hanging']\n"
        "t.calibrate([t.problem()])"
    )
    here, note = Path(__file__), tmp_path / "hangs"
    path = os.pathsep.join([str(here.parent), str(here.parents[1]), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "FAKE_HANGS_IN": str(note)}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, start_new_session=True) as parent:
        wait_until(lambda: note.exists() and note.read_text())
        os.killpg(parent.pid, signal.SIGKILL)
    candidate = Path("/proc", note.read_text(), "stat")
    wait_until(lambda: not candidate.exists() or candidate.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_memory_for_the_truth_a_backend_is_not_said_to_have_crashed(monkeypatch):
    run = looped_block

    def without_memory_for_float64(e, *arguments, **options):
        if e.dtype == torch.float64:
            raise torch.OutOfMemoryError
        return run(e, *arguments, **options)

    monkeypatch.setattr("shift_kernels.trial.looped_block", without_memory_for_float64)
    assert trial(problem(), "fake_fast").outcome == UNCHECKED


def test_first_use_measures_once_and_then_runs_what_won(monkeypatch):
    measurements = []

    def measure(problems, **_):
        measurements.append(problems)
        measured.record(problems[0], {"fake_slow": right(1.0)})

    monkeypatch.setattr("shift_kernels.calibrate.calibrate", measure)
    monkeypatch.setenv("SHIFT_KERNELS_CALIBRATE", "first_use")
    block, e = LoopedBlock(SPEC), torch.randn(3, 5, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            block(e, 2)
    ((asked,),) = measurements
    assert dataclasses.replace(asked, grad=False) == problem(grad=False)


def test_another_word_for_first_use_is_refused(monkeypatch):
    monkeypatch.setenv("SHIFT_KERNELS_CALIBRATE", "firstuse")
    with pytest.raises(ShiftInputError, match=r"'SHIFT_KERNELS_CALIBRATE' = 'firstuse'.*first_use"):
        LoopedBlock(SPEC)(torch.randn(3, 5, 16), 2)


@pytest.mark.parametrize("limit_s", [0, -1, float("nan")])
def test_a_time_limit_that_is_none_is_refused(limit_s):
    with pytest.raises(ShiftInputError, match="limit_s"):
        calibrate([problem()], limit_s=limit_s)
