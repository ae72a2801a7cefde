"""Layers of Hugging Face models as looped blocks: the same tokens as the model with these layers repeated.

Models are tiny and random, built from their config classes: nothing is downloaded.
"""

import copy
import pickle
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM  # noqa: E402

from shift_kernels import BackendFallbackWarning, ShiftInputError  # noqa: E402
from shift_kernels.hf import LoopedLayers, loop_layers, unloop  # noqa: E402

SIZES = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
SIZES_QWEN2 = {name: size for name, size in SIZES.items() if name != "head_dim"}
SLIDES_FROM_LAYER_3 = dict(use_sliding_window=True, sliding_window=5, max_window_layers=3)
SPECIAL = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0)
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=50, n_positions=64, n_embd=32, n_layer=6, n_head=4, **SPECIAL
    ),
    "llama": lambda: transformers.LlamaConfig(**SIZES, **SPECIAL),
    "mistral": lambda: transformers.MistralConfig(**SIZES, **SPECIAL, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES_QWEN2, **SPECIAL, **SLIDES_FROM_LAYER_3),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, **SPECIAL),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, **SPECIAL, query_pre_attn_scalar=16, attn_logit_softcapping=1.5, sliding_window=5
    ),
}
LOOPED = range(2, 5)
pytestmark = pytest.mark.filterwarnings("default::shift_kernels.BackendFallbackWarning")
each_family = pytest.mark.parametrize("family", CONFIGS)


def make(family, noise=0.15, **changes):
    """A model in evaluation mode; with noise its weights are larger than at the start of training, so that a
    mistake shows in the logits."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    attention = "sdpa" if family in ("llama", "mistral") else "eager"  # which make different masks, or none
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


def decoder_layers(model):
    return model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers


def unrolled(model, n_loops, looped=LOOPED):
    """The model with these layers written down n_loops times: what a looped one must compute."""
    twin = copy.deepcopy(model)
    layers = decoder_layers(twin)
    numbers = [*range(looped[0]), *[*looped] * n_loops, *range(looped[-1] + 1, len(layers))]
    repeated = torch.nn.ModuleList(layers[i] for i in numbers)
    setattr(twin.base_model, "h" if hasattr(twin.base_model, "h") else "layers", repeated)
    twin.config.num_hidden_layers, twin.config.use_cache = len(numbers), False  # shared layers, one slot each
    if getattr(twin.config, "layer_types", None):
        twin.config.layer_types = [twin.config.layer_types[i] for i in numbers]
    return twin


def prompt(*pads, side="left", seq_len=9):
    """Tokens [len(pads), seq_len] and their mask, with so many pads a row."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 50, (len(pads), seq_len))
    mask = torch.ones_like(tokens)
    for row, n in enumerate(pads):
        mask[row, slice(0, n) if side == "left" else slice(seq_len - n, seq_len)] = 0
    return {"input_ids": tokens.where(mask.bool(), 0), "attention_mask": mask}


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_loop_changes_nothing_and_more_repeat_the_layers(family, side):
    model, inputs = make(family), prompt(0, 4, 1, side=side)
    once, thrice = logits(model, **inputs), logits(unrolled(model, 3), **inputs)
    looped = loop_layers(model, LOOPED, n_loops=1)
    assert isinstance(looped, LoopedLayers)
    torch.testing.assert_close(logits(model, **inputs), once, atol=1e-4, rtol=0)
    model.config.looped["n_loops"] = 3
    torch.testing.assert_close(logits(model, **inputs), thrice, atol=1e-4, rtol=0)
    assert (once - thrice).abs().max() > 0.1


@each_family
def test_in_bfloat16_the_logits_point_the_same_way(family):
    model, inputs = make(family, noise=0.03).bfloat16(), prompt(0, 4)
    before = logits(model, **inputs).float()
    loop_layers(model, LOOPED, n_loops=1)
    after = logits(model, **inputs).float()
    assert torch.cosine_similarity(before, after, dim=-1).min() >= 0.9999


def test_in_bfloat16_a_cpu_decodes_without_a_slow_path():
    model = make("llama", noise=0.03).bfloat16()
    loop_layers(model, LOOPED, n_loops=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackendFallbackWarning)
        model.generate(**prompt(0, 4), do_sample=False, max_new_tokens=3)


WAYS = {
    "greedy": {},
    "sampling": dict(do_sample=True, top_k=10),
    "beams": dict(num_beams=3),
    "static cache": dict(cache_implementation="static"),
    "drafts that are taken back": dict(prompt_lookup_num_tokens=3),
}
THROUGH = [
    (family, way) for family in CONFIGS for way in WAYS if family in ("llama", "gemma2") or way == "greedy"
]
"""All ways with one block and with several, and each family once."""


