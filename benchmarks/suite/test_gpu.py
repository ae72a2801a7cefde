"""The looped block on an NVIDIA GPU."""

import pytest

from shift_kernels.bench.cases import LIBRARY, BlockCase, full

CASES = [case for case in full("cuda") if isinstance(case, BlockCase)]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
def test_triton(time_case, case):
    time_case(case, "triton", "cuda")


@each_case
def test_cuda(time_case, case):
    time_case(case, "cuda", "cuda")


@pytest.mark.parametrize("runner", LIBRARY)
@each_case
def test_library(time_case, case, runner):
    time_case(case, runner, "cuda")
