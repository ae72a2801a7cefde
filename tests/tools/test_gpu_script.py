"""The GPU run, as far as it can be tested without a GPU: isolation, results, report, a rehearsal."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import bench, collect, contract, isolate, results, run, smoke, table, tune
from benchmarks.gpu.cases import ATTENTIONS, BLOCKS, CASES, KINDS, Attention, Block, goal
from benchmarks.gpu.stages import STAGES, Stage
from benchmarks.gpu.work import (
    CRASHED,
    FAILED,
    OK,
    REFUSED,
    SKIPPED,
    TIMEOUT,
    UNFINISHED,
    WRONG,
    Case,
    Finding,
    Group,
)
from shift_kernels import BlockSpec, LoopedBlock
from shift_kernels.bench.baseline import PLAIN, PlainBlock, sdpa

ROOT = Path(__file__).parents[2]
MACHINE = {"device": "NVIDIA H100 80GB HBM3"}


# A case in a process of its own.


@pytest.fixture
def run_cases(tmp_path, monkeypatch):
    """Runs cases of tests/faulty_stage.py, all in one batch: what each asks for -> findings by name."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))

    def run(*asked, limit_s=20.0, seconds=60.0, wrapper=()):
        found = {}
        cases = [Case("faulty", f"{i} {do}", limit_s, {"do": do}) for i, do in enumerate(asked)]
        isolate.run(
            cases,
            "faulty_stage",
            lambda case, finding, _: found.setdefault(case.name, finding),
            tmp_path,
            isolate.Clock(time.monotonic() + seconds),
            wrapper,
        )
        return found

    return run


def test_a_fault_of_one_case_costs_no_other(run_cases):
    found = run_cases("ok", "crash", "ok", "raise", "leave", "wrong", "ok")
    outcomes = [finding.outcome for finding in found.values()]
    assert outcomes == [OK, CRASHED, OK, FAILED, CRASHED, WRONG, OK]
    assert found["1 crash"].why == "SIGSEGV: a stray line"
    assert found["3 raise"].why == "ValueError: not today"
    assert found["4 leave"].why.startswith("exit code 3")


def test_after_a_fault_the_rest_gets_a_fresh_process(run_cases):
    found = run_cases("ok", "ok", "wrong", "ok")
    first, second, third, after = (finding.data["process"] for finding in found.values())
    assert first == second == third != after


def test_a_case_that_hangs_is_ended_and_the_rest_goes_on(run_cases):
    begun = time.monotonic()
    found = run_cases("hang", "ok", limit_s=1.0)
    assert [finding.outcome for finding in found.values()] == [TIMEOUT, OK]
    assert time.monotonic() - begun < 20


def test_what_the_time_does_not_reach_gets_no_row(run_cases):
    assert list(run_cases("ok", "hang", "ok", seconds=3.0)) in (["0 ok"], [])


def test_a_tool_around_the_process_that_finds_something_fails_the_case(run_cases):
    tool = ("sh", "-c", '"$@"; echo "===== ERROR SUMMARY: 2 errors"; echo later; exit 9', "tool")
    finding = run_cases("ok", wrapper=tool)["0 ok"]
    assert (finding.outcome, finding.why) == (FAILED, "exit code 9: ===== ERROR SUMMARY: 2 errors")
    assert run_cases("ok", wrapper=("env",))["0 ok"].outcome == OK


def test_batches_of_a_group_run_side_by_side_and_rows_from_before_are_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setattr(run.os, "cpu_count", lambda: 2)
    found = results.Results(tmp_path, tmp_path / "out", MACHINE)
    cases = [Case("faulty", name, 20.0, {"do": "meet", "folder": str(tmp_path)}) for name in "abc"]
    found.add(cases[0], Finding(), 0.0)
    group = Group([[case] for case in cases], workers=2)
    run.run_group(group, "faulty_stage", found, isolate.Clock(time.monotonic() + 60))
    assert [row["outcome"] for row in found.rows.values()] == [OK, OK, OK]
    assert sorted(p.name for p in tmp_path.glob("met-*")) == ["met-b", "met-c"]


# Rows that stay.


