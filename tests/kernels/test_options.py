"""The block's options and the call's: what each means, held against a few plain lines of its own."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shift_kernels import BlockSpec, LoopedBlock, ShiftInputError, looped_block, reference
from shift_kernels.backends.base import LOOPED_BLOCK
from shift_kernels.call import OWN_OPTIONS, Problem

F64 = torch.float64
INJECTIONS = ("none", "add", "concat", "diagonal", "norm_add")
OPTIONS = {
    **{name: {"injection": name} for name in INJECTIONS},
    "concat without bias": {"injection": "concat", "bias": False},
    "norm_add, rmsnorm": {"injection": "norm_add", "norm": "rmsnorm", "norm_weight": "one_plus"},
    "sandwich_post": {"norm_placement": "sandwich_post"},
    "one_plus": {"norm_weight": "one_plus", "loop_norm": True},
    "no norm weights": {"norm_weight": "none", "norm_placement": "sandwich"},
    "qk_norm": {"qk_norm": True, "n_heads": 4, "n_kv_heads": 2, "position": "rope"},
    "qk_norm, rms": {"qk_norm": True, "norm": "rmsnorm", "norm_weight": "one_plus"},
    "window": {"window": 2},
    "window, all ways": {"window": 2, "causal": False},
    "softcap": {"softcap": 0.7},
    "attn_scale": {"attn_scale": 0.9},
    "rope_freqs": {"position": "rope", "rope_freqs": (1.0, 0.3)},
    "partial rope": {"position": "rope", "rope_freqs": (0.7,), "head_dim": 5},
    "qkv_bias": {"bias": False, "qkv_bias": True},
    "no qkv_bias": {"qkv_bias": False},
    "1/T": {"residual_scale": "1/T", "norm_placement": "sandwich_post"},
    "geglu": {"activation": "geglu_tanh"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_injection = pytest.mark.parametrize("injection", INJECTIONS)


def make(seed=0, batch=3, seq_len=5, dtype=F64, **options):
    """A block with random parameters, and an input that wants a gradient."""
    torch.manual_seed(seed)
    block = LoopedBlock(BlockSpec(**{"d_model": 8, "n_heads": 2, "d_ff": 12, **options}), dtype=dtype)
    for p in block.parameters():
        nn.init.normal_(p, std=0.4)
    return block, torch.randn(batch, seq_len, 8, dtype=dtype, requires_grad=True)


def state(e: Tensor) -> Tensor:
    return torch.randn(e.shape, generator=torch.Generator().manual_seed(3), dtype=F64).to(e).requires_grad_()


def gradients(out: Tensor, inputs) -> list[Tensor]:
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(out)
    return torch.autograd.grad(out, inputs, cotangent, allow_unused=True, materialize_grads=True)


def assert_close(ours, theirs, tolerance=1e-10):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# Against autograd's numbers.


@every_option
def test_gradients_are_the_derivatives(options):
    block, e = make(batch=2, seq_len=3, **options)
    weights, h0 = block.weights(), state(e)

    def f(e, h0, *values):
        return looped_block(e, dict(zip(weights, values, strict=True)), block.spec, 2, h0=h0)

    assert torch.autograd.gradcheck(f, (e, h0, *weights.values()), fast_mode=True)


@pytest.mark.parametrize("name", ["concat", "diagonal", "norm_add", "qk_norm", "softcap", "window"])
def test_second_derivatives_exist_and_are_right(name):
    block, e = make(batch=1, seq_len=3, **{"injection": "add", **OPTIONS[name]})
    f = lambda e, h0: block(e, 2, h0=h0)  # noqa: E731
    assert torch.autograd.gradgradcheck(f, (e, state(e)), fast_mode=True)


# Against plain lines.


def written_out(block: LoopedBlock, e: Tensor, n_loops: int, layer) -> Tensor:
    """T loops of ``layer(x, weight by name)`` with the block's injection."""
    w = dict(block.named_parameters())
    injected = {
        "none": lambda h: h,
        "add": lambda h: h + e,
        "concat": lambda h: torch.cat([h, e], -1) @ w["injection.weight"].T + w.get("injection.bias", 0),
        "diagonal": lambda h: torch.exp(-F.softplus(w["injection.decay"])) * h + w["injection.gain"] * e,
        "norm_add": lambda h: (
            F.layer_norm(h, h.shape[-1:], w["injection.norm.weight"], w["injection.norm.bias"])
            + w["injection.alpha"] * e
        ),
    }[block.spec.injection]
    h = e if block.spec.injection == "none" else torch.zeros_like(e)
    for _ in range(n_loops):
        h = layer(injected(h), lambda name: w.get(f"layers.0.{name}"))
    return h


