"""``shift-bench`` and the pytest-benchmark suite: what they compare, and what they say of a missing part."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shift_kernels import backends, bench
from shift_kernels.accuracy import ALLOWED, error_ratio
from shift_kernels.bench import compare, timing
from shift_kernels.bench.baseline import PlainBlock
from shift_kernels.bench.cases import AttentionCase, BlockCase, full, quick

ROOT = Path(__file__).parents[2]
TINY = BlockCase(16, 5, 2, 2)
CPU = backends()["cpu"]
needs_ours = pytest.mark.skipif(CPU != "available", reason=f"cpu backend: {CPU}")


def suite(*options):
    command = [sys.executable, "-m", "pytest", "benchmarks/suite", "-p", "no:cacheprovider", *options]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_each_documented_word_selects_cases_of_the_suite():
    done = suite("--collect-only", "-o", "addopts=", "-q")
    assert done.returncode == 0, done.stdout
    tests = [line.partition("suite/")[2] for line in done.stdout.splitlines() if "::" in line]
    assert all(any(word in test for test in tests) for word in ("cpu", "triton", "attention", "training"))


def test_the_documented_command_times_one_case_of_the_suite(tmp_path):
    once = ["--benchmark-min-rounds=1", "--benchmark-max-time=0", f"--benchmark-json={tmp_path / 'x.json'}"]
    word = "d64-n32-b32-T8-float32-forward and eager and test_cpu"
    done = suite("--benchmark-only", "-k", word, *once)
    assert done.returncode == 0, done.stdout + done.stderr
    (timed,) = json.loads((tmp_path / "x.json").read_text())["benchmarks"]
    assert timed["stats"]["median"] > 0


@pytest.fixture
def without_compiler(monkeypatch):
    """``torch.compile`` as it is on a machine without a C++ compiler."""

    def compile(self, mode=None):
        def fail(*args, **options):
            raise RuntimeError(
                "InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1"
            )

        self.body = fail
        return self

    monkeypatch.setattr(PlainBlock, "compile", compile)


@needs_ours
@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("backward", [False, True])
def test_a_runner_that_cannot_run_is_said_in_one_line_and_the_others_are_timed(backward):
    found = compare.measure(BlockCase(16, 5, 2, 2, backward=backward), "cpu", rounds=3)
    assert found.missing == {"compile": "InvalidCxxCompiler: No working C++ compiler found"}
    assert {name: len(ms) for name, ms in found.ms.items()} == {"cpu": 3, "eager": 3}
    assert found.row[-1] == "yes"
    assert found.row[3] == "-"


@needs_ours
@pytest.mark.usefixtures("without_compiler")
def test_a_wrong_result_of_ours_is_told_and_fails_the_command(monkeypatch, capsys, tmp_path):
    calls = BlockCase.calls

    def with_a_wrong_gradient(self, names, device):
        found = calls(self, names, device)
        right = found["cpu"]
        found["cpu"] = lambda: [right()[0], *(1.001 * x for x in right()[1:])]
        return found

    monkeypatch.setattr(compare, "quick", lambda device: [TINY])
    assert compare.main(["--quick", "--rounds", "2", "--json", str(tmp_path / "times.json")]) == 0
    assert "| yes" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "times.json").read_text())["cases"][0]["ms"]["cpu"]) == 2
    monkeypatch.setattr(BlockCase, "calls", with_a_wrong_gradient)
    assert compare.main(["--quick", "--rounds", "2"]) == 1
    said = capsys.readouterr().out
    assert "| NO: cpu" in said
    assert "Not measured: compile: InvalidCxxCompiler" in said
    assert "Traceback" not in said


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize(("processes", "warns"), [(0.1, False), (16.0, True)])
def test_a_busy_machine_is_told(processes, warns, monkeypatch, capsys):
    monkeypatch.setattr(compare, "quick", lambda device: [TINY])
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (processes, 0.0, 0.0))
    compare.main(["--quick", "--rounds", "2"])
    assert ("do not trust" in capsys.readouterr().out) == warns


def test_an_error_may_be_twice_that_of_eager_and_a_nan_is_none():
    exact, eager = torch.ones(4, dtype=torch.float64), torch.full((4,), 1.01)
    assert error_ratio(torch.full((4,), 1.0199), eager, exact) < ALLOWED
    assert error_ratio(torch.full((4,), 1.0201), eager, exact) > ALLOWED
    assert error_ratio(torch.full((4,), torch.nan), eager, exact) == float("inf")


def test_calls_take_turns_and_the_warm_up_is_not_counted():
    order = []
    times = timing.interleave({n: lambda n=n: order.append(n) for n in "ab"}, rounds=3, warm_up=1)
    assert order == list("abababab")
    assert {name: len(ms) for name, ms in times.items()} == {"a": 3, "b": 3}


def test_the_speed_up_is_over_the_fastest_of_the_others():
    times = {"cpu": [2.0, 2.0, 9.0], "eager": [6.0, 6.0], "compile": [4.0, 5.0]}
    assert timing.speedup(times, "cpu", ["eager", "compile"]) == pytest.approx(4.5 / 2)


@pytest.mark.parametrize("case", [TINY, AttentionCase(2, 2, 5, 8)], ids=lambda case: case.name)
def test_every_runner_gives_the_same_tensors(case):
    names = ("torch", "eager", "exact")
    found = {name: call() for name, call in case.calls(names, "cpu").items()}
    for name in names[:2]:
        assert len(found[name]) == len(found["exact"]) > 1
        for x, expected in zip(found[name], found["exact"], strict=True):
            torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_of_cases_are_unique(device):
    for cases in (quick(device), full(device)):
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize("argv", [["--rounds", "1"], ["--threads", "0"], ["--device", "tpu"]])
def test_a_bad_option_is_refused_by_its_name(argv, capsys):
    with pytest.raises(SystemExit):
        compare.main(argv)
    assert argv[0] in capsys.readouterr().err


def test_the_map_of_the_package_names_every_file():
    files = {path.name for path in Path(bench.__path__[0]).glob("*.py")} - {"__init__.py"}
    assert all(f"{name} " in bench.__doc__ for name in files)