@pytest.mark.parametrize(("family", "way"), THROUGH)
def test_generate_with_its_cache_gives_the_tokens_of_the_repeated_layers_without_one(family, way):
    model = make(family)
    inputs = prompt(3) if way.startswith("drafts") else prompt(0, 4, 1)
    settings = dict(do_sample=False, max_new_tokens=12, disable_compile=True) | WAYS[way]

    def tokens(of, **more):
        torch.manual_seed(2)
        return of.generate(**inputs, **settings | more)

    plain = {
        k: v for k, v in settings.items() if k not in ("cache_implementation", "prompt_lookup_num_tokens")
    }
    torch.manual_seed(2)
    expected = unrolled(model, 3).generate(**inputs, **plain, use_cache=False)
    torch.manual_seed(2)
    without_loops = model.generate(**inputs, **plain)
    loop_layers(model, LOOPED, n_loops=3)
    assert torch.equal(tokens(model), expected)
    assert not torch.equal(without_loops, expected), "the loops decide nothing here"


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_all_layers_may_be_looped(family):
    model, inputs = make(family), prompt(0, 4)
    settings = dict(do_sample=False, max_new_tokens=8)
    expected = unrolled(model, 2, range(6)).generate(**inputs, **settings, use_cache=False)
    loop_layers(model, range(6), n_loops=2)
    assert torch.equal(model.generate(**inputs, **settings), expected)


def first_norm(layer):
    """The weight of the first norm of one of their layers."""
    return (layer.ln_1 if hasattr(layer, "ln_1") else layer.input_layernorm).weight


@each_family
def test_gradients_are_those_of_the_repeated_layers(family):
    changes = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0) if family == "gpt2" else {}
    model, inputs = make(family, **changes).train(), prompt(0, 4, side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    twin = unrolled(model, 2)
    loop_layers(model, LOOPED, n_loops=2)
    for m in (model, twin):
        m(**inputs, labels=labels).loss.backward()
    found = dict(model.named_parameters())
    for name, p in twin.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name].grad, p.grad, atol=1e-5, rtol=1e-4)
    theirs = first_norm(decoder_layers(twin)[LOOPED[0]])
    ours = decoder_layers(model)[LOOPED[0]].blocks[0].weights()["layers.0.norm1.weight"]
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@each_family
def test_a_saved_model_loads_with_its_loops_and_holds_no_pickle(family, tmp_path):
    model, inputs = make(family), prompt(0, 4)
    loop_layers(model, LOOPED, n_loops=3)
    model.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.looped == {"layers": [2, 5], "n_loops": 3}
    torch.testing.assert_close(logits(loaded, **inputs), logits(model, **inputs), atol=1e-5, rtol=0)
    unloop(loaded)
    assert type(loaded) is type(make(family))


@each_family
def test_unloop_gives_the_layers_back_with_the_weights_as_they_are_now(family):
    model, inputs = make(family), prompt(0, 4)
    original, before = type(model), {name: p.clone() for name, p in model.state_dict().items()}
    loop_layers(model, LOOPED, n_loops=1)
    unloop(model)
    assert type(model) is original
    assert not hasattr(model.config, "looped")
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    first_norm(decoder_layers(model)[3]).requires_grad_(False)
    loop_layers(model, LOOPED, n_loops=1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    trained = logits(model, **inputs)
    unloop(model)
    torch.testing.assert_close(logits(model, **inputs), trained, atol=1e-4, rtol=0)
    frozen = [p for p in decoder_layers(model)[3].parameters() if not p.requires_grad]
    assert [id(p) for p in frozen] == [id(first_norm(decoder_layers(model)[3]))]


SCALED = {
    "linear": dict(rope_type="linear", rope_theta=1e4, factor=2.0),
    "llama3": dict(
        rope_type="llama3",
        rope_theta=1e4,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "yarn": dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16),
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotary_angles_are_the_models_own(kind, tmp_path):
    model, inputs = make("llama", rope_parameters=SCALED[kind]), prompt(0, 4)
    before = logits(model, **inputs)
    loop_layers(model, LOOPED, n_loops=1)
    torch.testing.assert_close(logits(model, **inputs), before, atol=1e-4, rtol=0)
    assert (logits(make("llama"), **inputs) - before).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, **inputs), before, atol=1e-4, rtol=0)


