"""Ouro and Huginn: their weights by name give the logits of a forward written from their papers."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from shift_kernels import ShiftInputError
from shift_kernels.hf.published import from_published, load_published

pytestmark = pytest.mark.filterwarnings("default::shift_kernels.BackendFallbackWarning")

OURO = dict(
    model_type="ouro", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=10000.0,
    hidden_act="silu", total_ut_steps=3, max_position_embeddings=64, tie_word_embeddings=False,
    architectures=["OuroForCausalLM"], auto_map={"AutoConfig": "configuration_ouro.OuroConfig"},
)  # fmt: skip
HUGINN = dict(
    model_type="huginn_raven", n_embd=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48,
    n_layers_in_prelude=1, n_layers_in_recurrent_block=2, n_layers_in_coda=1, mean_recurrence=3,
    vocab_size=50, padded_vocab_size=50, rope_base=50000.0, norm_eps=1e-6, qk_bias=True, tie_embeddings=True,
    init_values={"std": 0.0, "embed_scale": math.sqrt(32)},
)  # fmt: skip


def rms_norm(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def causal_heads(q, k, v):
    """q, k, v [batch, seq_len, heads, head_dim] -> [batch, seq_len, d_model]."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)


def angles(seq_len, head_dim, base):
    return torch.outer(torch.arange(seq_len), base ** (-torch.arange(0, head_dim, 2) / head_dim))[:, None]


def ouro_forward(w, tokens, n_loops):
    """Logits after every loop, and the exit gate's probabilities, [T, batch, seq_len, ..]."""
    h = w["model.embed_tokens.weight"][tokens]
    a = angles(tokens.shape[1], 8, 10000.0)

    def rotated(x):
        first, second = x.chunk(2, -1)
        return torch.cat([first * a.cos() - second * a.sin(), second * a.cos() + first * a.sin()], -1)

    logits, gates = [], []
    for _ in range(n_loops):
        for i in range(2):
            p = f"model.layers.{i}."
            x = rms_norm(h, w[p + "input_layernorm.weight"])
            q, k, v = (F.linear(x, w[f"{p}self_attn.{m}_proj.weight"]).unflatten(-1, (-1, 8)) for m in "qkv")
            o = F.linear(causal_heads(rotated(q), rotated(k), v), w[p + "self_attn.o_proj.weight"])
            h = h + rms_norm(o, w[p + "input_layernorm_2.weight"])
            x = rms_norm(h, w[p + "post_attention_layernorm.weight"])
            gated = F.silu(F.linear(x, w[p + "mlp.gate_proj.weight"])) * F.linear(
                x, w[p + "mlp.up_proj.weight"]
            )
            x = F.linear(gated, w[p + "mlp.down_proj.weight"])
            h = h + rms_norm(x, w[p + "post_attention_layernorm_2.weight"])
        h = rms_norm(h, w["model.norm.weight"])
        logits.append(F.linear(h, w["lm_head.weight"]))
        gate = F.linear(h, w["model.early_exit_gate.weight"], w["model.early_exit_gate.bias"])
        gates.append(gate.sigmoid()[..., 0])
    return torch.stack(logits), torch.stack(gates)


def huginn_forward(w, tokens, n_loops):
    """Logits after every loop, from a state of zeros."""
    a = angles(tokens.shape[1], 8, 50000.0)

    def rotated(x):  # the pair (2 i, 2 i + 1) is a complex number
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones_like(a), a
        )
        return torch.view_as_real(turned).flatten(-2)

    def layer(x, p):
        q, k, v = F.linear(rms_norm(x, w[p + "norm_1.weight"]), w[p + "attn.Wqkv.weight"]).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (4, 8)) for part in (q, k, v))
        q_bias, k_bias = w[p + "attn.qk_bias"]
        o = causal_heads(rotated(q + q_bias), rotated(k + k_bias), v)
        x = rms_norm(F.linear(o, w[p + "attn.proj.weight"]) + x, w[p + "norm_2.weight"])
        gate, up = F.linear(rms_norm(x, w[p + "norm_3.weight"]), w[p + "mlp.fc.weight"]).chunk(2, -1)
        return rms_norm(F.linear(F.silu(gate) * up, w[p + "mlp.proj.weight"]) + x, w[p + "norm_4.weight"])

    final = w["transformer.ln_f.weight"]
    e = layer(w["transformer.wte.weight"][tokens] * math.sqrt(32), "transformer.prelude.0.")
    state, logits = torch.zeros_like(e), []
    for _ in range(n_loops):
        state = F.linear(torch.cat([state, e], -1), w["transformer.adapter.weight"])
        for i in range(2):
            state = layer(state, f"transformer.core_block.{i}.")
        h = layer(rms_norm(state, final), "transformer.coda.0.")
        logits.append(F.linear(rms_norm(h, final), w["transformer.wte.weight"]))
    return torch.stack(logits), None


