"""The kernels under pytest-benchmark, one runner a test, runners of one case in a group.

    pytest benchmarks/suite --benchmark-only                       # all; GPU cases skip without a GPU
    pytest benchmarks/suite --benchmark-only -k "cpu and float32"  # also: triton, cuda, attention, training
    pytest benchmarks/suite --benchmark-only --benchmark-autosave  # then, after a change: --benchmark-compare

Here the runners do not take turns, so a busy machine can favour one of them. Published tables come from
benchmarks/kernels, benchmarks/training and benchmarks/gpu, and ``shift-bench`` compares within minutes.
"""

from collections.abc import Callable

import pytest
import torch

from shift_kernels import backends, info
from shift_kernels.bench.cases import Case
from shift_kernels.bench.compare import in_a_line


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["shift"] = info.report().splitlines()


@pytest.fixture
def time_case(benchmark) -> Callable[[Case, str, str], None]:
    """Times a case by a runner on a device; skips with the reason where one of them is missing."""

    def run(case: Case, runner: str, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        missing = backends().get(runner, "available")
        if missing != "available":
            pytest.skip(f"backend {runner}: {missing}")
        call = case.calls((runner,), device)[runner]
        try:
            call()
        except RuntimeError as error:
            if runner != "compile":
                raise
            pytest.skip(f"torch.compile: {in_a_line(error)}")

        def finished() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{device}: {case.name}"
        benchmark(finished)

    return run