def test_a_call_by_hand_goes_on_from_the_cache():
    model, inputs = make("llama"), prompt(0, 4)
    loop_layers(model, LOOPED, n_loops=2)
    with torch.no_grad():
        whole = model(**inputs).logits
        first = model(
            inputs["input_ids"][:, :6], attention_mask=inputs["attention_mask"][:, :6], use_cache=True
        )
        rest = model(
            inputs["input_ids"][:, 6:],
            attention_mask=inputs["attention_mask"],
            cache=first.cache,
        )
    torch.testing.assert_close(rest.logits, whole[:, 6:], atol=1e-4, rtol=0)


@each_family
def test_a_static_cache_filled_token_by_token_needs_no_mask(family):
    model, tokens = make(family), prompt(0)["input_ids"]
    whole = logits(unrolled(model, 2), **prompt(0))
    loop_layers(model, LOOPED, n_loops=2)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        found = [model(token, cache=cache).logits[0] for token in tokens.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(found), whole, atol=1e-4, rtol=0)


def test_models_of_one_config_are_looped_each_for_itself():
    config = CONFIGS["llama"]()
    one, other = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    before = logits(other, **prompt(0))
    loop_layers(one, LOOPED, n_loops=3)
    assert not hasattr(other.config, "looped")
    loop_layers(other, LOOPED, n_loops=1)
    unloop(one)
    torch.testing.assert_close(logits(other, **prompt(0)), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_looped_model_can_be_copied_and_pickled(family):
    model = make(family)
    loop_layers(model, LOOPED, n_loops=2)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        torch.testing.assert_close(logits(twin, **prompt(0, 4)), logits(model, **prompt(0, 4)))
    assert pickle.loads(pickle.dumps(model.config)).looped == model.config.looped


@pytest.mark.parametrize(
    "auto",
    [
        transformers.AutoModel,
        transformers.AutoModelForSequenceClassification,
        transformers.AutoModelForTokenClassification,
        transformers.AutoModelForQuestionAnswering,
    ],
    ids=lambda auto: auto.__name__,
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_models_with_other_heads_load_as_they_were_saved(family, auto, tmp_path):
    torch.manual_seed(0)
    model, inputs = auto.from_config(CONFIGS[family]()).eval(), prompt(0)
    original = type(model)
    loop_layers(model, LOOPED, n_loops=2)
    model.save_pretrained(tmp_path)
    for load in (auto, type(model)):
        loaded = load.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(**inputs)[0], model(**inputs)[0])
        unloop(loaded)
        assert type(loaded) is original
        assert type(loaded.base_model) is type(original(CONFIGS[family]()).base_model)


def packed(model):
    """Two sequences in one row, which do not see each other."""
    tokens = prompt(0)["input_ids"]
    return model(tokens, position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]), use_cache=False)


def mask_of_pairs(model, sees):
    tokens = prompt(0)["input_ids"]
    allowed = sees(torch.arange(9)[:, None], torch.arange(9))[None, None]
    return model(tokens, attention_mask=torch.where(allowed, 0.0, torch.finfo(torch.float32).min))


def continued_with_gradients(model):
    out = model(**prompt(0), use_cache=True)
    return model(torch.tensor([[5]]), cache=out.cache)


def other_batch(model):
    with torch.no_grad():
        out = model(**prompt(0), use_cache=True)
        out.cache.batch_repeat_interleave(2)


def filled_before(model):
    with torch.no_grad():
        cache = unrolled(make("llama"), 1)(**prompt(0), use_cache=True).cache
        model(torch.tensor([[5]]), cache=cache)


def other_loops(model):
    with torch.no_grad():
        out = model(**prompt(0), use_cache=True)
        model.config.looped["n_loops"] = 3
        model(torch.tensor([[5]]), cache=out.cache)


def holes(model):
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1]])
    model(prompt(0)["input_ids"], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))


def early_exit(model):
    model.config.num_hidden_layers = 4
    model(**prompt(0))


ALTERNATING = {
    "a mask of pairs": (lambda m: mask_of_pairs(m, lambda i, j: j <= i), "window"),
    "pads between tokens": (holes, "window"),
    "other loops than the cache": (other_loops, "n_loops"),
    "a fraction of a loop": (
        lambda m: m.config.looped.update(n_loops=2.5) or m(**prompt(0)),
        "config.looped",
    ),
}


@pytest.mark.parametrize("looped", [range(1, 4), range(2, 5)], ids=["full first", "window first"])
@pytest.mark.parametrize("kind", ALTERNATING)
def test_where_layers_alternate_what_one_mask_can_not_say_is_refused(kind, looped):
    call, words = ALTERNATING[kind]
    model = make("gemma2")
    loop_layers(model, looped, n_loops=2)
    with pytest.raises(ShiftInputError, match=words):
        call(model)


