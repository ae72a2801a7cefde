"""Hugging Face model families as data: what a layer is as a BlockSpec, and its weights by name.

To add one: an entry in :data:`FAMILIES`. A function reads the config; a table says which of their weights,
one below the other, make one of ours. A weight that it does not place is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shift_kernels.errors import input_error
from shift_kernels.spec import BlockSpec

FUNCTION = "shift_kernels.hf.loop_layers"
ACTIVATIONS = {
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu_tanh"}
"""Transformers' words for an activation, and ours: of a plain MLP, and of one that multiplies by a gate."""
STATIC_ROTARY = ("linear", "llama3", "yarn")
"""Ways to scale rotary frequencies that do not depend on the sequence."""


@dataclass(frozen=True)
class Family:
    """One family of models.

    Args:
        layers: attribute of the base model that holds its decoder layers.
        fields: of a config and a layer's number, the fields of its :class:`BlockSpec`.
        weights: name in a layer of ours -> names in a layer of theirs, whose rows are concatenated.
        transposed: matrices are stored [in_features, out_features].
        without: attributes of a config that ask for what no :class:`BlockSpec` has.
        dropout: attributes of a config that are dropout probabilities inside a layer.
    """

    layers: str
    fields: Callable[[Any, int], dict[str, Any]]
    weights: Mapping[str, tuple[str, ...]]
    transposed: bool = False
    without: tuple[str, ...] = ()
    dropout: tuple[str, ...] = ("attention_dropout",)

    def spec(self, config: Any, index: int) -> BlockSpec:
        """What layer ``index`` of a model with this config is.

        Raises:
            ShiftInputError: the config has something that no :class:`BlockSpec` says.
        """
        for name in self.without:
            if given := getattr(config, name, None):
                refuse(f"config.{name}", given, "False")
        if not getattr(config, "is_causal", True):
            refuse("config.is_causal", False, "True")
        return BlockSpec(**self.fields(config, index))

    def to_block(self, layer: Mapping[str, Tensor], spec: BlockSpec) -> dict[str, nn.Parameter]:
        """The weights of one of their layers, by name, under our names, without ``layers.0.``.

        Raises:
            ShiftInputError: the layer has weights that have no place, or lacks some, or they are quantised.
        """
        theirs = dict(layer)
        for name, weight in theirs.items():
            if not weight.is_floating_point():
                refuse(name, weight.dtype, "floating weights", "Load the model without quantisation.")
        ours = {}
        for name in _names(spec):
            names = self.weights.get(name, (name,))
            if any(part not in theirs for part in names):
                refuse(name, "missing", f"a layer with {' and '.join(names)}")
            parts = [theirs.pop(part) for part in names]
            trained = {part.requires_grad for part in parts}
            if len(trained) > 1:
                refuse(
                    name, "frozen in part", "all or none of its parts", f"Freeze all of {self.weights[name]}."
                )
            whole = torch.cat([self._turned(part).detach() for part in parts])
            ours[name] = nn.Parameter(whole, requires_grad=trained.pop())
        if theirs:
            refuse("layer", sorted(theirs), "a layer without these weights")
        return ours

    def to_layer(self, ours: Mapping[str, Tensor], layer: nn.Module) -> dict[str, nn.Parameter]:
        """The other way round: weights under our names as the parameters of their ``layer``."""
        rows = {name: len(self._turned(p)) for name, p in layer.named_parameters()}
        theirs = {}
        for name, weight in ours.items():
            parts = self.weights[name]
            pieces = weight.detach().split([rows[part] for part in parts])
            for part, piece in zip(parts, pieces, strict=True):
                whole = self._turned(piece).clone(memory_format=torch.contiguous_format)
                theirs[part] = nn.Parameter(whole, requires_grad=weight.requires_grad)
        return theirs

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed and weight.ndim == 2 else weight


def _names(spec: BlockSpec) -> list[str]:
    return [name.removeprefix("layers.0.") for name in spec.weight_shapes()]


def refuse(
    argument: str, value: object, allowed: str, remedy: str = "Keep these layers as they are."
) -> NoReturn:
    raise input_error(FUNCTION, argument, value, allowed, remedy)


def _word(config: Any, attribute: str, words: Mapping[str, str]) -> str:
    given = getattr(config, attribute)
    if given not in words:
        refuse(f"config.{attribute}", given, "one of " + ", ".join(map(repr, words)))
    return words[given]


def _gpt2(config: Any, index: int) -> dict[str, Any]:
    fields = dict(
        d_model=config.n_embd,
        n_heads=config.n_head,
        d_ff=config.n_inner or 4 * config.n_embd,
        activation=_word(config, "activation_function", ACTIVATIONS),
        norm_eps=config.layer_norm_epsilon,
    )
    scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= index + 1
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        fields["attn_scale"] = scale
    return fields


