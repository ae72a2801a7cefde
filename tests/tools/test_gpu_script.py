"""The GPU run, as far as it can be tested without a GPU: cases, table, budget, competitors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import slope, table, tune
from benchmarks.gpu.cases import BLOCKS, CASES, KINDS, Attention, Block, runners
from benchmarks.gpu.run import SLOPES, Budget, run
from shift_kernels import BlockSpec, LoopedBlock
from shift_kernels.bench.baseline import PLAIN, PlainBlock, sdpa

ROOT = Path(__file__).parents[2]


def line(runner, times, case="c", direction="both", error=None, kept=2**20):
    return dict(
        case=case, runner=runner, direction=direction, times_ms=times, kept_bytes=kept, floor_ms=1.0,
        error=error,
    )  # fmt: skip


def test_names_of_cases_are_unique_and_every_case_starts_with_ours():
    assert len(CASES) == len({c.name for c in CASES.values()}) >= 7
    assert all(runners(case)[0] in table.OURS and len(runners(case)) >= 4 for case in CASES.values())


def test_flops_of_a_case_count_two_a_multiply_add():
    # d 2, seq 3: maps 2 x (4 + 8) x 2^2 a token, scores and weighted sum 2 x 2 x 3 x 2 a token.
    assert Block(1, 3, 2, 1, 1).flops == 3 * (96 + 24)
    assert Block(1, 3, 2, 1, 1, "trm").flops == 3 * 2 * (32 + 6 * 2 * 1536 + 24)
    assert Attention(1, 1, 4, 8).flops == (4 * 4 * 4 * 8) // 2


def test_speed_up_is_over_the_best_of_the_others():
    slow, fast = line("eager", [4.0, 4.0, 4.0]), line("compile", [3.0, 3.0, 3.0])
    rows = table.rows([line("cuda", [2.0, 1.0, 1.5]), slow, fast, line("streamed", [6.0])])
    assert [r[5] for r in rows] == ["2.00x", "-", "-", "0.50x"]
    assert rows[0][3:5] == ("1.5", "33.3%")
    assert rows[0][6] == "67%"
    assert rows[0][7] == "1.0"


def test_directions_and_cases_are_compared_with_their_own_kind():
    others = [line("eager", [9.0], case="other"), line("eager", [5.0], direction="forward")]
    rows = table.rows([line("cuda", [1.0]), *others])
    assert rows[0][5] == "-"


def test_a_failed_runner_is_a_row_with_its_error_and_no_competitor():
    rows = table.rows([line("cuda", [1.0]), line("flex", [], error="RuntimeError: no")])
    assert rows[0][5] == "-"
    assert rows[1][-1] == "RuntimeError: no"


@pytest.mark.parametrize(
    "bad", [{}, line("cuda", []), line("cuda", [1.0], error="x"), line("cuda", [1.0]) | {"more": 1}]
)
def test_what_is_no_measurement_is_refused(bad):
    with pytest.raises(ValueError, match=r"fields|either"):
        table.check(bad)


def test_spread_is_half_the_distance_of_the_quartiles():
    assert table.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 / 3)
    assert table.spread([7.0]) == 0


def test_slope_is_what_a_loop_costs():
    assert set(SLOPES) <= {case.name for case in BLOCKS}
    assert slope.fit([1, 2, 4], [1.5, 2.0, 3.0]) == pytest.approx((0.5, 1.0))


def test_table_has_its_columns_aligned():
    lines = table.markdown([line("cuda", [1.0]), line("eager", [123.456])]).splitlines()
    assert len({len(x) for x in lines}) == 1
    assert len(lines) == 4


def test_measurements_come_back_from_json(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(line("cuda", [1.0])) + "\n")
    assert table.read(tmp_path) == [line("cuda", [1.0])]


def test_a_step_over_its_limit_is_ended_and_says_so(tmp_path):
    step = run("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 5, tmp_path / "x.txt")
    assert step.outcome == "timeout"
    assert step.seconds < 20


def test_steps_after_the_budget_are_skipped_and_failures_are_kept(tmp_path):
    assert run("late", ["true"], Budget(0).share(3, 90), tmp_path / "x.txt").outcome == "skipped"
    assert (
        run("bad", [sys.executable, "-c", "raise SystemExit(3)"], 30, tmp_path / "y.txt").why == "exit code 3"
    )


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


def test_every_listed_block_is_one_that_the_spec_allows():
    for case in BLOCKS:
        assert BlockSpec(**case.options).head_dim * case.n_heads == case.d_model


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: the script would run in full")
def test_without_a_gpu_the_script_says_so_and_prints_the_empty_table(tmp_path):
    done = subprocess.run(
        [ROOT / "benchmarks/gpu/run.sh", tmp_path / "out"],
        env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "No CUDA device" in done.stdout
    assert "| median ms |" in done.stdout
    assert all(name in done.stdout for name in CASES)


def test_tuning_tries_no_tile_longer_than_the_sequence_and_every_chunk_once():
    assert {own for own, *_ in tune.tiles(20)} == {16, 32}
    assert all(own * walk <= 128 * 128 for own, walk, *_ in tune.tiles(4096))
    assert tune.chunks(8) == [8, 4, 2, 1]
