"""``shift-calibrate`` and what ``shift-train`` measures before it starts."""

import contextlib
import io
import json
import os

import pytest
import torch
import torch.distributed as dist
from tiny_runs import processes

from shift import calibrate as command
from shift.config import TrainConfig, load_config
from shift.run import shapes
from shift_kernels import LoopedBlock, dispatch, measured
from shift_kernels.measured import VERIFIED, Verdict

ROW = {"torch": Verdict(VERIFIED, "", 1.0, 2.0, 0.0)}


@pytest.fixture(autouse=True)
def measurements(monkeypatch, tmp_path):
    """Problems that were asked to be measured; nothing is."""
    found = []
    monkeypatch.setenv("SHIFT_KERNELS_CACHE", str(tmp_path / "cache"))
    for module in (command, shapes):
        monkeypatch.setattr(module, "calibrate", lambda problems, **_: found.extend(problems))
    dispatch.forget()
    yield found
    measured.drop_adopted()
    dispatch.forget()


def test_a_config_is_measured_in_both_stages_and_for_evaluation(measurements):
    assert command.main(["--config", "demo"]) == 0
    config = load_config("demo")
    assert [(p.n_loops, p.grad) for p in measurements] == [(1, True), (4, True), (4, False)]
    assert {p.batch for p in measurements} == {config.batch_size}


@pytest.mark.parametrize("form", ["inline", "file"])
def test_a_block_is_measured_for_every_number_of_loops(measurements, form, tmp_path):
    spec = json.dumps({"d_model": 16, "n_heads": 2})
    if form == "file":
        (tmp_path / "spec.json").write_text(spec)
        spec = str(tmp_path / "spec.json")
    flags = [
        "--batch",
        "3",
        "--seq-len",
        "5",
        "--n-loops",
        "2",
        "7",
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
    ]
    assert command.main(["--spec", spec, *flags, "--forward-only"]) == 0
    assert [(p.batch, p.seq_len, p.n_loops, p.dtype, p.grad) for p in measurements] == [
        (3, 5, n, torch.bfloat16, False) for n in (2, 7)
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config", "no-such-preset"], "no-such-preset"),
        (["--spec", "no-such-file"], "'no-such-file'"),
        (["--spec", "[]"], "'[]'"),
        (["--spec", "{"], "'{'"),
        (["--spec", '{"d_model": 16}'], "Add n_heads"),
        (["--spec", '{"d_model": 16, "n_heads": 2, "heads": 3}'], "'heads'"),
        (["--spec", '{"d_model": 16, "n_heads": 2}', "--batch", "0"], "'--batch'"),
        (["--spec", '{"d_model": 16, "n_heads": 2}', "--device", "toaster"], "'toaster'"),
        (["--spec", '{"d_model": 16, "n_heads": 2}', "--device", "cuda:99"], "'cuda:99'"),
    ],
)
def test_unusable_input_is_one_line_and_exit_code_2(flags, words, capsys):
    assert command.main([*flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said


def test_training_on_a_cpu_measures_only_if_it_is_asked_to(measurements):
    config = TrainConfig(device="cpu")
    shapes.calibrate_shapes(config, "auto", print)
    shapes.calibrate_shapes(config, "never", print)
    assert not measurements
    shapes.calibrate_shapes(config, "always", print)
    assert len(measurements) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_take_what_rank_0_measured(rank, measurements, monkeypatch):
    config = TrainConfig(device="cpu")
    problem = shapes.problems_of(config)[0]

    class Two:
        """Two ranks, of which this is one; the first finds a row."""

        size = 2

        def __init__(self, hang_timeout):
            pass

        def from_first(self, action):
            if rank == 0:
                action()
            return {measured.shape_class(problem): ROW}

    monkeypatch.setattr(shapes, "Ranks", Two)
    shapes.calibrate_shapes(config, "always", print)
    assert len(measurements) == (3 if rank == 0 else 0)
    assert dispatch.plan(problem).backend == "torch"


def choose_on_rank(rank, folder, store):
    """Child process, with a cache folder and a table of its own; rank 1 alone comes to a new shape."""
    os.environ |= {
        "SHIFT_KERNELS_CACHE": str(folder / f"cache {rank}"),
        "SHIFT_KERNELS_CALIBRATE": "first_use",
    }
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    config = TrainConfig(device="cpu")
    problem = shapes.problems_of(config)[0]
    fast, slow = (Verdict(VERIFIED, "", 1.0, ms, 0.0) for ms in (1.0, 2.0))
    measured.record(problem, {"torch": fast, "cpu": slow} if rank == 0 else {"torch": slow, "cpu": fast})
    shapes.calibrate_shapes(config, "auto", print)
    said = io.StringIO()
    if rank == 1:
        with contextlib.redirect_stderr(said):
            for _ in range(2):
                LoopedBlock(problem.spec)(torch.zeros(1, 1, problem.spec.d_model), 1)
    (folder / f"{rank}.json").write_text(json.dumps([dispatch.plan(problem).backend, said.getvalue()]))
    dist.barrier()
    dist.destroy_process_group()


def test_two_hosts_choose_alike_and_none_measures_in_a_call(tmp_path):
    context, store = processes(), tmp_path / "store"
    ranks = [context.Process(target=choose_on_rank, args=(rank, tmp_path, store)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    (first, _), (second, said) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second == "torch"  # as the table of rank 0 says
    assert said.count("\n") == 1
    assert "Run shift-calibrate" in said
