"""The module that takes the place of some layers of a Hugging Face model, and runs them as looped blocks."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shift_kernels.checks import check_int
from shift_kernels.hf.families import FUNCTION, Family, refuse
from shift_kernels.hf.slots import Step
from shift_kernels.hf.tokens import REMEDY
from shift_kernels.module import LoopedBlock
from shift_kernels.spec import MAX_LOOPS, BlockSpec
from shift_kernels.torch_internals import outside_of_dynamo


class LoopedLayers(nn.Module):
    """Some successive decoder layers, applied ``n_loops`` times; called as one decoder layer is.

    Layers that are alike are one :class:`LoopedBlock`. Where they alternate (Gemma 2: every other layer has a
    sliding window) each kind is a block of its own, and a loop is one call after the other.

    Args:
        family: what these layers are.
        config: of the model; ``config.looped["n_loops"]`` is T, and may be changed between calls.
        layers: the decoder layers, whose weights are copied.
        first: the number of the first.
    """

    def __init__(self, family: Family, config: Any, layers: Sequence[nn.Module], first: int) -> None:
        super().__init__()
        self.family, self.config, self.first, self.n_layers = family, config, first, len(layers)
        self.layer_class = type(layers[0])
        self.keywords = tuple(inspect.signature(self.layer_class.forward).parameters)[1:]
        specs = [family.spec(config, first + i) for i in range(len(layers))]
        blocks = []
        at = 0
        for spec, alike in groupby(specs):
            n = len(list(alike))
            blocks.append(_block(family, spec, layers[at : at + n]))
            at += n
        self.blocks = nn.ModuleList(blocks)
        self.mask_check: RemovableHandle | None = None

    @property
    def n_loops(self) -> Any:
        """T, of the next call.

        Raises:
            ShiftInputError: it is none.
        """
        given = self.config.looped["n_loops"]
        if isinstance(given, Tensor) and len(self.blocks) == 1:
            return given  # one for each sample, which the block checks
        return check_int(FUNCTION, 'config.looped["n_loops"]', given, 1, MAX_LOOPS)

    @outside_of_dynamo  # masks are read on the host; the blocks are a call of a kernel each as it is
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the decoder layer's: hidden states [batch, seq_len, d_model] in and out; pads return 0.

        Raises:
            ShiftInputError: a mask that is not that of causal, padded sequences; positions with gaps; a cache
                of an unknown kind; dropout. Nothing is computed then.
        """
        call = dict(zip(self.keywords, args, strict=False)) | kwargs
        e = call["hidden_states"]
        if call.get("encoder_hidden_states") is not None:
            refuse("encoder_hidden_states", "given", "None", "Cross attention is not part of a LoopedBlock.")
        self._refuse_dropout()
        if self.config.num_hidden_layers < self.first + self.n_layers:
            allowed = f"{self.first + self.n_layers} or more: layers from {self.first} on are looped as one"
            refuse("config.num_hidden_layers", self.config.num_hidden_layers, allowed, "Exit elsewhere.")
        blocks = self.in_order
        spec = blocks[0].spec
        positions = call.get("position_ids") if spec.position == "rope" else None
        slots = range(self.first, self.first + self.n_layers)
        windows, n_loops = [block.spec.window for block in blocks], self.n_loops
        step = Step(call.get("cache"), slots, e, call.get("attention_mask"), positions, windows)
        if len(blocks) == 1:
            return step.end(step(blocks[0], step.begin(e, self), n_loops))
        h = step.begin(e, self, n_loops * len(blocks))
        for _ in range(n_loops):
            for block in blocks:
                h = step(block, h, 1)
        return step.end(h)

    @property
    def in_order(self) -> list[LoopedBlock]:
        """The blocks of one loop."""
        return list(self.blocks)  # type: ignore[arg-type]

    def _refuse_dropout(self) -> None:
        for name in self.family.dropout if self.training else ():
            if p := getattr(self.config, name):
                refuse(f"config.{name}", p, "0 in training: a LoopedBlock has no dropout", "Set it to 0.0.")

    def original(self) -> list[nn.Module]:
        """The decoder layers with these weights."""
        layers: list[nn.Module] = []
        for block in self.in_order:
            for i in range(block.spec.n_layers):
                prefix = f"layers.{i}."
                ours = {k.removeprefix(prefix): w for k, w in block.weights().items() if k.startswith(prefix)}
                layers.append(self._layer(ours, self.first + len(layers)))
        return layers

    def _layer(self, ours: dict[str, Tensor], index: int) -> nn.Module:
        some = next(iter(ours.values()))
        with some.device:
            layer = self.layer_class(self.config, index)
        assign(layer.to(some.dtype), self.family.to_layer(ours, layer))
        return layer.train(self.training)


def refuse_own_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before a model whose looped layers alternate: they see the mask of the first kind alone.

    Transformers makes a mask for each kind out of one of two dimensions; one of four it gives to all of them.
    """
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if isinstance(mask, Tensor) and mask.ndim == 4:
        refuse("attention_mask", list(mask.shape), "[batch, seq_len], as some layers have a window", REMEDY)


class PassedThrough(nn.Module):
    """In the place of a layer that :class:`LoopedLayers`, further up, has run already."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def assign(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Put parameters in the place of those of the same names."""
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, parameter)


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _refuse_changed(layer: nn.Module) -> None:
    """A block takes a layer's weights; what else a user put there would be gone without a word."""
    for name, module in layer.named_modules(prefix="layer"):
        hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
        if any(not _is_known(hook.__module__) for hook in hooks):
            refuse(name, "a module with hooks", "one without", "Remove them first.")
        if "forward" in vars(module) or not _is_known(type(module).__module__):
            refuse(name, f"a changed {type(module).__name__}", "the module that Transformers has there")


def _is_known(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "transformers")


def _block(family: Family, spec: BlockSpec, layers: Sequence[nn.Module]) -> LoopedBlock:
    """One block of layers that are alike, with their weights."""
    for layer in layers:
        _refuse_changed(layer)
    block = LoopedBlock(dataclasses.replace(spec, n_layers=len(layers)), device="meta")
    for i, layer in enumerate(layers):
        assign(block.get_submodule(f"layers.{i}"), family.to_block(dict(layer.named_parameters()), spec))
    return block
