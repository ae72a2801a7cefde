"""The contract once more, on a CUDA device: attention and the looped block in three dtypes."""

import itertools

import pytest
import torch

from shift_kernels import BlockSpec, LoopedBlock, attention, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Twice the error of the reference in the same dtype, and this much for luck, relative to the largest number.
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def close(ours, same, exact, dtype):
    for a, b, c in zip(ours, same, exact, strict=True):
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + FLOOR[dtype] * c.abs().max().clamp(min=1)


def with_gradients(function, inputs, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))


ATTENTIONS = {  # batch, heads, kv_heads, seq_len, head_dim
    "sanitize": (2, 2, 1, 37, 4),
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
        torch.randn(batch, h, seq_len, head_dim, device="cuda").to(dtype) for h in (heads, kv_heads, kv_heads)
    ]
    grad = torch.randn_like(qkv[0])
    lens = torch.randint(0, seq_len + 1, (batch,), device="cuda") if ragged else None
    call = dict(causal=causal, seq_lens=lens)
    wide = [x.double() for x in qkv]
    ours = with_gradients(lambda *x: attention(*x, **call, backend="triton"), qkv, grad)
    same = with_gradients(lambda *x: reference.attention(*x, **call), qkv, grad)
    close(ours, same, with_gradients(lambda *x: reference.attention(*x, **call), wide, grad), dtype)


BLOCKS = {
    "sanitize": dict(d_model=16, n_heads=4),
    "resident": dict(d_model=64, n_heads=4, injection="add"),
    "swiglu, rms, rotary": dict(
        d_model=128, n_heads=4, n_kv_heads=2, activation="swiglu", norm="rmsnorm", position="rope"
    ),
    "post-norm": dict(d_model=64, n_heads=4, norm_placement="post", loop_norm=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "own loops and lengths"])
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_looped_block_is_right(options, ragged, dtype):
    torch.manual_seed(0)
    block = LoopedBlock(BlockSpec(**options), device="cuda")
    e = torch.randn(5, 33, options["d_model"], device="cuda").to(dtype)
    grad = torch.randn_like(e)
    names, weights = zip(*block.weights().items(), strict=True)
    lens = torch.tensor([33, 0, 1, 20, 32], device="cuda") if ragged else None
    loops = torch.tensor([3, 2, 0, 1, 2], device="cuda") if ragged else 3

    def run(backend, dtype):
        def call(e, *w):
            module = dict(zip(names, w, strict=True))
            return torch.func.functional_call(
                block, module, (e, loops), dict(seq_lens=lens, backend=backend)
            )  # fmt: skip

        return with_gradients(call, [e.to(dtype), *(w.to(dtype) for w in weights)], grad)

    # The exact weights are those that the dtype can hold.
    weights = [w.detach().to(dtype) for w in weights]
    close(run("triton", dtype), run("torch", dtype), run("torch", torch.float64), dtype)


@pytest.fixture
def training():
    torch.manual_seed(0)
    block = LoopedBlock(
        BlockSpec(d_model=64, n_heads=4, injection="add"), device="cuda", dtype=torch.bfloat16
    )
    e = torch.randn(64, 32, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return block, e, [e, *block.parameters()]


def test_two_hundred_calls_give_the_same_bits(training):
    block, e, inputs = training
    first = torch.autograd.grad(block(e, 4, backend="triton").float().square().sum(), inputs)
    for _ in range(200):
        again = torch.autograd.grad(block(e, 4, backend="triton").float().square().sum(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_two_hundred_attentions_give_the_same_bits():
    qkv = [torch.randn(4, 4, 200, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    grad = torch.randn_like(qkv[0])
    runs = (with_gradients(lambda *x: attention(*x, backend="triton"), qkv, grad) for _ in range(200))
    for a, b in itertools.pairwise(runs):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_two_thousand_steps_leave_no_memory_behind(training):
    block, e, inputs = training
    for step in range(2000):
        torch.autograd.grad(block(e, 1 + step % 4, backend="triton").float().square().sum(), inputs)
        if step == 20:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def test_compiled_model_runs_without_a_graph_break(training):
    block, e, _ = training
    compiled = torch.compile(lambda e, n: block(e, n, backend="triton").sin(), fullgraph=True)
    for n in (1, 3):
        torch.testing.assert_close(
            compiled(e, torch.tensor(n)), block(e, n, backend="torch").sin(), rtol=2e-2, atol=2e-2
        )


def test_float32_parameters_under_bf16_autocast_keep_the_residual_stream_in_float32():
    torch.manual_seed(0)
    block = LoopedBlock(BlockSpec(d_model=64, n_heads=4), device="cuda")
    e = torch.randn(4, 16, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        ours, same = block(e, 3, backend="triton"), block(e, 3, backend="torch")
    assert ours.dtype == torch.float32
    close([ours], [same], [block(e, 3, backend="torch")], torch.bfloat16)
