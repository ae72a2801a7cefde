"""The contract once more, on a CUDA device: attention, and the looped block by every backend for a GPU."""

import itertools
import shutil

import pytest
import torch

from benchmarks.gpu import device
from benchmarks.gpu.cases import Block
from benchmarks.gpu.work import rehearsing
from shift_kernels import (
    BlockSpec,
    LoopedBlock,
    ShiftInputError,
    attention,
    backends,
    explain,
    reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not device.exists(), reason="needs a CUDA device"),
]
DEVICE = "cpu" if rehearsing() else "cuda"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Twice the error of the reference in the same dtype, and this much for luck, relative to the largest number.
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def close(ours, same, exact, dtype):
    for a, b, c in zip(ours, same, exact, strict=True):
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + FLOOR[dtype] * c.abs().max().clamp(min=1)


def with_gradients(function, inputs, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    grads = torch.autograd.grad(out, inputs, grad.to(out.dtype), allow_unused=True, materialize_grads=True)
    return out.detach(), *grads


ATTENTIONS = {  # batch, heads, kv_heads, seq_len, head_dim
    "small": (2, 2, 1, 37, 4),
    "odd": (2, 6, 2, 151, 24),
    "wide": (1, 4, 4, 300, 128),
    "long": (1, 2, 2, 1500, 64),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_is_right(shape, causal, ragged, dtype):
    torch.manual_seed(0)
    batch, heads, kv_heads, seq_len, head_dim = shape
    qkv = [
        torch.randn(batch, h, seq_len, head_dim, device=DEVICE).to(dtype) for h in (heads, kv_heads, kv_heads)
    ]
    grad = torch.randn_like(qkv[0])
    lens = torch.randint(0, seq_len + 1, (batch,), device=DEVICE) if ragged else None
    call = dict(causal=causal, seq_lens=lens)
    wide = [x.double() for x in qkv]
    ours = with_gradients(lambda *x: attention(*x, **call, backend="triton"), qkv, grad)
    same = with_gradients(lambda *x: reference.attention(*x, **call), qkv, grad)
    close(ours, same, with_gradients(lambda *x: reference.attention(*x, **call), wide, grad), dtype)


BLOCKS = {
    "small": dict(d_model=64, n_heads=4, injection="add"),
    "odd": dict(d_model=16, n_heads=4),
    "swiglu, rms, rotary": dict(
        d_model=128, n_heads=4, n_kv_heads=2, activation="swiglu", norm="rmsnorm", position="rope"
    ),
    "post-norm": dict(d_model=64, n_heads=4, norm_placement="post", loop_norm=True),
    "sandwich": dict(d_model=64, n_heads=2, norm_placement="sandwich", residual_scale=0.5, causal=False),
    "attention only": dict(d_model=64, n_heads=2, d_ff=0, norm="none"),
    "trm": Block(1, 33, 512, 8, 3, "trm").options,
}
CALLS = {
    "whole": {},
    "own loops and lengths": dict(
        n_loops=torch.tensor([3, 2, 0, 1, 2]), seq_lens=torch.tensor([33, 0, 1, 20, 32])
    ),
    "every loop, truncated": dict(return_all_loops=True, n_grad_loops=2),
}
every_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])


def needs(backend, spec, seq_len, dtype, batch=1):
    """Skip what the backend does not serve, with its reason."""
    try:
        explain(spec, batch, seq_len, dtype, DEVICE, backend=backend)
    except ShiftInputError as refusal:
        pytest.skip(f"{backend}: {refusal}")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_library_serves_this_device():
    assert backends()["cuda"] == "available"


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_looped_block_is_right(options, call, dtype, backend):
    torch.manual_seed(0)
    block = LoopedBlock(BlockSpec(**options), device=DEVICE)
    needs(backend, block.spec, 33, dtype)
    e = torch.randn(5, 33, options["d_model"], device=DEVICE).to(dtype)
    names, weights = zip(*block.weights().items(), strict=True)
    call = {"n_loops": 3} | {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    grad = torch.randn_like(block(e.float(), **call, backend="torch"))

    def run(backend, dtype):
        def looped(e, *w):
            return torch.func.functional_call(
                block, dict(zip(names, w, strict=True)), e, {**call, "backend": backend}
            )

        return with_gradients(looped, [e.to(dtype), *(w.to(dtype) for w in weights)], grad)

    # The exact weights are those that the dtype can hold.
    weights = [w.detach().to(dtype) for w in weights]
    close(run(backend, dtype), run("torch", dtype), run("torch", torch.float64), dtype)


@pytest.fixture
def training():
    torch.manual_seed(0)
    block = LoopedBlock(
        BlockSpec(d_model=64, n_heads=4, injection="add"), device=DEVICE, dtype=torch.bfloat16
    )
    e = torch.randn(64, 32, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    return block, e, [e, *block.parameters()]


@every_backend
def test_two_hundred_calls_give_the_same_bits(training, backend):
    block, e, inputs = training
    needs(backend, block.spec, e.shape[1], e.dtype)
    first = torch.autograd.grad(block(e, 4, backend=backend).float().square().sum(), inputs)
    for _ in range(200):
        again = torch.autograd.grad(block(e, 4, backend=backend).float().square().sum(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_two_hundred_attentions_give_the_same_bits():
    qkv = [torch.randn(4, 4, 200, 32, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
    grad = torch.randn_like(qkv[0])
    runs = (with_gradients(lambda *x: attention(*x, backend="triton"), qkv, grad) for _ in range(200))
    for a, b in itertools.pairwise(runs):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every_backend
def test_two_thousand_steps_leave_no_memory_behind(training, backend):
    block, e, inputs = training
    needs(backend, block.spec, e.shape[1], e.dtype)
    for step in range(2000):
        torch.autograd.grad(block(e, 1 + step % 4, backend=backend).float().square().sum(), inputs)
        if step == 20:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


@every_backend
def test_compiled_model_runs_without_a_graph_break(training, backend):
    block, e, _ = training
    needs(backend, block.spec, e.shape[1], e.dtype)
    torch._dynamo.reset()
    compiled = torch.compile(lambda e, n: block(e, n, backend=backend).sin(), fullgraph=True)
    for n in (1, 3):
        torch.testing.assert_close(
            compiled(e, torch.tensor(n)), block(e, n, backend="torch").sin(), rtol=2e-2, atol=2e-2
        )


@every_backend
def test_float32_parameters_under_bf16_autocast_keep_the_residual_stream_in_float32(backend):
    torch.manual_seed(0)
    block = LoopedBlock(BlockSpec(d_model=64, n_heads=4), device=DEVICE)
    needs(backend, block.spec, 16, torch.bfloat16)
    e = torch.randn(4, 16, 64, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, same = block(e, 3, backend=backend), block(e, 3, backend="torch")
    assert ours.dtype == torch.float32
    close([ours], [same], [block(e, 3, backend="torch")], torch.bfloat16)