def ouro_shapes():
    yield from {"model.embed_tokens": (50, 32), "model.norm": (32,), "lm_head": (50, 32)}.items()
    for i in range(2):
        for name in (
            "input_layernorm",
            "input_layernorm_2",
            "post_attention_layernorm",
            "post_attention_layernorm_2",
        ):
            yield f"model.layers.{i}.{name}", (32,)
        for name, shape in dict(q=(32, 32), k=(16, 32), v=(16, 32), o=(32, 32)).items():
            yield f"model.layers.{i}.self_attn.{name}_proj", shape
        for name, shape in dict(gate=(48, 32), up=(48, 32), down=(32, 48)).items():
            yield f"model.layers.{i}.mlp.{name}_proj", shape
    yield "model.early_exit_gate", (1, 32)


def huginn_shapes():
    yield from {"wte": (50, 32), "adapter": (32, 64), "ln_f": (32,)}.items()
    for layer in ("prelude.0", "core_block.0", "core_block.1", "coda.0"):
        for i in range(1, 5):
            yield f"{layer}.norm_{i}", (32,)
        for name, shape in {"attn.Wqkv": (96, 32), "attn.proj": (32, 32), "mlp.fc": (96, 32)}.items():
            yield f"{layer}.{name}", shape
        yield f"{layer}.mlp.proj", (32, 48)


def weights(kind):
    torch.manual_seed(0)
    shapes, prefix = (ouro_shapes(), "") if kind == "ouro" else (huginn_shapes(), "transformer.")
    w = {
        f"{prefix}{name}.weight": torch.randn(shape) * shape[-1] ** -0.5 + (len(shape) == 1)
        for name, shape in shapes
    }
    if kind == "ouro":
        return w | {"model.early_exit_gate.bias": torch.randn(1)}
    biases = {
        name.replace("Wqkv.weight", "qk_bias"): 0.3 * torch.randn(2, 1, 4, 8) for name in w if "Wqkv" in name
    }
    return w | biases | {"freqs_cis": torch.zeros(1, 64, 1, 4, 2)}


KINDS = {"ouro": (OURO, ouro_forward), "huginn": (HUGINN, huginn_forward)}
TOKENS = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1))
each_kind = pytest.mark.parametrize("kind", KINDS)


def both(kind, **changes):
    config, forward = KINDS[kind]
    w = weights(kind)
    return from_published(config | changes, w), lambda tokens, n_loops: forward(w, tokens, n_loops)


@each_kind
@torch.no_grad()
def test_logits_are_those_of_the_published_forward(kind):
    model, forward = both(kind)
    expected = forward(TOKENS, 5)[0]
    torch.testing.assert_close(model(TOKENS).logits, expected[2], atol=1e-4, rtol=1e-4)
    for n_loops in (1, 5):
        found = model(TOKENS, n_loops=n_loops).logits
        torch.testing.assert_close(found, expected[n_loops - 1], atol=1e-4, rtol=1e-4)
    assert (expected[0] - expected[4]).abs().max() > 0.1


