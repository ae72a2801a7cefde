"""Published looped language models, Ouro and Huginn, from their own files; no code of theirs is run.

    model = load_published("Ouro-1.4B")  # a folder with config.json and safetensors
    model.generate(**inputs, n_loops=4)
    model.save_pretrained("ouro")        # from then on from_pretrained, under our names

Ouro (Zhu et al., arXiv 2510.25741): every layer in every loop, sandwich norms, the final norm in each loop.
Huginn (Geiping et al., arXiv 2502.05171): prelude, core and coda; each loop maps the state and the prelude's
result, side by side, to the width; norms on the sums; states begin at random.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from shift_kernels.errors import input_error, near_miss
from shift_kernels.hf.causal import LoopedCausalLM
from shift_kernels.hf.families import LLAMA_WEIGHTS, Family, llama_fields, same_names
from shift_kernels.hf.layers import assign
from shift_kernels.hf.slots import Step
from shift_kernels.module import LoopedBlock
from shift_kernels.spec import BlockSpec

FUNCTION = "shift_kernels.hf.load_published"


class LoopedOuroConfig(Qwen2Config):
    """Ouro's own fields; those that it shares with Qwen 2 mean the same.

    Args:
        total_ut_steps: T.
        early_exit_threshold: of the learned gate: the share of the exit distribution, summed over loops.
        exit_rule: what ``exit_threshold`` of a call means: ``confidence`` or ``gate``.
    """

    model_type = "looped_ouro"
    attribute_map = {"n_loops": "total_ut_steps"}  # noqa: RUF012

    head_dim: int | None = None
    total_ut_steps: int = 4
    early_exit_threshold: float | None = None
    exit_rule: str = "confidence"

    def spec(self) -> BlockSpec:
        """The loop body."""
        fields = llama_fields(self, 0, norm_placement="sandwich", loop_norm=True)
        return BlockSpec(**fields, n_layers=self.num_hidden_layers)


class OuroForCausalLM(LoopedCausalLM):
    """Ouro. With ``config.exit_rule = "gate"`` its learned gate decides about exits, as published."""

    config_class = LoopedOuroConfig

    def __init__(self, config: LoopedOuroConfig) -> None:
        super().__init__(config)
        if config.use_sliding_window:
            raise input_error(
                FUNCTION, "config.use_sliding_window", True, "False", "Published models have none."
            )
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.block = LoopedBlock(config.spec())
        self.gate = nn.Linear(config.hidden_size, 1)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tokens

    def embed(self, ids: Tensor, starts: Tensor) -> Tensor:
        return self.tokens(ids)

    def states(self, step: Step, e: Tensor, n_loops: int, all_loops: bool) -> Tensor:
        return step(self.block, e, n_loops, return_all_loops=all_loops)

    def read(self, h: Tensor) -> Tensor:
        return self.lm_head(h)

    def is_sure(self, h: Tensor, logits: Tensor, threshold: float) -> Tensor:
        if self.config.exit_rule == "confidence":
            return super().is_sure(h, logits, threshold)
        stay = 1 - self.gate(h)[..., 0].float().sigmoid()
        return 1 - stay.cumprod(0) >= threshold


class LoopedHuginnConfig(PreTrainedConfig):
    """Huginn's own fields.

    Args:
        mean_recurrence: T.
        tie_embeddings: the read-out's weights are the embedding's.
        test_time_noise: must be 0.
        init_values: ``std`` of the first state's truncated normal distribution (0: it is 0), ``embed_scale``.
    """

    model_type = "looped_huginn"
    attribute_map = {"n_loops": "mean_recurrence"}  # noqa: RUF012

    n_embd: int = 5280
    num_attention_heads: int = 55
    num_key_value_heads: int = 55
    intermediate_size: int = 17920
    n_layers_in_prelude: int = 2
    n_layers_in_recurrent_block: int = 4
    n_layers_in_coda: int = 2
    mean_recurrence: int = 32
    vocab_size: int = 65536
    padded_vocab_size: int = 65536
    rope_base: float = 50000.0
    norm_eps: float = 1e-6
    qk_bias: bool = True
    tie_embeddings: bool = True
    test_time_noise: float = 0.0
    init_values: dict[str, float] | None = None
    use_cache: bool = True
    num_hidden_layers: int = 1
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs | {"tie_word_embeddings": self.tie_embeddings})

    def spec(self, n_layers: int, injection: str = "none") -> BlockSpec:
        """So many layers of it."""
        return BlockSpec(
            d_model=self.n_embd,
            n_heads=self.num_attention_heads,
            n_kv_heads=self.num_key_value_heads,
            n_layers=n_layers,
            d_ff=self.intermediate_size,
            activation="swiglu",
            norm="rmsnorm",
            norm_placement="sandwich_post",
            norm_eps=self.norm_eps,
            bias=False,
            qkv_bias=self.qk_bias,
            position="rope",
            rope_theta=self.rope_base,
            injection=injection,
        )


class HuginnForCausalLM(LoopedCausalLM):
    """Huginn. A token's first state is drawn from torch's generator, unless ``init_values`` says std 0."""

    config_class = LoopedHuginnConfig
    _tied_weights_keys = {"lm_head.weight": "tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LoopedHuginnConfig) -> None:
        super().__init__(config)
        if config.test_time_noise:
            given = config.test_time_noise
            raise input_error(
                FUNCTION, "config.test_time_noise", given, "0", "States are not disturbed here."
            )
        self.tokens = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.prelude = LoopedBlock(config.spec(config.n_layers_in_prelude))
        self.core = LoopedBlock(config.spec(config.n_layers_in_recurrent_block, "concat"))
        self.coda = LoopedBlock(config.spec(config.n_layers_in_coda))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tokens

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def embed(self, ids: Tensor, starts: Tensor) -> Tensor:
        return self.tokens(ids) * self._init("embed_scale", 1.0)

    def states(self, step: Step, e: Tensor, n_loops: int, all_loops: bool) -> Tensor:
        if all_loops and step.past is not None:
            allowed = "None with a cache: the coda's keys would be those of the last loop"
            raise input_error(
                "HuginnForCausalLM", "exit_threshold", "given", allowed, "Pass use_cache=False."
            )
        e = step(self.prelude, e, 1)
        h = step(self.core, e, n_loops, h0=self._first_state(e), return_all_loops=all_loops)
        if all_loops:
            return torch.stack([self.norm(step(self.coda, self.norm(after), 1)) for after in h])
        return self.norm(step(self.coda, self.norm(h), 1))

    def read(self, h: Tensor) -> Tensor:
        return self.lm_head(h)

    def _first_state(self, e: Tensor) -> Tensor:
        std = self._init("std", 0.0)
        state = torch.zeros_like(e)
        if std:
            nn.init.trunc_normal_(state, std=std, a=-3 * std, b=3 * std)
        return state * self._init("embed_scale", 1.0)

    def _init(self, name: str, default: float) -> float:
        return (self.config.init_values or {}).get(name, default)


OURO = Family(
    "layers",
    llama_fields,
    LLAMA_WEIGHTS | same_names("norm1_post=input_layernorm_2", "norm2_post=post_attention_layernorm_2"),
)
HUGINN = Family(
    "core_block",
    llama_fields,
    {
        "self_attn.in_proj_weight": ("attn.Wqkv.weight",),
        "self_attn.in_proj_bias": ("attn.Wqkv.bias",),
        **same_names(
            "self_attn.out_proj=attn.proj", "linear1=mlp.fc", "linear2=mlp.proj",
            "norm1=norm_1", "norm1_post=norm_2", "norm2=norm_3", "norm2_post=norm_4",
        ),
    },
)  # fmt: skip


def _ouro(model: OuroForCausalLM, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {
        "tokens.weight": theirs.pop("model.embed_tokens.weight"),
        "block.loop_norm.weight": theirs.pop("model.norm.weight"),
        "gate.weight": theirs.pop("model.early_exit_gate.weight"),
        "gate.bias": theirs.pop("model.early_exit_gate.bias"),
        "lm_head.weight": theirs.pop("lm_head.weight"),
    }
    return ours | _layers(OURO, "model.layers", "block", model.block, theirs)


def _huginn(model: HuginnForCausalLM, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    theirs.pop("freqs_cis", None)
    ours = {
        "tokens.weight": theirs.pop("transformer.wte.weight"),
        "core.injection.weight": theirs.pop("transformer.adapter.weight"),
        "norm.weight": theirs.pop("transformer.ln_f.weight"),
    }
    head = theirs.pop("lm_head.weight", None)
    ours["lm_head.weight"] = ours["tokens.weight"] if head is None else head
    for name in [name for name in theirs if name.endswith("attn.Wqkv.weight")]:
        prefix = name.removesuffix("Wqkv.weight")
        q_and_k = theirs.pop(f"{prefix}qk_bias", None)  # [2, 1, heads, head_dim]
        theirs[name], bias = _in_halves(theirs[name], q_and_k, model.core.spec)
        if bias is not None:
            theirs[f"{prefix}Wqkv.bias"] = bias
    for part, block in (("prelude", model.prelude), ("core", model.core), ("coda", model.coda)):
        folder = "transformer." + ("core_block" if part == "core" else part)
        ours |= _layers(HUGINN, folder, part, block, theirs)
    return ours


def _in_halves(weight: Tensor, bias: Tensor | None, spec: BlockSpec) -> tuple[Tensor, Tensor | None]:
    """Queries and keys whose rotary pairs are neighbours (2 i, 2 i + 1), as pairs (i, i + head_dim / 2)."""
    n = spec.n_heads + spec.n_kv_heads
    heads, v = weight.split([n * spec.head_dim, spec.n_kv_heads * spec.head_dim])

    def halves(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (n, spec.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    if bias is not None:
        bias = torch.cat([halves(bias.flatten()), bias.new_zeros(len(v))])
    return torch.cat([halves(heads), v]), bias


def _layers(
    family: Family, folder: str, part: str, block: LoopedBlock, theirs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The layers of a block under our names, taken out of ``theirs``."""
    ours: dict[str, Tensor] = {}
    plain = BlockSpec(**{**block.spec.to_dict(), "n_layers": 1, "injection": "none", "loop_norm": False})
    for i in range(block.spec.n_layers):
        prefix = f"{folder}.{i}."
        names = [name for name in theirs if name.startswith(prefix)]
        layer = {name.removeprefix(prefix): theirs.pop(name) for name in names}
        ours |= {f"{part}.layers.{i}.{name}": w for name, w in family.to_block(layer, plain).items()}
    return ours


