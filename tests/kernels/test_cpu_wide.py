"""Blocks of whole vectors on the C++ backend: weights packed when used, gradients summed where they go."""

import dataclasses

import pytest
import torch
from test_cpu_backend import (
    AUTOCAST,
    BFLOAT16,
    ISAS,
    check,
    make,
    needs_library,
    normal,
    on_cpu_backend,
    skip_without,
)

from shift_kernels import explain
from shift_kernels.backends.cpu import CPU, FEW_TOKENS, WIDE
from shift_kernels.call import Problem
from shift_kernels.spec import BlockSpec

USES = {"few": (4, 7), "many": (20, 7), "in slices": (40, 20)}
"""Batch and seq_len; with three loops up to 256 rows are few, and over 2,048 are summed in slices."""
WIDTHS = {"d_model": 32, "n_heads": 2, "d_ff": 80, "n_layers": 2}


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("uses", USES)
def test_forward_and_all_gradients(uses, activation, isa):
    skip_without(isa)
    batch, seq_len = USES[uses]
    block, e = make(batch, seq_len, activation=activation, **WIDTHS)
    lens = torch.arange(batch) % (seq_len + 1)
    check(block, e, {"seq_lens": lens, "n_loops": torch.arange(batch) % 4}, isa)


@needs_library
@pytest.mark.parametrize("uses", ["few", "many"])
@pytest.mark.parametrize("dtypes", [AUTOCAST, BFLOAT16], ids=["autocast", "bfloat16"])
def test_in_bfloat16(dtypes, uses):
    block, e = make(*USES[uses], **WIDTHS)
    check(block, e, {}, dtypes=dtypes, slack=torch.finfo(torch.bfloat16).eps)


@needs_library
@pytest.mark.parametrize("call", [{"n_loops": 0}, {"n_loops": 2, "seq_lens": torch.zeros(4).long()}], ids=str)
def test_gradients_are_zero_where_no_row_runs(call):
    """The gradients' memory is not cleared before: nothing else would write it."""
    block, e = make(**WIDTHS)
    _, _, *of_weights = on_cpu_backend(block, e, normal, dict(call))
    assert not any(g.any() for g in of_weights)


def test_auto_leaves_one_loop_over_few_tokens_of_a_wide_block_to_pytorch():
    spec = BlockSpec(WIDE, 8)
    cpu, f32 = torch.device("cpu"), torch.float32
    few = Problem(spec, 1, FEW_TOKENS - 1, f32, f32, cpu, grad=True, n_loops=1)
    if CPU.why_not(None) is None:
        assert "does not pay" in CPU.why_not(few).words
        assert "does not pay" in explain(spec, 1, FEW_TOKENS - 1)
        served = ({"seq_len": FEW_TOKENS}, {"n_loops": 2}, {"spec": BlockSpec(WIDE // 2, 8)})
        assert all(CPU.why_not(dataclasses.replace(few, **change)) is None for change in served)
