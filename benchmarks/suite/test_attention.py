"""Attention alone: ``shift_kernels.attention`` and the library's."""

import pytest

from shift_kernels.bench.cases import LIBRARY, AttentionCase, full

ON_GPU = [case for case in full("cuda") if isinstance(case, AttentionCase)]
ON_CPU = [AttentionCase(32, 4, n, 16) for n in (32, 256)]
by_name = {"ids": lambda case: case.name}


@pytest.mark.parametrize("runner", ["auto", *LIBRARY])
@pytest.mark.parametrize("case", ON_CPU, **by_name)
def test_attention_on_cpu(time_case, case, runner):
    time_case(case, runner, "cpu")


@pytest.mark.parametrize("runner", ["triton", *LIBRARY])
@pytest.mark.parametrize("case", ON_GPU, **by_name)
def test_attention_on_gpu(time_case, case, runner):
    time_case(case, runner, "cuda")
