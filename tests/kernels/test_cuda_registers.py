"""Kernels for one shape that have the residual stream in registers (arch/sm90a_registers.cuh), emulated.

Every access is watched. Plans of such kernels are in test_cuda_sm90a_plan.py.
"""

import os
import random
import shutil

import pytest
import torch
from test_cuda_resident import check as check_gradients
from test_cuda_shapes import own_kernels
from test_cuda_sm90a import BF16, KB, block_of, check, on_device

from shift_kernels.backends import cuda as cuda_backend

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# shared memory, batch, seq_len, block; calls; the arrangement that the planner shall have found
SHAPES = {
    "128 rows": (
        (227 * KB, 5, 32, {"injection": "add"}),
        [{"return_all_loops": True}, {"seq_lens": torch.tensor([32, 0, 7, 31, 1])}],
        (128, True, 1, 1),
    ),
    "120 rows, a ring, two share": (
        (146 * KB, 8, 20, {"d_model": 128, "n_layers": 2, "d_ff": 144, "activation": "swiglu"}),
        [{}],
        (120, False, 1, 2),
    ),
    "97 rows, own loops": (
        (
            227 * KB,
            2,
            97,
            {"d_model": 80, "n_heads": 5, "norm_placement": "post", "residual_scale": 0.5, "causal": False}
            | {"activation": "relu2", "loop_norm": True},
        ),
        [{"n_loops": torch.tensor([2, 0])}],
        (97, True, 1, 1),
    ),
    "sandwich, chunks of heads": (
        (
            96 * KB,
            8,
            30,
            {"d_model": 128, "n_kv_heads": 2, "norm": "rmsnorm", "norm_placement": "sandwich"}
            | {"position": "rope", "bias": False, "d_ff": 32, "residual_scale": 0.7},
        ),
        [{"seq_lens": torch.tensor([30, 5, 1, 22, 30, 30, 0, 9])}],
        (120, False, 2, 2),
    ),
    "144 columns of 192, operand in shared memory": (
        (
            227 * KB,
            8,
            30,
            {"d_model": 144, "n_heads": 3, "d_ff": 80, "activation": "swiglu", "n_layers": 2},
        ),
        [{"seq_lens": torch.tensor([30, 5, 1, 22, 30, 30, 0, 9])}],
        (120, False, 1, 2),
    ),
    "256 columns, sandwich": (
        (
            227 * KB,
            2,
            64,
            {"d_model": 256, "norm_placement": "sandwich", "position": "rope", "bias": False, "d_ff": 64}
            | {"residual_scale": 0.5, "injection": "add"},
        ),
        [{}],
        (128, False, 4, 1),
    ),
    "no norm, no MLP": (
        (227 * KB, 3, 33, {"norm": "none", "d_ff": 0, "activation": "relu"}),
        [{}],
        (99, True, 1, 1),
    ),
}


def arrangement(block, e, call, backward):
    """Rows of a program, whether weights stay, chunks of heads, programs that share the weights' way."""
    plan = cuda_backend.prepared(
        cuda_backend._LIBRARY,
        block.spec,
        tuple(e.shape[:2]),
        (BF16, BF16),
        cuda_backend.HOPPER,
        "sm_90",
        own_loops=isinstance(call.get("n_loops"), torch.Tensor),
        halting=False,
        backward=backward,
    ).plan
    assert (plan.residual, plan.threads) == ("registers", 384)
    return plan.rows, plan.stages == plan.tiles, block.spec.n_kv_heads // plan.kv_heads, plan.cluster


def arranged(monkeypatch, tmp_path, case, backward):
    """Block, input and call of a case, with the library of its own kernel, whose schedules can be chosen."""
    (shared_bytes, batch, seq_len, options), calls, expected = case
    on_device(monkeypatch, shared_bytes, 1, watched=True)
    own = own_kernels(monkeypatch, tmp_path, watched=True)
    block = block_of(options)
    e = torch.randn(batch, seq_len, block.spec.d_model).to(BF16)
    for call in calls:
        assert arrangement(block, e, call, backward) == expected
        yield block, e, call, list(own.values())[-1]


@pytest.mark.parametrize("name", SHAPES)
def test_output_is_right(monkeypatch, tmp_path, name):
    for block, e, call, library in arranged(monkeypatch, tmp_path, SHAPES[name], backward=False):
        check(library, block, e, range(2), **{"n_loops": 2} | call)


def test_programs_end_when_their_samples_settle(monkeypatch, tmp_path):
    on_device(monkeypatch, 227 * KB, 1, watched=True)
    own_kernels(monkeypatch, tmp_path, watched=True)
    block = block_of({"norm_placement": "post", "injection": "add"}).to(BF16)
    e = torch.randn(3, 70, 64).to(BF16)
    with torch.no_grad():
        expected = block(e, n_loops=6, halt_threshold=0.2, backend="torch")
        h, used = block(e, n_loops=6, halt_threshold=0.2, backend="cuda")
    assert torch.equal(used, expected[1])
    assert 1 < int(used.min()) < 6
    assert (h - expected[0]).abs().max() <= 0.05 * expected[0].abs().max()


