"""The looped block on a CPU."""

import pytest

from shift_kernels.bench.cases import LIBRARY, OURS, BlockCase, full

CASES = [BlockCase(64, 32, 32, 8, backward=False), *full("cpu")]


@pytest.mark.parametrize("runner", [*OURS["cpu"], *LIBRARY])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cpu(time_case, case, runner):
    time_case(case, runner, "cpu")