def heads(spec, w, x):
    """q, k, v [batch, n_heads, seq_len, head_dim] of a layer's input, k and v for every query head."""
    qkv = F.linear(x, w("self_attn.in_proj_weight"), w("self_attn.in_proj_bias"))
    q, k, v = qkv.split([spec.n_heads * spec.head_dim] + 2 * [spec.n_kv_heads * spec.head_dim], -1)
    q, k, v = (t.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2) for t in (q, k, v))
    return q, *(t.repeat_interleave(spec.n_heads // spec.n_kv_heads, 1) for t in (k, v))


def projected(w, scores, v):
    return F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), *out_proj(w))


def out_proj(w):
    return w("self_attn.out_proj.weight"), w("self_attn.out_proj.bias")


def causal(scores):
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)


def mlp(w, x):
    return F.linear(F.gelu(F.linear(x, w("linear1.weight"), w("linear1.bias"))), w("linear2.weight"),
                    w("linear2.bias"))  # fmt: skip


def check_written_out(layer, n_loops=3, **options):
    block, e = make(**options)
    ours, plain = block(e, n_loops), written_out(block, e, n_loops, layer)
    torch.testing.assert_close(ours, plain, atol=1e-10, rtol=1e-10)
    inputs = [e, *block.parameters()]
    assert_close(gradients(ours, inputs), gradients(plain, inputs))


def plain_layer(spec, attention=None, norm=None):
    """Pre-norm, as ``BlockSpec`` has it by default, with another attention or norm."""
    layer_norm = lambda x, w, name: F.layer_norm(x, (8,), w(f"{name}.weight"), w(f"{name}.bias"))  # noqa: E731
    norm = norm or layer_norm

    def default(w, y):
        q, k, v = heads(spec, w, y)
        return projected(w, causal(q @ k.mT / spec.head_dim**0.5), v)

    def layer(x, w):
        x = x + (attention or default)(w, norm(x, w, "norm1"))
        return x + mlp(w, norm(x, w, "norm2"))

    return layer


@every_injection
def test_injections(injection):
    check_written_out(plain_layer(BlockSpec(8, 2)), injection=injection)


