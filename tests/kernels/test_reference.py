"""The meaning of a looped block, held against torch.nn and against itself."""

import itertools
import math

import pytest
import torch
from torch import nn

from shift_kernels import BlockSpec, LoopedBlock, attention, looped_block, reference
from shift_kernels.spec import ACTIVATIONS

F64 = torch.float64


def make(seed=0, batch=3, seq_len=5, **options):
    """A float64 block with random parameters (norms and biases too) and an input that wants a gradient."""
    torch.manual_seed(seed)
    block = LoopedBlock(BlockSpec(**{"d_model": 8, "n_heads": 2, "d_ff": 12, **options}), dtype=F64)
    for p in block.parameters():
        nn.init.normal_(p, std=0.4)
    return block, torch.randn(batch, seq_len, block.spec.d_model, dtype=F64, requires_grad=True)


def gradients(block, e, **call):
    out = block(e, **call)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out, torch.autograd.grad(out, [e, *block.parameters()], cotangent)


# One option at a time away from a common base, and a few that interact.
OPTIONS = {
    "pre": {},
    "post": {"norm_placement": "post"},
    "sandwich": {"norm_placement": "sandwich"},
    "rmsnorm": {"norm": "rmsnorm"},
    "no norm": {"norm": "none"},
    "attention only": {"d_ff": 0},
    **{name: {"activation": name} for name in ACTIVATIONS if name != "gelu"},  # which all others have
    "no bias": {"bias": False},
    "full attention": {"causal": False},
    "rope": {"position": "rope"},
    "injection": {"injection": "add"},
    "loop norm": {"loop_norm": True, "injection": "add"},
    "two layers": {"n_layers": 2},
    "grouped heads": {"n_heads": 4, "n_kv_heads": 2},
    "narrow heads": {"head_dim": 2, "position": "rope"},
    "scaled residual": {"residual_scale": 0.5},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.mark.parametrize(
    ("norm_first", "activation", "causal", "bias"),
    list(itertools.product([True, False], ["relu", "gelu"], [True, False], [True, False])),
)
def test_equals_torchs_encoder_layer_applied_t_times(norm_first, activation, causal, bias):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16,
        4,
        24,
        dropout=0.0,
        activation=activation,
        batch_first=True,
        norm_first=norm_first,
        bias=bias,
        dtype=F64,
    )
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    block = LoopedBlock.from_torch(layer, causal=causal)
    e = torch.randn(2, 7, 16, dtype=F64, requires_grad=True)
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=F64) if causal else None

    expected = e
    for _ in range(3):
        expected = layer(expected, src_mask=mask, is_causal=causal)
    out, (grad_e, *grads) = gradients(block, e, n_loops=3)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    expected_grads = torch.autograd.grad(expected, [e, *layer.parameters()], cotangent)

    named = dict(zip((n for n, _ in block.named_parameters()), grads, strict=True))
    by_layer_order = [named[f"layers.0.{name}"] for name, _ in layer.named_parameters()]
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
    for ours, theirs in zip([grad_e, *by_layer_order], expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_from_torch_round_trips():
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, norm_first=True, batch_first=True)
    again = LoopedBlock.from_torch(layer, causal=False).to_torch()
    for (name, ours), theirs in zip(again.state_dict().items(), layer.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    e = torch.randn(2, 3, 16)
    torch.testing.assert_close(again(e), layer(e))


def test_state_dict_of_torchs_encoder_loads():
    layer = nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    block = LoopedBlock(BlockSpec(16, 4, n_layers=2, activation="relu", norm_placement="post", causal=False))
    block.load_state_dict(encoder.state_dict())
    e = torch.randn(2, 5, 16)
    torch.testing.assert_close(block(e, 1), encoder(e))


@every_option
def test_gradients_are_the_derivatives(options):
    block, e = make(batch=2, seq_len=3, **options)
    weights = block.weights()

    def f(e, *values):
        return looped_block(e, dict(zip(weights, values, strict=True)), block.spec, 2)

    # A smooth point is needed: relu's kink is hit with probability zero at this seed.
    assert torch.autograd.gradcheck(f, (e, *weights.values()), fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"norm": "rmsnorm", "activation": "swiglu"}, {"position": "rope"}])
