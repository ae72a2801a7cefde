"""The cuda backend from the public call down to its kernels, which an emulated GPU runs on CPU tensors.

What a GPU makes of the same sources is not tested here: tests/gpu does that, where there is one.
"""

import copy
import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch
from cuda_emulation import LIBRARY, emulated
from operator_arguments import ops_arguments
from torch._dynamo.utils import counters

import build_native
from benchmarks.gpu.cases import KINDS
from shift_kernels import BlockSpec, LoopedBlock, ShiftInputError, backends, compiled, explain
from shift_kernels.backends import cuda as cuda_backend
from shift_kernels.backends import weight_gradients
from shift_kernels.call import CallOptions

ROOT = Path(__file__).parents[2]
BF16 = torch.bfloat16
needs_emulation = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(params=[False, True], ids=["sm_80", "sm_90a"])
def gpu(monkeypatch, request):
    """The backend on an emulated GPU."""
    library = emulated(*LIBRARY).library
    monkeypatch.setattr(cuda_backend, "HOPPER", cuda_backend.Limits(227 * 1024, 132, request.param))
    monkeypatch.setattr(cuda_backend, "_LIBRARY", compiled.load("_native_cuda", Path(library._name))[0])
    return library


def make(batch=3, seq_len=9, dtype=BF16, **options):
    torch.manual_seed(0)
    block = LoopedBlock(BlockSpec(**{"d_model": 64, "n_heads": 4, "d_ff": 80, **options}), dtype=dtype)
    for p in block.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1) * 0.5, std=0.15)
    return block, torch.randn(batch, seq_len, block.spec.d_model).to(dtype)


def results(block, e, call, backend, dtype):
    """Output and all gradients."""
    e = e.detach().to(dtype).requires_grad_()
    weights = {name: p.detach().to(dtype).requires_grad_() for name, p in block.named_parameters()}
    h = torch.func.functional_call(block, weights, e, {"backend": backend, **call})
    if not h.requires_grad:  # no loops, and with injection not even e is read
        return [h, *map(torch.zeros_like, [e, *weights.values()])]
    grad = torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(h, [e, *weights.values()], grad, allow_unused=True, materialize_grads=True)
    return [h.detach(), *grads]


def check(block, e, call):
    """Each at most twice as far from float64 as torch's in the same dtype, and some roundings."""
    exact, theirs = (results(block, e, call, "torch", dtype) for dtype in (torch.float64, e.dtype))
    ours = results(block, e, call, "cuda", e.dtype)
    for name, a, b, c in zip(["h", "e", *block.weights()], ours, theirs, exact, strict=True):
        assert a.dtype == e.dtype
        allowed = 2 * (b - c).abs().max() + 4 * torch.finfo(e.dtype).eps * c.abs().max()
        assert (a - c).abs().max() <= allowed, name


@pytest.mark.skipif(build_native.nvcc() is None, reason="needs nvcc")
def test_library_is_there_wherever_it_can_be_built():
    library, status = compiled.load("_native_cuda")
    assert library is not None, f"{status}; build it: CUDA_ARCHS=default pip install -e ."


def test_code_for_an_architecture_runs_on_it_and_where_ptx_goes_further():
    for archs, served in (
        (("sm_80",), {(8, 0), (8, 6), (9, 0), (12, 0)}),
        (("sm_90a",), {(9, 0)}),
        (("sm_80", "sm_90a"), {(8, 0), (8, 6), (9, 0), (12, 0)}),
    ):
        devices = ((7, 5), (8, 0), (8, 6), (9, 0), (12, 0))
        assert {c for c in devices if cuda_backend.runs_on(archs, *c)} == served


@needs_emulation
def test_a_block_that_no_tile_holds_is_refused_in_words(gpu):
    block, e = make(seq_len=200)
    with pytest.raises(ShiftInputError, match="seq_len > 128"):
        block(e, 1, backend="cuda")
    with pytest.raises(ShiftInputError, match="fp16 or bf16"):
        block.float()(e.float(), 1, backend="cuda")