def llama_fields(config: Any, index: int, **own: Any) -> dict[str, Any]:
    """What Llama and those after it share; ``own``: fields of the family."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    bias = getattr(config, "mlp_bias", False)
    fields = dict(
        d_model=config.hidden_size,
        n_heads=heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        d_ff=config.intermediate_size,
        norm="rmsnorm",
        norm_eps=config.rms_norm_eps,
        bias=bias,
        position="rope",
    )
    if "activation" not in own:
        own["activation"] = _word(config, "hidden_act", GATED)
    if getattr(config, "attention_bias", False) != bias:
        fields["qkv_bias"] = not bias
    rotary, factor = _rotary(config)
    if factor != 1:  # on cosine and sine, so squared on the scores
        own["attn_scale"] = own.get("attn_scale", head_dim**-0.5) * factor**2
    return fields | rotary | own


def _rotary(config: Any) -> tuple[dict[str, Any], float]:
    """The fields that say which angles rotate, and the factor on their cosine and sine."""
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if kind == "default":
        return {"rope_theta": float(parameters["rope_theta"])}, 1.0
    if kind not in STATIC_ROTARY:
        refuse("config.rope_parameters", kind, "rope_type " + ", ".join(("default", *STATIC_ROTARY)))
    with torch.device("cpu"):  # from_pretrained builds its modules on meta, where frequencies have no values
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return {"rope_freqs": tuple(frequencies.tolist())}, factor


def _window(config: Any, index: int) -> dict[str, Any]:
    """The sliding window, of all layers or, where the config gives each a type, of those that slide."""
    types = getattr(config, "layer_types", None)
    slides = types is None or types[index] == "sliding_attention"
    return {"window": config.sliding_window} if slides and config.sliding_window else {}


def _mistral(config: Any, index: int) -> dict[str, Any]:
    return llama_fields(config, index, **_window(config, index))


def _qwen2(config: Any, index: int) -> dict[str, Any]:
    return llama_fields(config, index, qkv_bias=True, **_window(config, index))


def _qwen3(config: Any, index: int) -> dict[str, Any]:
    return llama_fields(config, index, qk_norm=True, **_window(config, index))


def _gemma2(config: Any, index: int) -> dict[str, Any]:
    own = _window(config, index)
    if config.attn_logit_softcapping is not None:
        own["softcap"] = config.attn_logit_softcapping
    return llama_fields(
        config,
        index,
        activation=_word(config, "hidden_activation", GATED),
        norm_placement="sandwich",
        norm_weight="one_plus",
        attn_scale=config.query_pre_attn_scalar**-0.5,
        **own,
    )


def same_names(*names: str) -> dict[str, tuple[str, ...]]:
    """``ours=theirs`` pairs for a weight and its bias."""
    pairs = (name.split("=") for name in names)
    return {f"{a}.{leaf}": (f"{b}.{leaf}",) for a, b in pairs for leaf in ("weight", "bias")}


GPT2_WEIGHTS = {
    "self_attn.in_proj_weight": ("attn.c_attn.weight",),
    "self_attn.in_proj_bias": ("attn.c_attn.bias",),
    **same_names(
        "self_attn.out_proj=attn.c_proj", "linear1=mlp.c_fc", "linear2=mlp.c_proj", "norm1=ln_1", "norm2=ln_2"
    ),
}
LLAMA_WEIGHTS = {
    **{
        f"self_attn.in_proj_{leaf}": tuple(f"self_attn.{x}_proj.{leaf}" for x in "qkv")
        for leaf in ("weight", "bias")
    },
    **{f"linear1.{leaf}": (f"mlp.gate_proj.{leaf}", f"mlp.up_proj.{leaf}") for leaf in ("weight", "bias")},
    **same_names(
        "self_attn.out_proj=self_attn.o_proj",
        "self_attn.q_norm=self_attn.q_norm",
        "self_attn.k_norm=self_attn.k_norm",
        "linear2=mlp.down_proj",
        "norm1=input_layernorm",
        "norm2=post_attention_layernorm",
    ),
}
GEMMA2_WEIGHTS = LLAMA_WEIGHTS | same_names(
    "norm1_post=post_attention_layernorm",
    "norm2=pre_feedforward_layernorm",
    "norm2_post=post_feedforward_layernorm",
)

FAMILIES = {
    "gpt2": Family(
        "h",
        _gpt2,
        GPT2_WEIGHTS,
        transposed=True,
        without=("add_cross_attention",),
        dropout=("attn_pdrop", "resid_pdrop"),
    ),
    "llama": Family("layers", llama_fields, LLAMA_WEIGHTS),
    "mistral": Family("layers", _mistral, LLAMA_WEIGHTS),
    "qwen2": Family("layers", _qwen2, LLAMA_WEIGHTS),
    "qwen3": Family("layers", _qwen3, LLAMA_WEIGHTS),
    "gemma2": Family("layers", _gemma2, GEMMA2_WEIGHTS, without=("use_bidirectional_attention",)),
}
"""By ``config.model_type``."""
