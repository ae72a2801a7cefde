"""LoopedTransformer as a model of Hugging Face Transformers; needs the extra ``hf``.

    import shift.pretrained
    model = AutoModelForCausalLM.from_pretrained("exported")  # a folder of shift-export
    model.generate(**inputs, n_loops=8)

A folder of it holds a config and safetensors, and no code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from shift.model import Layout, LoopedTransformer
from shift_kernels import BlockSpec
from shift_kernels.errors import input_error
from shift_kernels.extras import require

require("hf", "shift.pretrained")

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig  # noqa: E402

from shift_kernels.hf.causal import LoopedCausalLM  # noqa: E402
from shift_kernels.hf.slots import Step  # noqa: E402

MODEL_TYPE = "shift_looped_transformer"


class LoopedTransformerConfig(PreTrainedConfig):
    """What a :class:`LoopedForCausalLM` is.

    Args:
        block: :meth:`BlockSpec.to_dict` of the loop body.
        n_loops: T, unless a call gives another.
        vocab_size, max_position_embeddings, learned_positions, final_norm, layout: those of
            :class:`LoopedTransformer`, ``layout`` as a dict.
        num_hidden_layers: slots in a cache of Transformers; the blocks' own caches are in one.
    """

    model_type = MODEL_TYPE

    block: dict[str, Any] | None = None
    n_loops: int = 4
    vocab_size: int = 256
    max_position_embeddings: int = 256
    learned_positions: bool = True
    final_norm: bool = True
    layout: dict[str, Any] | None = None
    num_hidden_layers: int = 1
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.block = self.block or BlockSpec(d_model=64, n_heads=4).to_dict()
        self.layout = self.layout or {}
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, model: LoopedTransformer, n_loops: int) -> LoopedTransformerConfig:
        """The config of a model.

        Raises:
            ShiftInputError: it predicts no next token of its own vocabulary.
        """
        spec, n_tokens = model.block.spec, model.tokens.num_embeddings
        if not spec.causal or model.n_classes != n_tokens or model.contexts is not None:
            value = f"causal={spec.causal}, {model.n_classes} classes, contexts: {model.contexts is not None}"
            allowed = f"a causal model whose classes are its {n_tokens} tokens, without contexts"
            raise input_error(
                "LoopedTransformerConfig.of", "model", value, allowed, "Export one trained on text."
            )
        return cls(
            block=spec.to_dict(),
            n_loops=n_loops,
            vocab_size=n_tokens,
            max_position_embeddings=model.max_seq_len,
            learned_positions=model.positions is not None,
            final_norm=model.norm is not None,
            layout=dataclasses.asdict(model.layout),
        )


class LoopedForCausalLM(LoopedCausalLM):
    """A :class:`LoopedTransformer` that predicts the next token."""

    config_class = LoopedTransformerConfig
    base_model_prefix = "model"

    def __init__(self, config: LoopedTransformerConfig) -> None:
        super().__init__(config)
        self.model = LoopedTransformer(
            BlockSpec.from_dict(config.block or {}),
            vocab_size=config.vocab_size,
            n_classes=config.vocab_size,
            max_seq_len=config.max_position_embeddings,
            learned_positions=config.learned_positions,
            final_norm=config.final_norm,
            layout=Layout(**(config.layout or {})),
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.tokens

    def embed(self, ids: Tensor, starts: Tensor) -> Tensor:
        return self.model.embed(ids, starts=starts)

    def states(self, step: Step, e: Tensor, n_loops: int, all_loops: bool) -> Tensor:
        model, h = self.model, e
        if all_loops and model.coda is not None:
            raise input_error(
                "LoopedForCausalLM",
                "exit_threshold",
                "given",
                "None for a model with a coda",
                "Leave it out.",
            )
        for part in model.parts.values():
            if part is model.block:
                h = step(part, h, n_loops, h0=model.initial(h), return_all_loops=all_loops)
            else:
                h = step(part, h, 1)
        return h

    def read(self, h: Tensor) -> Tensor:
        return self.model.read(h)


AutoConfig.register(MODEL_TYPE, LoopedTransformerConfig)
AutoModelForCausalLM.register(LoopedTransformerConfig, LoopedForCausalLM)


def pretrained(model: LoopedTransformer, n_loops: int) -> LoopedForCausalLM:
    """The same model, its very parameters, as one of Transformers.

    Args:
        n_loops: T, unless a call gives another.

    Raises:
        ShiftInputError: see :meth:`LoopedTransformerConfig.of`.
    """
    config = LoopedTransformerConfig.of(model, n_loops)
    with torch.device("meta"):
        theirs = LoopedForCausalLM(config)
    theirs.model = model
    return theirs.train(model.training)