CALLS = {
    "packed sequences": (packed, "attention_mask|position_ids"),
    "a prefix that sees itself": (
        lambda m: mask_of_pairs(m, lambda i, j: (j <= i) | ((i < 4) & (j < 4))),
        "attention_mask.*another pattern",
    ),
    "a window that the config does not have": (
        lambda m: mask_of_pairs(m, lambda i, j: (j <= i) & (i - j < 3)),
        "attention_mask.*another pattern",
    ),
    "a bias": (lambda m: m(**prompt(0) | {"attention_mask": torch.rand(1, 1, 9, 9)}), "a bias"),
    "positions with gaps": (
        lambda m: m(**prompt(0), position_ids=2 * torch.arange(9)[None], use_cache=False),
        "position_ids",
    ),
    "a cache continued with gradients": (continued_with_gradients, "no_grad"),
    "another batch": (other_batch, "another batch"),
    "a cache that other layers filled": (filled_before, "filled by other layers"),
    "other loops than the cache": (other_loops, "n_loops"),
    "an exit between looped layers": (early_exit, "num_hidden_layers"),
    "no loops": (lambda m: m.config.looped.update(n_loops=0) or m(**prompt(0)), "config.looped"),
    "dropout": (
        lambda m: setattr(m.config, "attention_dropout", 0.1) or m.train()(**prompt(0)),
        "no dropout",
    ),
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_call_that_a_looped_block_can_not_serve_is_refused_by_name(kind):
    call, words = CALLS[kind]
    model = make("llama")
    loop_layers(model, LOOPED, n_loops=2)
    with pytest.raises(ShiftInputError, match=words):
        call(model)


def loop(model, **options):
    return loop_layers(model, **{"layers": LOOPED, **options})


MODELS = {
    "another family": (
        lambda: loop(transformers.BertModel(transformers.BertConfig(**SIZES))),
        "bert.*gpt2, llama",
    ),
    "no model": (lambda: loop(torch.nn.Linear(2, 2)), "Linear"),
    "layers with a gap": (lambda: loop(make("llama"), layers=[1, 3]), "layers.*successive"),
    "a layer's number": (lambda: loop(make("llama"), layers=3), "layers.*range"),
    "a hook": (lambda: loop(hooked()), "self_attn.q_proj.*hooks"),
    "code of one's own": (lambda: loop(changed()), "mlp.*changed"),
    "layers that are not there": (lambda: loop(make("llama"), layers=range(4, 8)), "layers"),
    "no loops": (lambda: loop(make("llama"), n_loops=0), "n_loops"),
    "rotary angles that change with the length": (
        lambda: loop(make("llama", rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0))),
        "rope_parameters.*dynamic",
    ),
    "layers that see what comes": (lambda: loop(make("llama", is_causal=False)), "is_causal"),
    "an unknown activation": (lambda: loop(make("llama", hidden_act="tanh")), "hidden_act"),
    "a weight that is frozen in part": (lambda: loop(partly_frozen()), "in_proj_weight.*frozen in part"),
    "a weight of two layers": (lambda: loop(sharing(2, 4)), r"layers\.4\.mlp.*shared with.*layers\.2\.mlp"),
    "a weight of a layer outside": (lambda: loop(sharing(0, 3)), r"layers\.3\.mlp.*shared with.*layers\.0"),
    "a second time": (lambda: loop(loop_twice()), "unloop"),
    "nothing to undo": (lambda: unloop(make("llama")), "loop_layers"),
}


def hooked():
    model = make("llama")
    model.model.layers[3].self_attn.q_proj.register_forward_hook(lambda *_: None)
    return model


def changed():
    model = make("llama")
    model.model.layers[3].mlp.forward = lambda x: x
    return model


def partly_frozen():
    model = make("llama")
    model.model.layers[3].self_attn.q_proj.requires_grad_(False)
    return model


def sharing(one, other):
    model = make("llama")
    model.model.layers[other].mlp = model.model.layers[one].mlp
    return model


def loop_twice():
    model = make("llama")
    loop_layers(model, LOOPED)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_can_not_be_looped_is_refused_by_name(kind):
    call, words = MODELS[kind]
    with pytest.raises(ShiftInputError, match=words):
        call()


def test_a_refused_model_is_as_it_was():
    model = make("llama", hidden_act="tanh")
    before = str(model)
    with pytest.raises(ShiftInputError, match="hidden_act"):
        loop_layers(model, LOOPED)
    assert (str(model), hasattr(model.config, "looped")) == (before, False)
