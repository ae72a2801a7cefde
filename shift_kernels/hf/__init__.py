"""Looped models in Hugging Face Transformers; needs the extra ``hf``.

    from shift_kernels.hf import loop_layers, unloop

    model = AutoModelForCausalLM.from_pretrained("gpt2")
    loop_layers(model, layers=range(4, 8), n_loops=4)  # in place; those four layers are one LoopedBlock now
    model.generate(**inputs)

    model = load_published("Ouro-1.4B")  # or Huginn: a folder with config.json and safetensors

Importing this module makes ``AutoModelForCausalLM.from_pretrained`` load what such a model saved.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from shift_kernels.checks import check_int
from shift_kernels.errors import type_error
from shift_kernels.extras import require

require("hf", "shift_kernels.hf")

from shift_kernels.hf.families import FAMILIES, FUNCTION, refuse  # noqa: E402
from shift_kernels.hf.layers import LoopedLayers  # noqa: E402
from shift_kernels.hf.models import LoopedModel, family_of, find, install, looped_class, register  # noqa: E402
from shift_kernels.hf.published import load_published  # noqa: E402
from shift_kernels.spec import MAX_LOOPS  # noqa: E402

__all__ = ["FAMILIES", "LoopedLayers", "load_published", "loop_layers", "unloop"]

register()


def loop_layers(model: Any, layers: Sequence[int] = range(4, 8), n_loops: int = 4) -> LoopedLayers:
    """Loop some layers of a Transformers model, in place: with one loop it computes what it did.

    Masks, padding on either side, ``position_ids``, ``use_cache`` and ``generate`` work as before; each loop
    has its own cache. What a looped block can't do is refused by name when it is asked for: masks other than
    those of padded causal sequences, dropout in training, caches that change their batch.

    Args:
        model: a ``PreTrainedModel`` of one of :data:`FAMILIES`; it gets another class and ``config.looped``.
        layers: numbers of successive layers.
        n_loops: T; ``model.config.looped["n_loops"] = T`` changes it later.

    Returns:
        The module that is in the place of the first of these layers.

    Raises:
        ShiftInputError: another family, or something in its config or weights that no block has; the model is
            as it was.
    """
    if isinstance(model, LoopedModel):
        refuse("model", type(model).__name__, "a model without loops", "Call unloop(model) first.")
    family = family_of(model)
    n_layers = len(getattr(model.base_model, family.layers))
    if not isinstance(layers, Sequence):
        raise type_error(FUNCTION, "layers", layers, "numbers of layers", "Pass range(4, 8), say.")
    numbers = [check_int(FUNCTION, "layers", i, 0, n_layers - 1) for i in layers]
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        refuse("layers", numbers, f"successive numbers from 0 to {n_layers - 1}", "Name a range.")
    n_loops = check_int(FUNCTION, "n_loops", n_loops, 1, MAX_LOOPS)
    shared = model.config
    own = copy.deepcopy(shared)  # another model may have been made with the same one
    own.looped = {"layers": [numbers[0], numbers[-1] + 1], "n_loops": n_loops}
    _give_config(model, shared, own)
    try:
        looped = install(model)
    except BaseException:
        _give_config(model, own, shared)
        raise
    model.__class__ = looped_class(model.__class__)
    own.__class__ = model.config_class
    return looped


def _give_config(model: Any, old: Any, new: Any) -> None:
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def unloop(model: Any) -> None:
    """Undo :func:`loop_layers`, in place: the layers are back, with the weights as they are now.

    Raises:
        ShiftInputError: the model has no loops.
    """
    layers, looped = find(model)
    config = model.config
    for part in {model, model.base_model}:
        if isinstance(part, LoopedModel):
            part.__class__ = type(part).original
    config.__class__ = type(config).original
    del config.looped
    if looped.mask_check is not None:
        looped.mask_check.remove()
    for i, layer in enumerate(looped.original()):
        layers[looped.first + i] = layer