def test_rows_are_on_disk_at_once_and_outlive_the_process_and_a_line_cut_short(tmp_path):
    first = results.Results(tmp_path / "work", tmp_path / "out", MACHINE)
    done, broken, going = (Case("s", name, 1.0) for name in ("done", "broken", "going"))
    first.add(done, Finding(OK, "", {"ms": 1.0}), 0.5)
    first.add(broken, Finding(CRASHED, "SIGSEGV"), 0.5)
    first.add(going, Finding(UNFINISHED), 0.5)
    with (tmp_path / "work" / results.ROWS).open("a") as file:
        file.write('{"stage": "s", "na')
    again = results.Results(tmp_path / "work", tmp_path / "out", MACHINE)
    assert [again.knows(case) for case in (done, broken, going)] == [True, True, False]
    assert [row["name"] for row in again.faults] == ["broken"]


@pytest.mark.parametrize("change", [{"sources": "other"}, {"device": "another"}])
def test_rows_of_other_sources_or_another_device_do_not_count(tmp_path, change):
    found = results.Results(tmp_path, tmp_path / "out", MACHINE)
    found.add(Case("s", "one", 1.0), Finding(), 0.0)
    path = tmp_path / results.ROWS
    path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
    assert not results.Results(tmp_path, tmp_path / "out", MACHINE).knows(Case("s", "one", 1.0))


def test_an_archive_is_filed_under_its_device_and_few_files_leave_the_machine(tmp_path):
    found = results.Results(tmp_path / "work", tmp_path / "out", MACHINE)
    (tmp_path / "work" / "tuned.json").write_text("{}")
    (tmp_path / "work" / "logs").mkdir()
    (tmp_path / "work" / "logs" / "long.log").write_text("x" * results.LOG_BYTES + "the end")
    found.add(Case("bench", "one", 1.0), Finding(data=timing("cuda", [1.0, 2.0, 3.0])["data"]), 0.5)
    found.publish()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "results.tar.gz",
        "summary.json",
        "table.md",
    ]
    folder = collect.collect(tmp_path / "out" / results.ARCHIVE, tmp_path / "results")
    assert folder.name == "nvidia-h100-80gb-hbm3"
    assert sorted(p.name for p in folder.iterdir()) == ["summary.json", "table.md", "tuned.json"]
    (row,) = json.loads((folder / "summary.json").read_text())["rows"]
    assert (row["data"]["median_ms"], row["data"]["n_times"]) == (2.0, 3)
    results.unpack(tmp_path / "out" / results.ARCHIVE, tmp_path / "unpacked")
    assert (tmp_path / "unpacked" / "logs" / "long.log").read_text().endswith("xthe end")


def test_an_archive_is_whole_though_a_file_of_a_running_case_vanishes_or_grows(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("gone", "grown", "still"):
        (folder / f"{name}.log").write_text(name)
    read = Path.read_bytes

    def meanwhile(path):
        if path.stem == "gone":
            path.unlink()
        if path.stem == "grown":
            path.write_text("grown by now")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", meanwhile)
    results.pack(folder, tmp_path / "a.tar.gz")
    results.unpack(tmp_path / "a.tar.gz", tmp_path / "unpacked")
    found = {path.name: path.read_text() for path in (tmp_path / "unpacked").iterdir()}
    assert found == {"grown.log": "grown by now", "still.log": "still"}


def test_what_is_no_archive_of_ours_is_refused(tmp_path):
    results.pack(tmp_path, tmp_path / "empty.tar.gz")
    assert collect.main([str(tmp_path / "empty.tar.gz"), "--results", str(tmp_path)]) == 1


# The report.


def timing(runner, times, case=BLOCKS[0].name, direction="both", kept=2**20):
    data = dict(case=case, runner=runner, direction=direction, times_ms=times, kept_bytes=kept, floor_ms=0.75)
    return dict(stage="bench", name=f"{case}{runner}{direction}", outcome=OK, why="", seconds=1.0, data=data)


def cells(text, line=0):
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    return dict(zip(rows[0], rows[2 + line], strict=True))


def test_speed_up_is_our_best_over_the_best_of_the_others():
    others = [timing("eager", [4.0, 4.0], kept=2**24), timing("compile", [3.0])]
    found = cells(table.bench_table([timing("cuda", [2.0, 1.0, 1.5]), timing("triton", [9.0]), *others]))
    assert (found["ours / others"], found["goal"]) == ("2.00x", ">= 2x")
    assert (found["cuda"], found["eager"], found["roofline"], found["memory saved"]) == (
        "1.5", "4", "50%", "16.0x",
    )  # fmt: skip


def test_directions_and_cases_are_compared_with_their_own_kind():
    others = [timing("eager", [9.0], case="other"), timing("eager", [5.0], direction="forward")]
    assert cells(table.bench_table([timing("cuda", [1.0]), *others]))["ours / others"] == ""


def test_spread_is_half_the_distance_of_the_quartiles():
    assert table.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 / 3)
    assert table.spread([7.0]) == 0