@each_kind
@torch.no_grad()
def test_each_token_exits_after_the_first_loop_that_is_sure(kind):
    model, forward = both(kind)
    expected = forward(TOKENS, 4)[0]
    sureness = expected.softmax(-1).amax(-1)
    ordered = sureness[:-1].flatten().sort().values
    threshold = float(ordered[20:22].mean())  # between two of them: rounding decides nothing
    first = [next((t for t in range(3) if s[t] >= threshold), 3) for s in sureness.flatten(1).T]
    assert len(set(first)) > 1
    picked = expected.flatten(1, 2)[first, torch.arange(14)].view(2, 7, 50)
    found = model(TOKENS, n_loops=4, exit_threshold=threshold, use_cache=False).logits
    torch.testing.assert_close(found, picked, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_ouros_gate_exits_where_its_distribution_has_reached_the_threshold():
    model, forward = both("ouro", exit_rule="gate")
    logits, gates = forward(TOKENS, 4)
    threshold, picked, steps = 0.7, [], set()
    for b, i in ((b, i) for b in range(2) for i in range(7)):
        left, exited, step = 1.0, 0.0, 3
        for t in range(3):
            exited, left = exited + left * float(gates[t, b, i]), left * (1 - float(gates[t, b, i]))
            if exited >= threshold:
                step = t
                break
        picked.append(logits[step, b, i])
        steps.add(step)
    assert len(steps) > 1
    found = model(TOKENS, n_loops=4, exit_threshold=threshold, use_cache=False).logits
    torch.testing.assert_close(found, torch.stack(picked).view(2, 7, 50), atol=1e-4, rtol=1e-4)


@each_kind
def test_a_folder_loads_generates_with_a_cache_a_loop_and_saves(kind, tmp_path):
    config, forward = KINDS[kind]
    w = weights(kind)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(dict(list(w.items())[:7]), tmp_path / "model-1-of-2.safetensors")
    save_file(dict(list(w.items())[7:]), tmp_path / "model-2-of-2.safetensors")
    model = load_published(tmp_path)
    tokens = TOKENS
    for _ in range(8):
        tokens = torch.cat([tokens, forward(w, tokens, 3)[0][-1, :, -1:].argmax(-1)], 1)
    settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(TOKENS, **settings), tokens)
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.generate(TOKENS, **settings), tokens)


@each_kind
@torch.no_grad()
def test_a_cache_by_its_former_name_and_a_static_one_are_caches(kind):
    model, forward = both(kind)
    whole = forward(TOKENS, 3)[0][-1]
    torch.manual_seed(0)
    begun = model(TOKENS[:, :5], n_loops=3)
    rest = model(TOKENS[:, 5:], n_loops=3, past_key_values=begun.cache)
    torch.testing.assert_close(rest.logits, whole[:, 5:], atol=1e-4, rtol=1e-4)
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, disable_compile=True)
    plain = model.generate(TOKENS, **settings)
    assert torch.equal(model.generate(TOKENS, **settings, cache_implementation="static"), plain)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (dict(nloops=7), "nloops"),
        (dict(output_hidden_states=True), "output_hidden_states"),
        (dict(attention_mask=torch.ones(2, 3)), "attention_mask"),
        (dict(exit_threshold=2), "exit_threshold"),
        (dict(exit_threshold=0.5, n_loops=0), "n_loops"),
        (dict(input_ids=TOKENS[0]), "input_ids"),
    ],
    ids=str,
)
def test_arguments_that_say_nothing_to_it_are_refused_by_name(call, named):
    model, _ = both("ouro")
    with pytest.raises(ShiftInputError, match=named):
        model(**{"input_ids": TOKENS, **call})


def test_huginns_first_state_is_random_and_follows_the_seed():
    model, _ = both("huginn", init_values={"std": 0.4, "embed_scale": 1.0})

    def found(seed):
        torch.manual_seed(seed)
        return model(TOKENS).logits

    assert torch.equal(found(0), found(0))
    assert not torch.equal(found(0), found(1))


@each_kind
def test_what_does_not_fit_is_named(kind):
    config, _ = KINDS[kind]
    w = weights(kind)
    name = next(name for name in w if "norm" in name)
    with pytest.raises(ShiftInputError, match="lora"):
        from_published(config, w | {"lora.weight": torch.ones(2)})
    with pytest.raises(ShiftInputError, match=r"weight"):
        from_published(config, {k: v for k, v in w.items() if k != name})
    changes = dict(use_sliding_window=True) if kind == "ouro" else dict(test_time_noise=0.1)
    with pytest.raises(ShiftInputError, match=next(iter(changes))):
        from_published(config | changes, w)
    with pytest.raises(ShiftInputError, match="Perhaps 'ouro' is meant"):
        from_published(config | {"model_type": "ourro"}, w)