def test_huginns_block():
    """arXiv 2502.05171: an adapter of [h, e], and norms in front of a branch and behind the sum with it."""
    spec = BlockSpec(8, 2, norm="rmsnorm")

    def rms(x, w, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w(f"{name}.weight")

    def layer(x, w):
        q, k, v = heads(spec, w, rms(x, w, "norm1"))
        x = rms(projected(w, causal(q @ k.mT / 2), v) + x, w, "norm1_post")
        return rms(mlp(w, rms(x, w, "norm2")) + x, w, "norm2_post")

    check_written_out(layer, injection="concat", norm="rmsnorm", norm_placement="sandwich_post", bias=False)


def test_gemmas_norm():
    def one_plus(x, w, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (1 + w(f"{name}.weight"))

    check_written_out(plain_layer(BlockSpec(8, 2), norm=one_plus), norm="rmsnorm", norm_weight="one_plus")


def test_norm_without_weights():
    layer = plain_layer(BlockSpec(8, 2), norm=lambda x, w, name: F.layer_norm(x, (8,)))
    check_written_out(layer, norm_weight="none")


def test_queries_and_keys_are_normed_before_they_are_rotated():
    spec = BlockSpec(8, 4, n_kv_heads=2)

    def attention(w, y):
        q, k, v = heads(spec, w, y)
        q, k = (F.rms_norm(x, (2,), w(f"self_attn.{n}_norm.weight"), 1e-5) for x, n in ((q, "q"), (k, "k")))
        angle = torch.arange(5, dtype=F64)[:, None]
        q, k = (torch.complex(*x.unbind(-1)) * torch.polar(torch.ones_like(angle), angle)[..., 0]
                for x in (q, k))  # fmt: skip
        q, k = torch.view_as_real(q), torch.view_as_real(k)
        return projected(w, causal(q @ k.mT / 2**0.5), v)

    layer = plain_layer(
        spec, attention, norm=lambda x, w, name: F.rms_norm(x, (8,), w(f"{name}.weight"), 1e-5)
    )
    check_written_out(layer, norm="rmsnorm", n_heads=4, n_kv_heads=2, qk_norm=True, position="rope")


@pytest.mark.parametrize("is_causal", [True, False])
def test_window_softcap_and_scale(is_causal):
    spec = BlockSpec(8, 2)
    distance = torch.arange(5)[:, None] - torch.arange(5)
    hidden = (distance < 0) | (distance >= 2) if is_causal else distance.abs() >= 2

    def attention(w, y):
        q, k, v = heads(spec, w, y)
        scores = 0.8 * torch.tanh(q @ k.mT * 0.9 / 0.8)
        return projected(w, scores.masked_fill(hidden, -math.inf), v)

    check_written_out(plain_layer(spec, attention), causal=is_causal, window=2, softcap=0.8, attn_scale=0.9)


def test_given_frequencies_rotate_the_leading_channels():
    spec = BlockSpec(8, 1, head_dim=7)
    freqs = torch.tensor([1.0, 0.25], dtype=F64)

    def rotated(x):  # channel i with channel i + 2, for i = 0, 1; channels 4, 5, 6 stay
        angle = torch.arange(5, dtype=F64)[:, None] * freqs
        turned = torch.complex(x[..., :2], x[..., 2:4]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag, x[..., 4:]], -1)

    def attention(w, y):
        q, k, v = heads(spec, w, y)
        return projected(w, causal(rotated(q) @ rotated(k).mT / 7**0.5), v)

    layer = plain_layer(spec, attention)
    check_written_out(layer, n_heads=1, head_dim=7, position="rope", rope_freqs=(1.0, 0.25))


def test_frequencies_of_theta_are_the_default():
    block, e = make(position="rope")
    same = LoopedBlock(dataclasses.replace(block.spec, rope_freqs=(1.0, 10000**-0.5)), dtype=F64)
    same.load_state_dict(block.state_dict())
    torch.testing.assert_close(same(e, 2), block(e, 2), atol=1e-12, rtol=1e-12)


def test_qwens_biases_are_those_of_queries_keys_and_values():
    block, _ = make(bias=False, qkv_bias=True, norm="rmsnorm")
    assert [n for n in block.weights() if "bias" in n] == ["layers.0.self_attn.in_proj_bias"]
    check_written_out(
        plain_layer(block.spec, norm=lambda x, w, name: F.rms_norm(x, (8,), w(f"{name}.weight"), 1e-5)),
        bias=False, qkv_bias=True, norm="rmsnorm",
    )  # fmt: skip


def test_gemmas_mlp():
    block, _ = make(activation="geglu_tanh")
    w, x = dict(block.named_parameters()), torch.randn(4, 8, dtype=F64)
    gate, up = F.linear(x, w["layers.0.linear1.weight"], w["layers.0.linear1.bias"]).chunk(2, -1)
    expected = F.linear(F.gelu(gate, approximate="tanh") * up, w["layers.0.linear2.weight"],
                        w["layers.0.linear2.bias"])  # fmt: skip
    torch.testing.assert_close(reference.mlp(x, w, block.spec, "layers.0."), expected)


# The scale of the branches.


@pytest.mark.parametrize("loops", [3, torch.tensor([3, 0, 2])], ids=["same", "own"])
def test_one_over_t_is_each_samples_own(loops):
    block, e = make(residual_scale="1/T")
    own = torch.as_tensor(loops).expand(3)
    inputs = [e, *block.parameters()]
    ours = block(e, loops)
    for b, t in enumerate(own.tolist()):
        fixed = LoopedBlock(dataclasses.replace(block.spec, residual_scale=1 / max(t, 1)), dtype=F64)
        fixed.load_state_dict(block.state_dict())
        torch.testing.assert_close(ours[b : b + 1], fixed(e[b : b + 1], t), atol=1e-12, rtol=1e-12)
    scales = 1 / own.double().clamp(min=1)
    plain, _ = make()
    plain.load_state_dict(block.state_dict())
    given = plain(e, loops, residual_scale=scales)
    assert_close([ours, *gradients(ours, inputs)], [given, *gradients(given, [e, *plain.parameters()])])


def test_a_given_scale_replaces_the_blocks():
    block, e = make(residual_scale=0.5)
    other = LoopedBlock(dataclasses.replace(block.spec, residual_scale=0.25), dtype=F64)
    other.load_state_dict(block.state_dict())
    assert torch.equal(block(e, 2, residual_scale=0.25), other(e, 2))
    torch.testing.assert_close(block(e, 2, residual_scale=torch.tensor(0.25)), other(e, 2))


# The initial state.

CALLS = {
    "same": {},
    "own": {"own": torch.tensor([4, 1, 3])},
    "ragged": {"seq_lens": torch.tensor([5, 0, 2])},
    "truncated": {"own": torch.tensor([4, 1, 3]), "n_grad_loops": 2},
}


@every_injection
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_loops_go_on_from_a_given_state(injection, call):
    """Of four loops and four more the second four's gradients are those of h0."""
    block, e = make(injection=injection)
    call = dict(call)
    own = call.pop("own", torch.tensor(4))
    inputs = [e, *block.parameters()]
    k = call.pop("n_grad_loops", None)
    if k is None:
        ours = block(e, own, h0=block(e, own, **call), **call)
        whole = block(e, 2 * own, **call)
    else:
        ours = block(e, own, h0=block(e, own), n_grad_loops=k)
        whole = block(e, 2 * own, n_grad_loops=k)
    assert_close([ours, *gradients(ours, inputs)], [whole, *gradients(whole, inputs)])


@every_injection
def test_no_loops_return_the_given_state(injection):
    block, e = make(injection=injection)
    h0 = state(e)
    out = block(e, 0, h0=h0)
    assert torch.equal(out, h0)
    grads = gradients(out, [e, h0, *block.parameters()])
    assert all(not g.any() for g in (grads[0], *grads[2:]))
    assert grads[1].any()


def test_all_loops_and_halting_from_a_given_state():
    block, e = make(injection="add", norm_placement="post")
    h0 = state(e).detach()
    e = e.detach()
    every = block(e, 3, h0=h0, return_all_loops=True)
    assert torch.equal(every[0], block(e, 1, h0=h0))
    with torch.no_grad():
        settled = block(e, 60)
        _, from_zero = block(e, 60, halt_threshold=1e-3)
        _, from_there = block(e, 60, h0=settled, halt_threshold=1e-3)
    assert (from_there < from_zero).all()


def test_a_state_of_packed_sequences():
    block, e = make(injection="add")
    h0, lens = state(e), torch.tensor([5, 2, 3])
    valid = torch.arange(5) < lens[:, None]
    offsets = F.pad(lens.cumsum(0), (1, 0))
    packed = block(e[valid], 2, h0=h0[valid], cu_seqlens=offsets)
    assert torch.equal(packed, block(e, 2, h0=h0, seq_lens=lens)[valid])


# Left padding and positions.


def left_padded(x: Tensor, pads: Tensor) -> Tensor:
    """[batch, seq_len + 2, d] with the tokens behind ``pads`` NaNs, and NaNs behind them."""
    out = torch.full((len(x), x.shape[1] + 2, x.shape[2]), torch.nan, dtype=x.dtype)
    for b, n in enumerate(pads.tolist()):
        out[b, n : n + x.shape[1]] = x[b]
    return out


LEFT = {
    "rope": {"position": "rope"},
    "window": {"window": 2, "injection": "concat"},
    "all ways": {"causal": False, "injection": "norm_add"},
    "two layers": {"n_layers": 2, "injection": "diagonal", "qk_norm": True},
}


@pytest.mark.parametrize("options", LEFT.values(), ids=LEFT)
@pytest.mark.parametrize("call", [{}, {"return_all_loops": True, "n_grad_loops": 2}], ids=["h", "all"])
def test_a_left_padded_batch_is_the_sequences_alone(options, call):
    block, e = make(**options)
    h0, pads = state(e), torch.tensor([2, 0, 1])
    loops, length = torch.tensor([3, 2, 3]), e.shape[1]
    wide, wide0 = (left_padded(x.detach(), pads).requires_grad_() for x in (e, h0))
    ours = block(wide, loops, h0=wide0, left_pad=pads, seq_lens=pads + length, **call)
    alone = block(e, loops, h0=h0, **call)
    real = (torch.arange(length + 2) >= pads[:, None]) & (torch.arange(length + 2) < pads[:, None] + length)
    torch.testing.assert_close(ours[..., real, :].view_as(alone), alone, atol=1e-12, rtol=1e-12)
    assert not ours[..., ~real, :].any()
    grads = gradients(alone, [e, h0, *block.parameters()])
    cotangent = torch.full_like(ours, torch.nan)
    cotangent[..., real, :] = torch.randn(
        alone.shape, generator=torch.Generator().manual_seed(1), dtype=F64
    ).flatten(-3, -2)
    wide_grads = torch.autograd.grad(ours, [wide, wide0, *block.parameters()], cotangent)
    for a, b in zip(wide_grads[:2], grads[:2], strict=True):
        torch.testing.assert_close(a[real].view_as(b), b, atol=1e-10, rtol=1e-10)
        assert not a[~real].any()
    assert_close(wide_grads[2:], grads[2:])


def test_samples_that_are_all_left_pads_are_zero():
    block, e = make(window=2)
    out = block(e, 2, left_pad=torch.tensor([5, 0, 3]), seq_lens=torch.tensor([5, 0, 3]))
    assert not out.any()


def test_rotary_attention_sees_differences_of_positions_alone():
    """So that an offset changes nothing without a cache, and kernels may ignore it."""
    block, e = make(position="rope", window=3)
    offset = torch.tensor([0, 7, 1000])
    torch.testing.assert_close(block(e, 2, position_offset=offset), block(e, 2), atol=1e-10, rtol=1e-10)


def test_pads_beyond_a_window_reach_nothing():
    block, e = make(window=1)
    lens = torch.tensor([5, 2, 0])
    out = block(e, 2, seq_lens=lens)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(out, [e, *block.parameters()]))
    torch.testing.assert_close(out[1, :2], block(e[1:2, :2], 2)[0], atol=1e-12, rtol=1e-12)


