"""Sequences of several blocks of keys and queries on the C++ backend, by the rules of test_cpu_backend.py."""

import math
import subprocess
import sys

import pytest
import torch
from test_cpu_backend import (
    AUTOCAST,
    FLOAT32,
    ISAS,
    check,
    in_dtypes,
    make,
    needs_library,
    normal,
    on_cpu_backend,
    skip_without,
)

ATTENTION = {
    "causal": {"position": "rope", "head_dim": 16},
    "full": {"causal": False, "head_dim": 5, "n_heads": 3},
    "grouped": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 20, "injection": "add", "n_layers": 2},
    "window": {"window": 70, "position": "rope", "head_dim": 8},
    "window, full": {"window": 3, "causal": False, "softcap": 1.5, "attn_scale": 0.4},
    "one kv head": {"n_heads": 3, "n_kv_heads": 1, "head_dim": 4, "norm_placement": "sandwich"},
}
LENGTHS = torch.tensor([300, 129, 1, 0, 64, 65])
every_attention = pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
each_isa = pytest.mark.parametrize("isa", ISAS)


@needs_library
@each_isa
@every_attention
def test_forward_and_all_gradients(options, isa):
    skip_without(isa)
    block, e = make(batch=6, seq_len=300, **{"d_ff": 24, **options})
    check(block, e, {"n_loops": torch.tensor([1, 2, 2, 2, 1, 2]), "seq_lens": LENGTHS}, isa)


@needs_library
@every_attention
def test_in_bfloat16(options):
    block, e = make(batch=2, seq_len=200, **{"d_ff": 24, **options})
    check(
        block,
        e,
        {"n_loops": 2, "seq_lens": torch.tensor([200, 130])},
        dtypes=AUTOCAST,
        slack=torch.finfo(torch.bfloat16).eps,
    )


@needs_library
@pytest.mark.parametrize(
    "options", [{}, {"causal": False, "n_layers": 2}, {"norm_placement": "post"}], ids=str
)
def test_same_bits_for_any_number_of_threads(options):
    """One sequence, too: its rows are then shared out."""
    block, e = make(batch=1, seq_len=700, n_heads=4, n_kv_heads=2, head_dim=6, **options)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(on_cpu_backend(block, e, normal, {"n_loops": 2}))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@needs_library
@each_isa
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spreads_as_in_plain_pytorch(causal, value, isa):
    skip_without(isa)
    block, e = make(batch=2, seq_len=200, n_heads=2, causal=causal)
    e[0, 140, 3] = value
    call = {"n_loops": 1}
    plain = in_dtypes(block, e.clone(), normal, dict(call), FLOAT32)
    for a, b in zip(on_cpu_backend(block, e, normal, dict(call), isa), plain, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


@needs_library
def test_memory_grows_with_the_tokens_and_not_with_their_square():
    """The scores of one head would take 256 MiB."""
    program = """
import resource, torch
from shift_kernels import BlockSpec, LoopedBlock
block, e = LoopedBlock(BlockSpec(16, 1, d_ff=0)), torch.randn(1, 2**13, 16)
block(e[:, :64], 1, backend="cpu").sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
block(e, 1, backend="cpu").sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) < 64 * 1024  # KiB