def test_a_report_has_a_count_and_a_reason_of_every_fault():
    rows = [timing("cuda", [1.0])]
    rows.append(dict(stage="smoke", name="d64", outcome=CRASHED, why="SIGSEGV: ...", seconds=2.0, data={}))
    text = table.text(MACHINE, rows)
    assert "- smoke: d64: crashed: SIGSEGV: ..." in text
    assert text.splitlines()[0] == "device: NVIDIA H100 80GB HBM3"
    assert cells(table.count_table(rows), 1)["crashed"] == "1"


# What is run.


def test_names_of_cases_are_unique_and_goals_are_set_where_we_expect_to_win():
    assert len(CASES) == len(BLOCKS) + len(ATTENTIONS)
    assert [goal(case) for case in BLOCKS[:4]] == [2.0, 1.5, 1.15, 2.0]
    assert goal(BLOCKS[-1]) is None


def test_flops_of_a_case_count_two_a_multiply_add():
    # d 2, seq 3: maps 2 x (4 + 8) x 2^2 a token, scores and weighted sum 2 x 2 x 3 x 2 a token.
    assert Block(1, 3, 2, 1, 1).flops == 3 * (96 + 24)
    assert Block(1, 3, 2, 1, 1, "trm").flops == 3 * 2 * (32 + 6 * 2 * 1536 + 24)
    assert Attention(1, 1, 4, 8).flops == (4 * 4 * 4 * 8) // 2


def test_bytes_of_a_case_are_its_inputs_outputs_and_weights_in_two_bytes():
    assert Block(1, 3, 2, 1, 1).bytes == 2 * (2 * 3 * 2 + 12 * 2**2)
    assert Attention(1, 1, 4, 8).bytes == 2 * 4 * 4 * 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_loops", [1, 3])
def test_competitors_compute_what_we_compute(n_loops, kind):
    torch.manual_seed(0)
    block = LoopedBlock(BlockSpec(**Block(2, 9, 16, 2, n_loops, kind).options))
    e = torch.randn(2, 9, 16)
    torch.testing.assert_close(PLAIN[kind](block, sdpa(block.spec.causal))(e, n_loops), block(e, n_loops))


@pytest.mark.parametrize("n_loops", [3, torch.tensor([1, 3])], ids=["3", "own"])
@pytest.mark.parametrize("options", [{"causal": False}, {"loop_norm": True, "activation": "gelu_tanh"}])
def test_the_plain_block_follows_the_spec(n_loops, options):
    torch.manual_seed(0)
    block = LoopedBlock(BlockSpec(d_model=16, n_heads=2, injection="add", **options))
    e = torch.randn(2, 9, 16)
    torch.testing.assert_close(PlainBlock(block)(e, n_loops), block(e, n_loops))


def test_every_shape_is_one_that_the_spec_allows():
    for case in BLOCKS:
        assert BlockSpec(**case.options).head_dim * case.n_heads == case.d_model
    for shape in smoke.SHAPES.values():
        assert BlockSpec(**{k: v for k, v in shape.items() if k not in ("seq_len", "dtype")})


def test_tuning_tries_no_tile_longer_than_the_sequence_and_every_chunk_once():
    assert {own for own, *_ in tune.tiles(20)} == {32}
    assert all(own * walk <= 128 * 128 for own, walk, *_ in tune.tiles(4096))
    assert tune.chunks(8) == [8, 4, 2, 1]


def test_flex_attention_is_not_asked_for_what_it_refuses_on_cuda():
    timed = {(case.arguments.get("case"), case.arguments.get("runner")) for case in cases_of(bench)}
    names = {head_dim: f"attention-b256-h{n}-n64-hd{head_dim}" for n, head_dim in ((64, 4), (8, 32))}
    assert (names[4], "flex") not in timed
    assert {(names[32], "flex"), (names[4], "triton")} <= timed


def cases_of(stage):
    return [case for group in stage.groups() for batch in group.batches for case in batch]