# The specification.


@every_option
def test_specifications_survive_json(options):
    spec = BlockSpec(**{"d_model": 8, "n_heads": 2, **options})
    assert BlockSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert BlockSpec.from_dict(json.loads(spec.key)) == spec


def test_an_option_at_its_default_is_not_in_the_key():
    """Measured tables and checkpoints of before the options know blocks by it."""
    before = [
        *("activation", "bias", "causal", "d_ff", "d_model", "head_dim", "injection", "loop_norm", "n_heads"),
        *("n_kv_heads", "n_layers", "norm", "norm_eps", "norm_placement", "position", "residual_scale"),
        "rope_theta",
    ]
    assert list(json.loads(BlockSpec(8, 2).key)) == before
    assert set(json.loads(BlockSpec(8, 2, window=3).key)) == {*before, "window"}


def test_every_weight_is_a_parameter_that_matters():
    for name, options in OPTIONS.items():
        block, e = make(**options)
        grads = gradients(block(e, 2), list(block.parameters()))
        for weight, g in zip(block.weights(), grads, strict=True):
            assert g.any(), (name, weight)


@every_injection
def test_injections_begin_near_addition(injection):
    block = LoopedBlock(BlockSpec(8, 2, injection=injection), dtype=F64)
    w = dict(block.named_parameters())
    if injection == "diagonal":
        assert torch.equal(torch.sigmoid(-w["injection.decay"]), torch.full((8,), 0.5, dtype=F64))
        assert torch.equal(w["injection.gain"], torch.ones(8, dtype=F64))
    if injection == "norm_add":
        assert torch.equal(w["injection.alpha"], torch.ones(8, dtype=F64))