def test_second_derivatives_exist_and_are_right(options):
    block, e = make(batch=1, seq_len=3, **options)
    assert torch.autograd.gradgradcheck(lambda e: block(e, 2), (e,), fast_mode=True)


@every_option
def test_t_loops_are_t_single_loops(options):
    block, e = make(**options)
    h = torch.zeros_like(e) if block.spec.injection == "add" else e
    body = LoopedBlock(BlockSpec(**{**block.spec.to_dict(), "injection": "none"}), dtype=F64)
    body.load_state_dict(block.state_dict())
    for _ in range(3):
        h = body(h + e if block.spec.injection == "add" else h, 1)
    torch.testing.assert_close(block(e, 3), h, atol=1e-12, rtol=1e-12)


def test_no_loops_return_memory_of_their_own():
    block, e = make(injection="none")
    with torch.no_grad():
        block(e, 0, backend="torch").fill_(7)
    assert not (e == 7).any()


@pytest.mark.parametrize("n_loops", [0, torch.zeros(3, dtype=torch.int64)], ids=["int", "own"])
@pytest.mark.parametrize("call", [{}, {"return_all_loops": True}], ids=["last", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("injection", ["none", "add"])
def test_no_loops_give_weights_a_gradient_of_zero(injection, dtype, call, n_loops):
    block, e = make(injection=injection)  # in float32 the cpu backend's, where there is one
    block, e = block.to(dtype), e.detach().to(dtype)
    for p in block.parameters():
        nn.init.constant_(p, torch.nan)
    block(e, n_loops, **call).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in block.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_last_loops_give_the_input_a_gradient_of_zero(dtype):
    block, e = make()
    block, e = block.to(dtype).requires_grad_(False), e.detach().to(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(block(e, 3, n_grad_loops=1).sum(), e)
    assert torch.equal(grad, torch.zeros_like(e))


@pytest.mark.parametrize("injection", ["none", "add"])
def test_zero_loops_return_the_initial_state(injection):
    block, e = make(injection=injection)
    assert torch.equal(block(e, 0), e if injection == "none" else torch.zeros_like(e))


@every_option
def test_ragged_samples_equal_the_same_samples_alone(options):
    block, e = make(**options)
    lens = torch.tensor([5, 2, 0])
    out, grads = gradients(block, e, n_loops=2, seq_lens=lens)
    for b, n in enumerate(lens.tolist()):
        assert torch.equal(out[b, n:], torch.zeros_like(out[b, n:]))
        if n:
            alone = block(e[b : b + 1, :n], 2)
            torch.testing.assert_close(out[b : b + 1, :n], alone, atol=1e-12, rtol=1e-12)
    assert torch.equal(grads[0][1, 2:], torch.zeros(3, 8, dtype=F64))


@every_option
def test_nan_in_pads_reaches_nothing(options):
    block, e = make(**options)
    lens = torch.tensor([5, 2, 3])
    pad = torch.arange(5) >= lens[:, None]
    clean, clean_grads = gradients(block, e, n_loops=2, seq_lens=lens)

    poisoned = e.detach().clone()
    poisoned[pad] = torch.nan
    poisoned.requires_grad_()
    out = block(poisoned, 2, seq_lens=lens)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    cotangent[pad] = torch.nan
    grads = torch.autograd.grad(out, [poisoned, *block.parameters()], cotangent)
    assert torch.equal(out, clean)
    for ours, theirs in zip(grads, clean_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_packed_sequences_equal_padded_ones():
    block, e = make(injection="add")
    lens = torch.tensor([5, 2, 3])
    valid = torch.arange(5) < lens[:, None]
    offsets = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    packed = block(e[valid], 2, cu_seqlens=offsets)
    assert torch.equal(packed, block(e, 2, seq_lens=lens)[valid])
    every = block(e[valid], 2, cu_seqlens=offsets, return_all_loops=True)
    assert torch.equal(every[-1], packed)


@every_option
def test_each_sample_runs_its_own_loops(options):
    block, e = make(**options)
    loops = torch.tensor([3, 0, 1])
    out, grads = gradients(block, e, n_loops=loops)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    total = [torch.zeros_like(g) for g in grads[1:]]
    for b, n in enumerate(loops.tolist()):
        one = e[b : b + 1].detach().requires_grad_()
        alone = block(one, n)
        torch.testing.assert_close(out[b : b + 1], alone, atol=1e-12, rtol=1e-12)
        if n:
            grad_e, *more = torch.autograd.grad(alone, [one, *block.parameters()], cotangent[b : b + 1])
            torch.testing.assert_close(grads[0][b : b + 1], grad_e, atol=1e-10, rtol=1e-10)
            total = [a + b for a, b in zip(total, more, strict=True)]
    for ours, theirs in zip(grads[1:], total, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_what_a_finished_sample_would_become_reaches_no_gradient():
    block, e = make(norm="none", d_ff=0)
    e = e.detach().clone()
    e[1] = 1e200  # one more loop would overflow
    e.requires_grad_()
    loops = torch.tensor([2, 0, 3])
    for grads in (
        gradients(block, e, n_loops=loops)[1],
        gradients(block, e, n_loops=loops, n_grad_loops=1)[1],
    ):
        assert all(g.isfinite().all() for g in grads)


def test_zero_dimensional_loops_mean_all_samples():
    block, e = make()
    assert torch.equal(block(e, torch.tensor(3)), block(e, 3))


@pytest.mark.parametrize("loops", [3, torch.tensor([3, 1, 2])], ids=["same", "own"])
def test_all_loops_are_the_states_after_each_loop(loops):
    block, e = make(injection="add")
    every = block(e, loops, return_all_loops=True)
    own = torch.as_tensor(loops).expand(3)
    assert every.shape == (3, *e.shape)
    for t in (1, 2, 3):
        torch.testing.assert_close(every[t - 1], block(e, own.clamp(max=t)), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("loops", [3, torch.tensor([3, 1, 2])], ids=["same", "own"])
def test_truncation_gives_the_gradient_of_the_last_loops_alone(loops, k):
    block, e = make(injection="add")
    own = torch.as_tensor(loops).expand(3)
    out, grads = gradients(block, e, n_loops=loops, n_grad_loops=k)
    torch.testing.assert_close(out, block(e, loops), atol=1e-12, rtol=1e-12)

    # The same by hand: the state before the last k loops is a constant.
    body = LoopedBlock(BlockSpec(**{**block.spec.to_dict(), "injection": "none"}), dtype=F64)
    body.load_state_dict(block.state_dict())
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    total = [torch.zeros_like(g) for g in grads]
    for b, n in enumerate(own.tolist()):
        one = e[b : b + 1].detach().requires_grad_()
        h = block(one.detach(), max(n - k, 0)).detach()
        for _ in range(min(k, n)):
            h = body(h + one, 1)
        grad_e, *more = torch.autograd.grad(h, [one, *body.parameters()], cotangent[b : b + 1])
        total[0][b] = grad_e[0]
        total[1:] = [x + y for x, y in zip(total[1:], more, strict=True)]
    for ours, theirs in zip(grads, total, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_halting_stops_each_sample_by_its_own_change():
    block, e = make(batch=4, norm_placement="post")
    with torch.no_grad():
        states = [e, *block(e, 12, return_all_loops=True)]
        rms = lambda x: x.square().mean((1, 2)).sqrt()  # noqa: E731
        change = torch.stack([rms(b - a) / rms(a) for a, b in itertools.pairwise(states)])
        threshold = float(change[4].median())  # so that samples stop at different loops
        h, used = block(e, 12, halt_threshold=threshold)
    expected = [next((t + 1 for t in range(12) if change[t, b] < threshold), 12) for b in range(4)]
    assert used.tolist() == expected
    assert len(set(expected)) > 1
    for b, t in enumerate(expected):
        torch.testing.assert_close(h[b], states[t][b], atol=1e-12, rtol=1e-12)


def test_halting_respects_own_loops_and_pads():
    block, e = make()
    with torch.no_grad():
        padded = torch.cat([e, torch.full_like(e, torch.nan)], dim=1)
        h, used = block(
            padded, torch.tensor([2, 0, 9]), halt_threshold=1e-9, seq_lens=torch.tensor([5, 5, 5])
        )
        assert used.tolist() == [2, 0, 9]
        torch.testing.assert_close(h[:, :5], block(e, torch.tensor([2, 0, 9])), atol=1e-12, rtol=1e-12)


def eight_layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values laid out in memory in eight ways."""
    a, b, c = x.shape
    views = {"contiguous": x.clone()}
    views["transposed"] = x.transpose(0, 1).clone().transpose(0, 1)
    views["last dim outermost"] = x.permute(2, 0, 1).clone().permute(1, 2, 0)
    views["slice of wider"] = torch.full((a, b, c + 3), torch.nan, dtype=x.dtype)[..., 1 : c + 1].copy_(x)
    views["every second"] = torch.full((a, 2 * b, c), torch.nan, dtype=x.dtype)[:, ::2].copy_(x)
    views["offset"] = torch.full((x.numel() + 5,), torch.nan, dtype=x.dtype)[5:].view(a, b, c).copy_(x)
    views["part of a cat"] = torch.cat([x, x], dim=1)[:, b:]
    views["every third sample"] = torch.full((3 * a, b, c), torch.nan, dtype=x.dtype)[::3].copy_(x)
    return views


def test_memory_layout_of_input_and_gradient_does_not_matter():
    block, e = make(seq_len=4)
    inputs = [e, *block.parameters()]
    out, cotangent = block(e, 2), torch.randn(e.shape, dtype=F64)
    expected = torch.autograd.grad(out, inputs, cotangent, retain_graph=True)
    for name, view in eight_layouts(e.detach()).items():
        assert torch.equal(block(view, 2), out), name
    for name, view in eight_layouts(cotangent).items():
        grads = torch.autograd.grad(out, inputs, view, retain_graph=True)
        for ours, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12, msg=name)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_attention_equals_torchs(causal, n_kv_heads):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 6, 8, dtype=F64)
    k, v = (torch.randn(2, n_kv_heads, 6, 8, dtype=F64) for _ in range(2))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, causal=causal), expected, atol=1e-12, rtol=1e-12)


def test_attention_ignores_pads_and_defines_empty_rows_as_zero():
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 4, 8, dtype=F64) for _ in range(3))
    for x in (q, k, v):
        x[1, :, 2:] = torch.nan
        x[2] = torch.nan
        x.requires_grad_()
    out = attention(q, k, v, causal=False, seq_lens=torch.tensor([4, 2, 0]))
    torch.testing.assert_close(out[1, :, :2], attention(*(x[1:2, :, :2] for x in (q, k, v)), causal=False)[0])
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    grads = torch.autograd.grad(out.sum(), [q, k, v])
    assert all(g.isfinite().all() and not g[2].any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_has_the_inputs_dtype(dtype):
    block = LoopedBlock(BlockSpec(16, 2), dtype=torch.float32)
    assert block(torch.randn(2, 3, 16, dtype=dtype), 2, backend="torch").dtype == dtype


def test_autocast_keeps_the_residual_stream_in_the_inputs_dtype():
    torch.manual_seed(0)
    block = LoopedBlock(BlockSpec(32, 2, injection="add"))
    e = torch.randn(4, 6, 32)
    exact = LoopedBlock(block.spec, dtype=F64)
    exact.load_state_dict(block.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(e, 8)
    all_bf16 = LoopedBlock(block.spec, dtype=torch.bfloat16)
    all_bf16.load_state_dict(block.state_dict())
    truth = exact(e.double(), 8)
    error = (mixed - truth).abs().mean()
    assert mixed.dtype == torch.float32
    assert 0 < error < (all_bf16(e.bfloat16(), 8) - truth).abs().mean()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["e", "layers.0.self_attn.in_proj_bias", "layers.0.linear1.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_fused_attention_of_the_torch_backend_hides_nothing(causal, name, value):
    """Where scores are all NaN, PyTorch's fused attention on a CPU gives 0."""
    torch.manual_seed(0)
    block = LoopedBlock(BlockSpec(d_model=8, n_heads=2, d_ff=16, norm="none", causal=causal))
    e = torch.randn(2, 5, 8)
    weights = {key: w.detach().clone() for key, w in block.weights().items()}
    (e if name == "e" else weights[name]).view(-1)[0] = value

    def results(run):
        inputs = [x.clone().requires_grad_() for x in (e, *weights.values())]
        h = run(inputs[0], dict(zip(weights, inputs[1:], strict=True)))
        return h.detach(), *torch.autograd.grad(h, inputs, torch.ones_like(h))

    ours = results(lambda e, w: looped_block(e, w, block.spec, n_loops=2, backend="torch"))
    plain = results(lambda e, w: reference.looped_block(e, w, block.spec, 2)[0])
    for of, a, b in zip(["h", "e", *weights], ours, plain, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), of