def test_a_configuration_that_does_not_fit_is_refused_unless_it_is_the_one_in_use(monkeypatch):
    errors = pytest.importorskip("triton.runtime.errors", reason="needs Triton")

    def too_large(*_):
        raise errors.OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(tune, "_trial", too_large)
    finding = tune.trial("attention", "a case", "forward", [128, 128, 8, 3], compile_only=False)
    assert finding.outcome == REFUSED
    assert "shared memory, Required: 300000" in finding.why
    with pytest.raises(errors.OutOfResources):
        tune.trial("attention", "a case", "forward", None, compile_only=False)


def test_the_fastest_configuration_replaces_its_own_class_alone():
    def found(ms, warps, shape_class="forward 64x64 16-bit"):
        config = dict(warps=warps, ff_chunk=32, stages=1)
        return dict(kind="resident", ms=ms, config=config, architecture="sm_90", shape_class=shape_class)

    before = {"sm_90": {"other": {"warps": 1}}, "sm_80": {"forward 64x64 16-bit": {"warps": 2}}}
    after = tune.with_fastest(before, [found(2.0, 4), found(1.0, 8), {}, found(None, 16)], "H100")
    assert after["sm_90"]["forward 64x64 16-bit"] == dict(
        warps=8, ff_chunk=32, stages=1, chosen_by="H100", ms=1.0
    )
    assert after["sm_90"]["other"] == {"warps": 1}
    assert after["sm_80"] == {"forward 64x64 16-bit": {"warps": 2}}


def test_a_file_of_tests_that_cannot_be_imported_has_a_row(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    for name, text in {
        "fine": "import pytest\n@pytest.mark.gpu\ndef test_it(): pass",
        "lacking": "import a_module_that_is_not_here  # for its pytest.mark.gpu",
        "broken": "1 / 0  # before its pytest.mark.gpu",
    }.items():
        (tmp_path / "tests" / f"test_{name}.py").write_text(text)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "-q"\nmarkers = ["gpu"]')
    monkeypatch.setattr(contract, "ROOT", tmp_path)
    (group,) = contract.groups()
    cases = {case.name: case for batch in group.batches for case in batch}
    assert list(cases) == [f"tests/test_{name}" for name in ("fine.py::test_it", "broken.py", "lacking.py")]
    found = {}

    class Report:
        begin = staticmethod(lambda case: None)
        end = staticmethod(lambda case, finding: found.update({case.name: finding}))

    contract.run_batch([case for case in cases.values() if "::" not in case.name], Report())
    assert [(finding.outcome, finding.why) for finding in found.values()] == [
        (FAILED, "ZeroDivisionError: division by zero"),
        (SKIPPED, "ModuleNotFoundError: No module named 'a_module_that_is_not_here'"),
    ]


def test_a_stage_whose_module_lacks_another_is_skipped_in_a_line(tmp_path, monkeypatch):
    found = results.Results(tmp_path, tmp_path / "out", MACHINE)
    (tmp_path / "lacking_stage.py").write_text("import a_module_that_is_not_here")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(STAGES, "lacking", Stage("lacking_stage", "needs what is not here"))
    clock = isolate.Clock(time.monotonic() + 60)
    assert run.run_stage("lacking", found, clock, argparse.Namespace(only="")) == 0
    (row,) = found.of("lacking")
    assert row["outcome"] == SKIPPED
    assert row["why"].startswith("needs a_module_that_is_not_here: pip install")


# The commands.


def script(name, *arguments):
    return subprocess.run(
        [ROOT / "benchmarks/gpu" / name, *map(str, arguments)],
        env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: the script would run in full")
def test_without_a_gpu_the_script_says_so_and_names_its_stages(tmp_path):
    done = script("run.sh", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "No CUDA device" in done.stdout
    assert all(name in done.stdout for name in STAGES)


def test_an_unknown_stage_is_named(tmp_path):
    done = script("run.sh", tmp_path / "out", "dance")
    assert done.returncode == 2
    assert "no stage 'dance'" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: the script itself can be run")
def test_a_rehearsal_runs_every_stage_to_its_end(tmp_path):
    done = script("rehearse.sh", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "results").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["counts"]) == list(STAGES)
    assert all(counts["ok"] for counts in summary["counts"].values())
    assert {row["outcome"] for row in summary["rows"]} == {OK}
    backends = {row["data"]["backend"] for row in summary["rows"] if row["stage"] == "smoke"}
    assert backends == {"cuda", "triton"}
    assert (folder / "tuned.json").is_file()
    assert len(list((tmp_path / "out").iterdir())) <= 4
    assert done.stdout.index("Stages\n") > done.stdout.rindex("training: ")