def test_fresh_norms_multiply_by_one():
    for norm_weight in ("scale", "one_plus"):
        block = LoopedBlock(BlockSpec(8, 2, norm_weight=norm_weight))
        assert torch.equal(block.layers.get_submodule("0.norm1").weight, torch.tensor(
            1.0 if norm_weight == "scale" else 0.0).expand(8))  # fmt: skip


# Backends serve it, or say that they do not.


@pytest.mark.parametrize("backend", LOOPED_BLOCK.names())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_backend_refuses_by_name_what_it_does_not_serve(backend, options):
    spec = BlockSpec(**{"d_model": 8, "n_heads": 2, **options})
    problem = Problem(spec, 2, 3, torch.float32, torch.float32, torch.device("cpu"), True)
    served = getattr(LOOPED_BLOCK.get(backend), "served", None)
    if served is None:
        assert backend == "torch"
        return
    defaults = {f.name: f.default for f in dataclasses.fields(BlockSpec)}
    sizes = ("n_heads", "n_kv_heads", "head_dim")
    given = {n: getattr(spec, n) for n in options if n not in sizes and getattr(spec, n) != defaults[n]}
    refusals = [f"{n}={x!r} is not served" for n, x in given.items() if not served.serves(n, x)]
    assert served.refusal(problem) in (refusals or [None])