@needs_emulation
@pytest.mark.parametrize("sm90a", [False, True])
@pytest.mark.parametrize("d_model", [64, 512, 1024])
def test_only_the_next_multiple_of_16_of_seq_len_decides(gpu, d_model, sm90a):
    library, limits = cuda_backend._LIBRARY, cuda_backend.Limits(96 * 1024, cuda_backend.HOPPER.n_sms, sm90a)
    spec = BlockSpec(d_model=d_model, n_heads=d_model // 32)
    for backward in (False, True):
        served = [
            library.plan(cuda_backend.sizes(spec, 1, n, BF16, BF16, limits), backward=backward).refusal
            for n in range(1, 145)
        ]
        for n, refusal in enumerate(served, 1):
            just_fits = sm90a and not refusal  # where the multiple may not
            assert just_fits or refusal == served[cuda_backend._rows(n) - 1]


@needs_emulation
def test_explain_tells_the_tile_and_what_is_kept(gpu):
    block, e = make()
    text = explain(block.spec, *e.shape[:2], BF16, n_loops=3, backend="cuda")
    # For all architectures a sequence's rows in steps of 16; for sm_90a as many sequences as 64 rows hold.
    programs = "1 programs of 63" if cuda_backend.HOPPER.sm90a else "3 programs of 16"
    for direction in ("forward", "backward"):
        assert f"{direction} {programs} tokens, residual stream in shared memory" in text
    kept = cuda_backend.CUDA.saved_like(e, block.spec, 3)[0].nbytes
    assert f"{kept / 2**20:.1f} MiB" in text
    assert backends()["cuda"] == "available"


OPTIONS = {
    "two layers, post, swiglu, rope": KINDS["trm"] | {"d_ff": 80},
    "sandwich, loop norm, grouped heads": dict(
        norm_placement="sandwich", loop_norm=True, n_kv_heads=2, head_dim=32, residual_scale=0.5
    ),
}
CALLS = {
    "plain": {"n_loops": 2},
    "no loops": {"n_loops": 0},
    "ragged, own loops": {"n_loops": torch.tensor([2, 0, 1]), "seq_lens": torch.tensor([9, 4, 0])},
    "all loops, truncated": {"n_loops": 3, "return_all_loops": True, "n_grad_loops": 2},
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@needs_emulation
@every_call
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_are_right(gpu, options, call):
    check(*make(**options), call)


@needs_emulation
def test_splitting_the_loops_over_launches_changes_only_rounding(gpu, monkeypatch):
    monkeypatch.setattr(weight_gradients, "OPERAND_BYTES", 1)
    check(*make(n_layers=2, injection="add"), {"n_loops": 3})


def off_alignment(x):
    """The same numbers, contiguous, at an address that is a multiple of their size alone."""
    memory = x.new_empty(x.numel() + 8)
    shift = next(i for i in range(8) if (memory.data_ptr() + i * x.itemsize) % 16 == x.itemsize)
    moved = memory[shift : shift + x.numel()].view(x.shape)
    assert moved.is_contiguous()
    assert moved.data_ptr() % 16
    return moved.copy_(x)


@needs_emulation
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_contiguous_tensors_at_odd_addresses_are_taken(gpu, dtype):
    block, e = make(dtype=dtype)
    weights = {name: w.detach() for name, w in block.weights().items()}
    moved = {name: off_alignment(w) for name, w in weights.items()}
    options = CallOptions(2, BF16 if dtype == torch.float32 else dtype)

    def run(e, weights, move):
        h, _, saved = cuda_backend.CUDA.forward(e, weights, block.spec, options, for_backward=True)
        grad_e, grads = cuda_backend.CUDA.backward(
            move(torch.ones_like(h)), e, weights, block.spec, options, list(map(move, saved))
        )
        return [h, grad_e, *grads]

    expected = run(e, weights, lambda x: x)
    for a, b in zip(run(off_alignment(e), moved, off_alignment), expected, strict=True):
        assert torch.equal(a, b)


@needs_emulation
def test_float16_on_hopper_is_served_by_the_kernels_for_every_gpu(gpu):
    block, e = make()
    for dtype, tiles in ((torch.float16, False), (BF16, cuda_backend.HOPPER.sm90a)):
        call = cuda_backend.sizes(block.spec, *e.shape[:2], dtype, dtype, cuda_backend.HOPPER)
        assert (cuda_backend._LIBRARY.plan(call, backward=False).tiles > 0) == tiles
        kernels = "sm_90a" if tiles else "sm_80"
        assert f"kernels for {kernels}" in explain(block.spec, *e.shape[:2], dtype, backend="cuda")


@needs_emulation
def test_float32_weights_under_autocast_keep_the_residual_stream_in_float32(gpu):
    block, e = make(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        ours, same = (block(e, 3, backend=name) for name in ("cuda", "torch"))
    exact = block.double()(e.double(), 3, backend="torch")
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 2 * (same - exact).abs().max()


@needs_emulation
def test_weights_of_two_dtypes_are_taken(gpu):
    block, e = make()
    expected = block(e, 2, backend="cuda")
    block.layers.get_submodule("0").norm1.float()
    assert torch.equal(block(e, 2, backend="cuda"), expected)


@needs_emulation
def test_halting_stops_where_the_reference_stops(gpu):
    block, e = make(dtype=torch.float16, norm_placement="post", injection="add")
    with torch.no_grad():
        h, used = block(e, 8, halt_threshold=0.2, backend="cuda")
        same, expected = block.float()(e.float(), 8, halt_threshold=0.2, backend="torch")
    assert used.tolist() == expected.tolist()
    assert 1 < int(used.min()) < 8
    torch.testing.assert_close(h.float(), same, atol=2e-2, rtol=2e-2)


@needs_emulation
@pytest.mark.parametrize("own", [False, True], ids=["same", "own loops"])
def test_operator_passes_opcheck(gpu, own):
    block, e = make(loop_norm=True)
    args = ops_arguments(
        e.requires_grad_(),
        block,
        n_loops=0 if own else 2,
        sample_loops=torch.tensor([2, 0, 1]) if own else None,
        compute_dtype=BF16,
        backend="cuda",
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.shift_kernels.looped_block, args, test_utils=checks)


@needs_emulation
def test_compiled_model_runs_it_without_recompiling(gpu):
    torch._dynamo.reset()
    counters.clear()
    block, e = make(injection="add")
    e.requires_grad_()
    compiled = torch.compile(
        lambda e, n: block(e, n, backend="cuda").sin(), fullgraph=True, backend="aot_eager"
    )
    for n_loops in (1, 3, 2):
        ours = torch.autograd.grad(compiled(e, torch.tensor(n_loops)).sum(), [e, *block.parameters()])
        plain = torch.autograd.grad(block(e, n_loops, backend="cuda").sin().sum(), [e, *block.parameters()])
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, atol=1e-2, rtol=5e-2)
    assert counters["stats"]["unique_graphs"] == 1


@needs_emulation
def test_compiled_model_takes_lengths_that_vary(gpu):
    torch._dynamo.reset()
    block, e = make(seq_len=40)
    compiled = torch.compile(lambda e: block(e, 1, backend="cuda").sin(), fullgraph=True, backend="aot_eager")
    for seq_len in (9, 12, 40):
        x = e[:, :seq_len]
        torch.testing.assert_close(compiled(x), block(x, 1, backend="cuda").sin(), atol=1e-2, rtol=5e-2)


# Every option that says where a number goes, each in one of these.
NONFINITE = {
    "relu": {"activation": "relu", "norm": "none"},
    "gelu": {"activation": "gelu", "norm_placement": "post", "position": "rope"},
    "gelu_tanh": {"activation": "gelu_tanh", "norm": "rmsnorm", "causal": False, "injection": "add"},
    "swiglu": {"activation": "swiglu", "norm_placement": "sandwich", "loop_norm": True},
}


@needs_emulation
@pytest.mark.parametrize("options", NONFINITE.values(), ids=NONFINITE)
def test_what_is_not_finite_in_plain_pytorch_is_not_finite_here(gpu, options):
    """Not: and nothing else. Sequences that share a program share its NaN (csrc/cuda/NOTES.md)."""
    block, e = make(batch=2, seq_len=4, **options)
    values = itertools.cycle((math.nan, math.inf, -math.inf))
    for target, value in zip(("e", *block.weights()), values):  # noqa: B905
        planted, x = copy.deepcopy(block), e.clone()
        with torch.no_grad():
            where = x if target == "e" else planted.weights()[target]
            where[(1, 3, 2) if target == "e" else tuple(min(3, n - 1) for n in where.shape)] = value
        ours, plain = (results(planted, x, {"n_loops": 2}, backend, BF16) for backend in ("cuda", "torch"))
        for name, a, b in zip(["h", "the gradient of e", *block.weights()], ours, plain, strict=True):
            assert not (a.isfinite() & ~b.isfinite()).any(), f"{value} in {target}: {name} hides it"
