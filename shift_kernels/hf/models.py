"""Looped models as Transformers knows its models: a class and a config class each, which save and load.

A looped GPT-2 has the model type ``looped_gpt2``, so a file of it is never taken for a GPT-2. Its config says
which layers are looped (``config.looped``), its weights are safetensors, and no code is loaded with them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shift_kernels.hf.families import FAMILIES, Family, refuse
from shift_kernels.hf.layers import LoopedLayers, PassedThrough, refuse_own_mask

PREFIX = "looped_"
MAPPINGS = {
    AutoModel: modeling_auto.MODEL_MAPPING,
    AutoModelForCausalLM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForSequenceClassification: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForTokenClassification: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForQuestionAnswering: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}
"""Transformers' classes that load a model, and what they know."""


class LoopedModel:
    """What the classes of looped models share; the other base class is the model's own."""

    original: type
    """The class of the model without loops."""

    _can_compile_fullgraph = False  # masks are read on the host

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if not isinstance(self.base_model, LoopedModel) or self.base_model is self:  # type: ignore[attr-defined]
            install(self)


@cache
def looped_config_class(original: type) -> type:
    """The config class of the looped models of a family."""
    name = PREFIX + original.model_type  # type: ignore[attr-defined]
    return _made(original, (original,), {"model_type": name})


@cache
def looped_class(original: type) -> type:
    """The looped twin of a model class."""
    config_class = looped_config_class(original.config_class)  # type: ignore[attr-defined]
    return _made(original, (LoopedModel, original), {"config_class": config_class})


def _made(original: type, bases: tuple[type, ...], members: dict[str, Any]) -> type:
    """A class that this module has by its name, as pickle wants it."""
    name = f"Looped{original.__name__}"
    made = type(name, bases, {**members, "original": original, "__module__": __name__})
    globals()[name] = made
    return made


def family_of(model: Any) -> Family:
    """The family of a model, looped or not.

    Raises:
        ShiftInputError: it is none of :data:`FAMILIES`.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    family = FAMILIES.get(str(kind).removeprefix(PREFIX))
    if family is None:
        refuse("model", kind, "a model of one of the families " + ", ".join(FAMILIES), "Add it to FAMILIES.")
    return family


def install(model: Any) -> LoopedLayers:
    """Put :class:`LoopedLayers` where ``config.looped`` says, with the weights of the layers there."""
    family = family_of(model)
    layers: nn.ModuleList = getattr(model.base_model, family.layers)
    first, end = model.config.looped["layers"]
    _refuse_shared(model, layers[first:end])
    looped = LoopedLayers(family, model.config, layers[first:end], first)  # type: ignore[arg-type]
    looped.train(model.training)
    layers[first] = looped
    if len(looped.blocks) > 1:
        looped.mask_check = model.base_model.register_forward_pre_hook(refuse_own_mask, with_kwargs=True)
    for i in range(first + 1, end):
        layers[i] = PassedThrough()
    return looped


def _refuse_shared(model: nn.Module, layers: nn.ModuleList) -> None:
    """A block has weights of its own: what is shared would part without a word."""
    own = {id(p) for p in layers.parameters()}
    first: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in own and first.setdefault(id(p), name) != name:
            refuse(name, f"shared with {first[id(p)]}", "a weight of its own in each looped layer")


def find(model: Any) -> tuple[nn.ModuleList, LoopedLayers]:
    """The decoder layers of a looped model, and the one among them that loops.

    Raises:
        ShiftInputError: there is none.
    """
    family = family_of(model)
    layers = getattr(model.base_model, family.layers)
    for layer in layers:
        if isinstance(layer, LoopedLayers):
            return layers, layer
    refuse("model", type(model).__name__, "a model that loop_layers has changed", "Loop it first.")


def register() -> None:
    """Make the Auto classes of Transformers load looped models."""
    for kind in FAMILIES:
        config_class: Any = CONFIG_MAPPING[kind]
        looped_config = looped_config_class(config_class)
        AutoConfig.register(looped_config.model_type, looped_config)  # type: ignore[attr-defined]
        for auto, mapping in MAPPINGS.items():
            if config_class in mapping:
                auto.register(looped_config, looped_class(mapping[config_class]))