def test_a_sample_that_is_not_finite_reaches_no_other(monkeypatch, tmp_path):
    on_device(monkeypatch, 227 * KB, 1, watched=False)
    own_kernels(monkeypatch, tmp_path)
    block = block_of({"injection": "add"}).to(BF16)
    e = torch.randn(5, 25, 64).to(BF16)
    with torch.no_grad():
        clean = block(e, n_loops=2, backend="cuda")
        for bad in (float("nan"), float("inf")):
            e[2, 3, 5] = bad
            h = block(e, n_loops=2, backend="cuda")
            assert h[2, 3:].isnan().all()
            others = torch.arange(5) != 2
            assert torch.equal(h[others], clean[others])


GRADIENTS = {
    "layernorm, swiglu, own loops": (
        (227 * KB, 3, 70, {"activation": "swiglu", "d_ff": 144, "n_layers": 2, "loop_norm": True}),
        [{"n_loops": torch.tensor([2, 0, 1]), "n_grad_loops": 1}],
        (70, False, 1, 1),
    ),
    "weights stay, injection": (
        (227 * KB, 5, 32, {"injection": "add", "residual_scale": 0.5}),
        [{"seq_lens": torch.tensor([32, 0, 7, 31, 1])}],
        (96, True, 1, 1),
    ),
    "sandwich, two share": (
        (
            227 * KB,
            8,
            20,
            {"d_model": 128, "n_kv_heads": 2, "norm": "rmsnorm", "norm_placement": "sandwich"}
            | {"position": "rope", "bias": False, "d_ff": 112, "activation": "gelu_tanh"},
        ),
        [{"return_all_loops": True}],
        (120, False, 1, 2),
    ),
    "post, chunks of heads": (
        (
            120 * KB,
            3,
            33,
            {"d_model": 80, "n_heads": 5, "norm_placement": "post", "causal": False, "activation": "relu2"},
        ),
        [{"seq_lens": torch.tensor([33, 5, 1])}],
        (99, False, 5, 1),
    ),
    "no norm, no MLP": ((227 * KB, 3, 33, {"norm": "none", "d_ff": 0}), [{}], (99, True, 1, 1)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_right(monkeypatch, tmp_path, name):
    for block, e, call, library in arranged(monkeypatch, tmp_path, GRADIENTS[name], backward=True):
        for seed in range(2):
            library.library.shift_emulation_seed(seed)
            check_gradients(block, e, call)


def any_problem(rng, backward):
    """A block, the shape of e and a call, of which many have their residual stream in registers."""
    n_kv_heads, gated = rng.choice([1, 2, 3]), rng.random() < 0.3
    columns = ([64] if gated else [64, 80, 96, 128]) if backward else [64, 96, 128, 144, 192, 224, 256]
    options = {
        "d_model": rng.choice(columns),
        "n_heads": n_kv_heads * rng.choice([1, 2]),
        "n_kv_heads": n_kv_heads,
        "head_dim": rng.choice([16, 32, 48, 64]),
        "n_layers": rng.choice([1, 2]),
        "d_ff": rng.choice([0, 16, 64, 80, 128, 200]),
        "activation": "swiglu" if gated else rng.choice(["gelu", "relu", "gelu_tanh", "relu2"]),
        "norm": rng.choice(["layernorm", "rmsnorm"]),
        "norm_placement": rng.choice(["pre", "post", "sandwich"]),
        "position": rng.choice(["none", "rope"]),
        "injection": rng.choice(["none", "add"]),
        "causal": rng.random() < 0.6,
        "bias": rng.random() < 0.7,
        "loop_norm": rng.random() < 0.3,
        "residual_scale": rng.choice([1.0, 0.5]),
    }
    seq_len = rng.choice([9, 16, 20, 31, 32, 33, 48, 50, 64, 65, 97, 128])
    batch = max(1, 128 // seq_len) + rng.choice([0, 1, 4])
    call = {}
    if rng.random() < 0.5:
        call["seq_lens"] = torch.tensor([rng.randint(0, seq_len) for _ in range(batch)])
    if rng.random() < 0.3:
        call["n_loops"] = torch.tensor([rng.randint(0, 2) for _ in range(batch)])
    return options, batch, seq_len, call


# By make fuzz alone: each is a compilation of some seconds.
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("seed", range(20 if os.environ.get("SHIFT_FUZZ") else 0))
def test_any_problem(monkeypatch, tmp_path, seed, backward):
    rng = random.Random(2 * seed + backward)
    options, batch, seq_len, call = any_problem(rng, backward)
    on_device(monkeypatch, 227 * KB, 1, watched=True)
    own = own_kernels(monkeypatch, tmp_path, watched=True)
    block = block_of(options)
    e = torch.randn(batch, seq_len, options["d_model"]).to(BF16)
    if backward:
        check_gradients(block, e, call)
    else:
        with torch.no_grad():
            block.to(BF16)(e, backend="cuda", **{"n_loops": 1} | call)  # compiles
        check(list(own.values())[-1], block, e, range(2), **{"n_loops": 2} | call)
