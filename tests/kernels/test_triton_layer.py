"""The streamed looped block against the reference in float64, in Triton's interpreter."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from triton_interpreter import DEVICE

if DEVICE != "cpu":
    pytest.skip("runs in Triton's interpreter; tests/gpu is for this machine", allow_module_level=True)

from shift_kernels import BlockSpec, LoopedBlock
from shift_kernels.backends import weight_gradients
from shift_kernels.backends.torch import TORCH
from shift_kernels.backends.triton import rows
from shift_kernels.backends.triton import streamed as layer
from shift_kernels.call import CallOptions
from shift_kernels.spec import ACTIVATIONS

F64 = torch.float64
# What the reference in the same dtype may gain by luck; relative to the largest number of a tensor.
FLOOR = {torch.float32: 4e-6, torch.float16: 4e-3}
BASE = dict(d_model=24, n_heads=3, d_ff=40)
BATCH, SEQ_LEN = 3, 7


def problem(spec, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    weights = {
        name: (w + 0.1 * torch.randn_like(w)).detach().to(dtype)
        for name, w in LoopedBlock(spec).named_parameters()
    }
    return torch.randn(BATCH, SEQ_LEN, spec.d_model, dtype=dtype), weights


def run(backend, e, weights, spec, n_loops, grad_seed=1, grad=None, **call):
    """h, loops used, grad_e, gradients of the weights."""
    call_options = CallOptions(n_loops, **{"compute_dtype": e.dtype, **call})
    with torch.no_grad():
        h, used, saved = backend.forward(e, weights, spec, call_options, for_backward=True)
        if grad is None:
            grad = torch.randn(h.shape, generator=torch.Generator().manual_seed(grad_seed)).to(e.dtype)
        grad_e, grads = backend.backward(grad.to(h.dtype), e, weights, spec, call_options, saved)
    return h, used, grad_e, grads


def check(spec, n_loops=2, dtype=torch.float32, **call):
    """Every result is at most twice as far from float64 as the reference in the same dtype."""
    e, weights = problem(spec, dtype)
    ours = run(layer, e, weights, spec, n_loops, **call)
    same = run(TORCH, e, weights, spec, n_loops, **call)
    wide = {name: w.double() for name, w in weights.items()}
    grad = torch.randn(ours[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = run(TORCH, e.double(), wide, spec, n_loops, grad=grad, **call | {"compute_dtype": F64})
    assert torch.equal(ours[1], exact[1])
    names = ["h", "e", *weights]
    flat = [[r[0], r[2], *r[3]] for r in (ours, same, exact)]
    for name, a, b, c in zip(names, *flat, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == c.shape
        if c.numel():
            coarse = call.get("compute_dtype", dtype)
            bound = 2 * (b - c).abs().max() + FLOOR[coarse] * c.abs().max().clamp(min=1)
            assert (a - c).abs().max() <= bound, f"{name}: {(a - c).abs().max():.3g} over {bound:.3g}"
    return ours


BLOCKS = {  # every value of every option in one of them
    "plain": {},
    "post, relu": dict(norm_placement="post", injection="add", activation="relu"),
    "post with loop norm, rotary": dict(norm_placement="post", loop_norm=True, position="rope"),
    "sandwich, swiglu": dict(norm_placement="sandwich", residual_scale=0.5, activation="swiglu"),
    "rms sandwich, gelu_tanh": dict(
        norm="rmsnorm", norm_placement="sandwich", loop_norm=True, activation="gelu_tanh"
    ),
    "rmsnorm, no bias, grouped heads": dict(norm="rmsnorm", bias=False, injection="add", n_kv_heads=1),
    "no norm, full attention": dict(norm="none", residual_scale=0.3, injection="add", causal=False),
    "bare, relu2, head_dim 4": dict(norm="none", bias=False, activation="relu2", head_dim=4, n_heads=6),
    "two layers with loop norm, geglu_tanh": dict(n_layers=2, loop_norm=True, activation="geglu_tanh"),
    "attention only": dict(d_ff=0, loop_norm=True, n_kv_heads=1, position="rope"),
}


def test_every_activation_is_among_the_blocks():
    assert {"gelu", *(options.get("activation", "gelu") for options in BLOCKS.values())} == set(ACTIVATIONS)


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_every_option_of_a_block_is_served(options):
    check(BlockSpec(**BASE | options))


OWN, LENS = torch.tensor([2, 0, 3]), torch.tensor([7, 0, 4])
CALLS = {
    "no loops": dict(n_loops=0),
    "ragged": dict(seq_lens=LENS),
    "own loops": dict(n_loops=OWN),
    "all loops": dict(n_loops=3, return_all_loops=True),
    "all of own loops": dict(n_loops=OWN, return_all_loops=True),
    "truncated": dict(n_loops=3, n_grad_loops=1),
    "truncated own loops": dict(n_loops=OWN, n_grad_loops=1),
    "everything": dict(n_loops=OWN, n_grad_loops=2, seq_lens=LENS, return_all_loops=True),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_option_of_a_call_is_served(call):
    check(BlockSpec(**BASE, injection="add"), **call)


@pytest.mark.parametrize("call", ["own loops", "everything"])
def test_a_state_that_starts_from_the_input_ends_with_each_sample(call):
    check(BlockSpec(**BASE, injection="none"), **CALLS[call])


@pytest.mark.parametrize("placement", ["pre", "sandwich"])
def test_half_precision_is_as_good_as_the_reference(placement):
    check(BlockSpec(**BASE, norm_placement=placement), dtype=torch.float16)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_half_precision_matmuls_leave_the_residual_stream_in_float32(placement):
    spec = BlockSpec(**BASE, norm_placement=placement, injection="add")
    h, *_ = check(spec, compute_dtype=torch.float16)
    assert h.dtype == torch.float32


def test_nan_in_pads_reaches_nothing_and_pads_return_zero():
    spec = BlockSpec(**BASE, position="rope")
    e, weights = problem(spec)
    grad = torch.randn(e.shape)
    clean = run(layer, e, weights, spec, 2, seq_lens=LENS, grad=grad)
    pad = torch.arange(SEQ_LEN) >= LENS[:, None]
    e[pad], grad[pad] = float("nan"), float("nan")
    dirty = run(layer, e, weights, spec, 2, seq_lens=LENS, grad=grad)
    for a, b in zip([clean[0], clean[2], *clean[3]], [dirty[0], dirty[2], *dirty[3]], strict=True):
        assert torch.equal(a, b)
    assert (dirty[0][pad] == 0).all()
    assert (dirty[2][pad] == 0).all()


@pytest.mark.parametrize("seq_lens", [None, LENS], ids=["whole", "ragged"])
@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_halting_stops_each_sample_where_the_reference_does(seq_lens, threshold):
    spec = BlockSpec(**BASE, injection="add")
    e, weights = problem(spec)
    call_options = CallOptions(6, e.dtype, seq_lens, return_all_loops=True, halt_threshold=threshold)
    h, used, saved = layer.forward(e, weights, spec, call_options, for_backward=False)
    expected, expected_used, _ = TORCH.forward(e, weights, spec, call_options, for_backward=False)
    assert torch.equal(used, expected_used)
    torch.testing.assert_close(h, expected, rtol=1e-4, atol=1e-5)
    assert saved == []


@pytest.mark.parametrize("n_loops", [2, OWN], ids=["alike", "own"])
def test_chunks_and_small_operand_memory_change_nothing_but_rounding(monkeypatch, n_loops):
    spec = BlockSpec(**BASE, injection="add")
    e, weights = problem(spec)
    whole = run(layer, e, weights, spec, n_loops)
    monkeypatch.setattr(layer, "_chunk_size", lambda *_: 2)
    monkeypatch.setattr(weight_gradients, "OPERAND_BYTES", 1)
    parts = run(layer, e, weights, spec, n_loops)
    for a, b in zip([whole[0], whole[2], *whole[3]], [parts[0], parts[2], *parts[3]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_same_call_gives_the_same_bits():
    spec = BlockSpec(**BASE)
    e, weights = problem(spec)
    first, again = (run(layer, e, weights, spec, 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[3], again[3], strict=True))


def test_only_boundaries_are_kept():
    spec = BlockSpec(**BASE)
    e, weights = problem(spec)
    *_, saved = layer.forward(e, weights, spec, CallOptions(3, e.dtype), for_backward=True)
    assert [x.shape for x in saved] == [(3, *e.shape)]
    assert torch.equal(saved[0][0], e)


def test_rows_beyond_the_last_and_buffers_around_are_left_alone():
    whole = torch.full((9, 20), 123.0)
    y = whole[2:7]  # contiguous rows in the middle
    x = torch.randn(5, 20)
    rows.add_norm(rows.AddNorm(x, None, None, None, (torch.ones(20), None), None, y), 1.0, "rmsnorm", 1e-5)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (20,), eps=1e-5))
    assert (whole[:2] == 123).all()
    assert (whole[7:] == 123).all()


def test_norm_gradients_are_whole_when_there_are_more_rows_than_programs(monkeypatch):
    monkeypatch.setattr(rows, "PROGRAMS", 2)
    check(BlockSpec(**BASE))


@pytest.mark.parametrize(
    ("batch", "seq_len", "d_model", "expected"),
    [
        (8, 2048, 1024, 8),  # not one sample fits L2
        (512, 64, 128, 512),  # fewer samples than the device needs
        (4096, 512, 256, 4096),  # as many as fit would leave multiprocessors idle
    ],
)
def test_chunks_fit_l2_only_where_that_fills_the_device(batch, seq_len, d_model, expected):
    spec = BlockSpec(d_model=d_model, n_heads=8)
    l2, sms = 50 * 2**20, 132
    assert layer.chunk_samples(spec, batch, seq_len, 2, l2, sms) == expected


def test_a_large_l2_cuts_the_batch():
    spec = BlockSpec(d_model=256, n_heads=8)
    size = layer.chunk_samples(spec, 4096, 512, 2, 400 * 2**20, 132)
    assert 17 <= size < 4096  # 17 samples are one tile of 128 x 128 a multiprocessor
    assert size * 40 * 256 * 2 * 512 <= 400 * 2**20