@pytest.mark.parametrize("name", OWN_OPTIONS)
def test_a_call_with_an_option_is_served_or_refused_by_name(name):
    block, e = make(dtype=torch.float32, injection="add")
    option = {"h0": state(e), "residual_scale": 0.5}[name]
    problem = Problem(block.spec, 3, 5, e.dtype, e.dtype, e.device, False, options=(name,))
    expected = block(e, 1, backend="torch", **{name: option})
    for backend in LOOPED_BLOCK:
        if backend.name == "torch" or backend.why_not(None) is not None:
            continue
        if name in backend.served.call:
            ours = block(e, 1, backend=backend.name, **{name: option})
            torch.testing.assert_close(ours, expected)
        else:
            assert backend.why_not(problem).words == f"{name}= is not served"
            with pytest.raises(ShiftInputError, match=f"{name}= is not served"):
                block(e, 1, backend=backend.name, **{name: option})


def test_torch_compile_knows_the_options():
    torch._dynamo.reset()
    block, e = make(dtype=torch.float32, injection="concat", residual_scale="1/T")
    f = torch.compile(block, backend="aot_eager", fullgraph=True)
    h0, pads = state(e), torch.tensor([2, 0, 1])
    call = dict(h0=h0, left_pad=pads, seq_lens=torch.tensor([5, 3, 5]), backend="torch")
    for loops in (torch.tensor([3, 1, 2]), torch.tensor([1, 1, 4])):
        ours, plain = f(e, loops, **call), block(e, loops, **call)
        inputs = [e, h0, *block.parameters()]
        assert_close([ours, *gradients(ours, inputs)], [plain, *gradients(plain, inputs)], 1e-5)
    for scale in (torch.tensor([0.5, 1.0, 0.25]), 0.5):
        call = dict(residual_scale=scale, backend="torch")
        assert_close([f(e, 2, **call)], [block(e, 2, **call)], 1e-5)


@pytest.mark.parametrize("name", ["concat", "qk_norm", "norm_add, rmsnorm", "no norm weights"])
def test_autocast_rounds_operands_and_not_the_stream(name):
    block, e = make(dtype=torch.float32, **OPTIONS[name])
    exact = LoopedBlock(block.spec, dtype=F64)
    exact.load_state_dict(block.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(e, 3, backend="torch")
    assert mixed.dtype == torch.float32
    assert 1e-6 < (mixed - exact(e.double(), 3)).abs().mean() < 0.1