PUBLISHED: dict[
    str, tuple[type[PreTrainedConfig], type[LoopedCausalLM], Callable[..., dict[str, Tensor]]]
] = {
    "ouro": (LoopedOuroConfig, OuroForCausalLM, _ouro),
    "huginn_raven": (LoopedHuginnConfig, HuginnForCausalLM, _huginn),
}
"""By the ``model_type`` of their config.json: our config, our model, and their weights under our names."""

for _config, _model, _ in PUBLISHED.values():
    AutoConfig.register(_config.model_type, _config)
    AutoModelForCausalLM.register(_config, _model)


def from_published(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> LoopedCausalLM:
    """A published model from its config and its weights by name.

    Raises:
        ShiftInputError: another kind of model, a weight that is missing or has no place.
    """
    kind = config.get("model_type")
    if kind not in PUBLISHED:
        allowed = "one of " + ", ".join(map(repr, PUBLISHED))
        raise input_error(
            FUNCTION, "model_type", kind, allowed, near_miss(kind, PUBLISHED, "Check the folder.")
        )
    config_class, model_class, names = PUBLISHED[kind]
    skipped = ("model_type", "auto_map", "architectures", "transformers_version")
    with torch.device("meta"):
        model = model_class(config_class(**{k: v for k, v in config.items() if k not in skipped}))
    theirs = dict(weights)
    try:
        ours = names(model, theirs)
    except KeyError as error:
        raise input_error(
            FUNCTION, "weights", error.args[0], "weights that have it", "Add the missing file."
        ) from error
    expected = set(model.state_dict())
    if theirs or ours.keys() != expected:
        value = sorted(theirs) + sorted(ours.keys() ^ expected)
        raise input_error(FUNCTION, "weights", value, "those of the published model", "Check the folder.")
    assign(model, {name: w if isinstance(w, nn.Parameter) else nn.Parameter(w) for name, w in ours.items()})
    model.tie_weights()
    return model.eval()


def load_published(folder: str | Path) -> LoopedCausalLM:
    """A published model from a folder with its config.json and safetensors files.

    Raises:
        ShiftInputError: see :func:`from_published`; OSError: no such folder.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return from_published(config, weights)
