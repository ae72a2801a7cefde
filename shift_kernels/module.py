"""LoopedBlock: the parameters of a block and one call that applies it T times."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import Unpack  # comes with torch

from shift_kernels.api import looped_block
from shift_kernels.call import CallKeywords
from shift_kernels.checks import check_dtype, check_usable_device
from shift_kernels.errors import input_error, refuses_unknown_keywords, type_error
from shift_kernels.spec import BlockSpec

_FROM_TORCH = "LoopedBlock.from_torch"
RELUS = (nn.functional.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
"""Torch's functions for one and the same thing."""


def _refuse_on_submodule(path: str, value: str) -> NoReturn:
    raise input_error(
        "shift_kernels.LoopedBlock",
        path,
        value,
        "parameters and torch.nn.utils.parametrize, as kernels read a submodule's weights and never call it",
        "Register hooks on the LoopedBlock; torch.nn.utils.parametrizations has weight_norm, too.",
    )


class _NoHooks(OrderedDict):
    """The hooks of a module that is never called. Refuses to take any.

    It refuses to be searched, too: torch.nn.utils.weight_norm, spectral_norm and prune do that first, and
    would have replaced the weight by the time at which they register their hook.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def _refuse(self, *_: object) -> NoReturn:
        _refuse_on_submodule(self.path, "a hook")

    __setitem__ = items = values = _refuse

    def __reduce__(self) -> tuple[type[_NoHooks], tuple[str]]:
        return _NoHooks, (self.path,)


class WeightHolder(nn.Module):
    """A submodule of :class:`LoopedBlock`: holds weights under the names that ``torch.nn`` gives them.

    It computes nothing, so it refuses hooks, and modules that do compute, instead of ignoring them.

    Args:
        path: its name in the block.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        hooks = _NoHooks(path)
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
            object.__setattr__(self, kind, hooks)

    def forward(self, *_: object) -> NoReturn:
        _refuse_on_submodule(self.path, "called")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            _refuse_on_submodule(self.path, "another forward")
        if name != "parametrizations":
            _refuse_computing(self, name, value)
        super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        _refuse_computing(self, name, module)
        super().add_module(name, module)


def _refuse_computing(owner: nn.Module, name: str, value: object) -> None:
    """Refuse a module whose forward the kernels would not call."""
    if isinstance(value, nn.Module) and not isinstance(value, WeightHolder):
        path = f"{owner.path}.{name}" if isinstance(owner, WeightHolder) else name
        _refuse_on_submodule(path, type(value).__name__)


class LoopedBlock(nn.Module):
    """A transformer block that is applied ``n_loops`` times with the same weights.

    Parameters carry the names and layouts of ``torch.nn.TransformerEncoder``
    (``layers.0.linear1.weight`` ...), so its state dicts load here and the other way round.

    Submodules (``layers.0.linear1`` ...) only hold weights: kernels read these and never call a submodule.
    Hooks on the block itself work as on any module, and ``torch.nn.utils.parametrize`` works everywhere.
    What could have no effect is refused with an error: a forward or backward hook on a submodule (also those
    of FSDP applied to a submodule, ``torch.nn.utils.prune`` and the older ``weight_norm`` and
    ``spectral_norm``), and another module in a submodule's place (LoRA and quantised linear maps).

    Args:
        spec: what the block is.
        device, dtype: of the parameters.

    Raises:
        ShiftInputError: no such device; :class:`ShiftTypeError` for a wrong type or dtype.
    """

    @refuses_unknown_keywords("shift_kernels.LoopedBlock")
    def __init__(
        self,
        spec: BlockSpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        function = "shift_kernels.LoopedBlock"
        if not isinstance(spec, BlockSpec):
            raise type_error(
                function, "spec", type(spec).__name__, "a BlockSpec", "Build one: BlockSpec(...)."
            )
        if dtype is not None:
            check_dtype(function, "dtype", dtype)
        if device is not None:
            check_usable_device(function, "device", device)
        self.spec = spec
        for name, shape in spec.weight_shapes().items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for depth, part in enumerate(path, 1):
                if part not in owner._modules:
                    owner.add_module(part, WeightHolder(".".join(path[:depth])))
                owner = owner._modules[part]  # type: ignore[assignment]
            owner.register_parameter(leaf, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(self.__dict__.get("_modules", {}).get(name), WeightHolder):
            _refuse_computing(self, name, value)
        super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if isinstance(self._modules.get(name), WeightHolder):
            _refuse_computing(self, name, module)
        super().add_module(name, module)

    def reset_parameters(self) -> None:
        """Linear maps uniform with variance 1 / (3 fan_in), as ``nn.Linear``; biases 0; norms multiply by 1.

        The injection "diagonal" begins as ``h / 2 + e``, "norm_add" as ``norm(h) + e``.
        """
        ones = ("injection.gain", "injection.alpha")
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.kaiming_uniform_(p, a=math.sqrt(5))
            else:
                is_factor = name.endswith("weight") and self.spec.norm_weight == "scale"
                nn.init.constant_(p, 1.0 if is_factor or name in ones else 0.0)

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, as :func:`looped_block` takes them; they may be parametrized or shared."""
        found: dict[str, Tensor] = {}
        if torch.compiler.is_compiling():
            found.update(self.named_parameters(remove_duplicate=False))
        else:
            _collect_parameters(self, "", found)
        if found.keys() == self.spec.weight_shapes().keys():
            return found
        for name in self.spec.weight_shapes():
            if name not in found:
                path, _, leaf = name.rpartition(".")
                owner = self.get_submodule(path)
                # Not what the hooks of torch.nn.utils.weight_norm or prune leave: nothing would renew it.
                if parametrize.is_parametrized(owner, leaf):
                    found[name] = getattr(owner, leaf)
        return {name: w for name, w in found.items() if ".parametrizations." not in name}

    @refuses_unknown_keywords("shift_kernels.LoopedBlock", CallKeywords)
    def forward(
        self, e: Tensor, n_loops: int | Tensor, **keywords: Unpack[CallKeywords]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """h_T of e; arguments and keywords are those of :func:`shift_kernels.looped_block`."""
        return looped_block(e, self.weights(), self.spec, n_loops, **keywords)

    def extra_repr(self) -> str:
        return str(self.spec)

    @classmethod
    def from_torch(
        cls, layer: nn.TransformerEncoderLayer | nn.TransformerEncoder, *, causal: bool, **options
    ) -> LoopedBlock:
        """A looped block with a copy of this layer's weights, frozen where those are: one loop does the same.

        Args:
            layer: ``torch.nn.TransformerEncoderLayer``, or a ``TransformerEncoder``, whose layers are one
                loop and whose norm, if it has one, ends each; ``batch_first=True``, which is not torch's
                default; dropout 0, or the layer in eval mode.
            causal: what the layer was called with (``is_causal``, its mask); the layer does not know.
            options: further fields of :class:`BlockSpec`, such as ``injection="add"``, but none for which
                the layer has no weights.

        Raises:
            ShiftInputError: ``batch_first=False``, dropout, an activation that is neither relu nor gelu, a
                ``forward`` that is not torch's, layers that are not alike, or such an option.
        """
        if isinstance(layer, nn.TransformerEncoder):
            _check_computes_as("", layer, nn.TransformerEncoder, ("forward",))
            layers, loop_norm = list(layer.layers), layer.norm
        else:
            layers, loop_norm = [layer], None
        fields = _fields_of(layers[0], causal) if layers else {}
        if not layers or any(_fields_of(other, causal) != fields for other in layers):
            raise input_error(
                _FROM_TORCH,
                "layer",
                f"{len(layers)} layers",
                "layers that are alike, one at least",
                "Change it.",
            )
        if len(layers) > 1:
            fields["n_layers"] = len(layers)
        if loop_norm is not None:
            _check_loop_norm(loop_norm, fields)
            fields["loop_norm"] = True
        if twice := fields.keys() & options.keys():
            allowed = "fields that the layer does not decide"
            raise input_error(_FROM_TORCH, "options", sorted(twice), allowed, "Leave them out.")
        spec = BlockSpec(**fields, **options)
        theirs = {f"layers.{i}.{n}": p for i, one in enumerate(layers) for n, p in one.named_parameters()}
        if loop_norm is not None:
            theirs |= {f"loop_norm.{n}": p for n, p in loop_norm.named_parameters()}
        shapes = {name: tuple(p.shape) for name, p in theirs.items()}
        own = spec.weight_shapes().items()
        if {n: shape for n, shape in own if n in theirs or n.startswith("layers.")} != shapes:
            raise input_error(
                _FROM_TORCH, "options", options, "fields that ask for no other weights than the layer's",
                "Leave out n_layers, n_kv_heads and head_dim.",
            )  # fmt: skip
        weight = layers[0].linear1.weight
        block = cls(spec, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            for name, p in theirs.items():
                block.get_parameter(name).copy_(p)
                block.get_parameter(name).requires_grad_(p.requires_grad)
        return block

    def to_torch(self) -> nn.TransformerEncoderLayer:
        """The layer that :meth:`from_torch` would give this block for, where there is one.

        It takes [batch, seq_len, d_model], as the block does (``batch_first=True``). A layer does not know
        whether it is causal: that of a causal block needs a mask in every call, ``layer(e, mask,
        is_causal=True)`` with ``mask = nn.Transformer.generate_square_subsequent_mask(seq_len)``.

        Raises:
            ShiftInputError: the block has an option that ``nn.TransformerEncoderLayer`` lacks.
        """
        s = self.spec
        twin = BlockSpec(
            d_model=s.d_model,
            n_heads=s.n_heads,
            d_ff=max(s.d_ff, 1),
            activation=s.activation if s.activation in ("relu", "gelu") else "gelu",
            norm_placement="post" if s.norm_placement == "post" else "pre",
            norm_eps=s.norm_eps,
            bias=s.bias,
            causal=s.causal,
            injection=s.injection,
        )
        if s != twin:
            fields = {k: v for k, v in s.to_dict().items() if v != twin.to_dict()[k]}
            raise input_error(
                "LoopedBlock.to_torch",
                "spec",
                fields,
                "what nn.TransformerEncoderLayer has",
                "Keep the LoopedBlock.",
            )
        first = next(self.parameters())
        layer = nn.TransformerEncoderLayer(
            s.d_model, s.n_heads, s.d_ff, dropout=0.0, activation=s.activation, layer_norm_eps=s.norm_eps,
            batch_first=True, norm_first=s.norm_placement == "pre", bias=s.bias,
            device=first.device, dtype=first.dtype,
        )  # fmt: skip
        layer.load_state_dict(self.layers.get_submodule("0").state_dict())  # type: ignore[union-attr]
        return layer


def _fields_of(layer: nn.Module, causal: bool) -> dict[str, Any]:
    """The fields of :class:`BlockSpec` that a layer decides."""
    if not isinstance(layer, nn.TransformerEncoderLayer):
        raise type_error(
            _FROM_TORCH,
            "layer",
            type(layer).__name__,
            "a torch.nn.TransformerEncoderLayer, or a TransformerEncoder of such",
            "Wrap its weights by name.",
        )
    _check_computes_as("", layer, nn.TransformerEncoderLayer, ("forward", "_sa_block", "_ff_block"))
    for part, base in _PARTS.items():
        _check_computes_as(f"{part}=", layer.get_submodule(part), base)

    def refuse(value: str, allowed: str, remedy: str) -> NoReturn:
        raise input_error(_FROM_TORCH, "layer", value, allowed, remedy)

    if not layer.self_attn.batch_first:
        refuse(
            "batch_first=False",
            "batch_first=True, as a block takes [batch, seq_len, d_model]",
            "Set layer.self_attn.batch_first = True, and transpose what the layer was given.",
        )
    attention = layer.self_attn
    if attention.add_zero_attn or attention.bias_k is not None:
        refuse("attention to keys of its own", "add_zero_attn=False, add_bias_kv=False", "Keep the layer.")
    weights = dict(layer.named_parameters())
    parts = [part for part in _PARTS if part != "self_attn"]  # whose own are in_proj's
    absent = [name for name in (f"{part}.weight" for part in parts) if name not in weights]
    biases = ["self_attn.in_proj_bias", *(f"{part}.bias" for part in parts)]
    if absent or len({name in weights for name in biases}) > 1:
        words = ", ".join(absent) + " absent" if absent else "biases in some of its parts"
        refuse(words, "weights and biases in all parts, or biases in none", "Keep the layer.")
    rates = {name: getattr(getattr(layer, name), "p", 0.0) for name in ("dropout", "dropout1", "dropout2")}
    rates["self_attn.dropout"] = layer.self_attn.dropout
    if layer.training and (given := [f"{name}={rate}" for name, rate in rates.items() if rate]):
        refuse(f"{', '.join(given)} in training mode", "dropout=0", "Call layer.eval() first.")
    if layer.norm1.eps != layer.norm2.eps:
        eps = f"norm1.eps={layer.norm1.eps} and norm2.eps={layer.norm2.eps}"
        refuse(eps, "norms with one eps, BlockSpec's norm_eps", "Set one of them.")
    return dict(
        d_model=layer.linear1.in_features,
        n_heads=layer.self_attn.num_heads,
        d_ff=layer.linear1.out_features,
        activation=_activation_name(_FROM_TORCH, layer),
        norm="layernorm",
        norm_placement="pre" if layer.norm_first else "post",
        norm_eps=layer.norm1.eps,
        bias=layer.linear1.bias is not None,
        causal=causal,
    )


_PARTS: dict[str, type[nn.Module]] = {
    "self_attn": nn.MultiheadAttention,
    "self_attn.out_proj": nn.Linear,
    "linear1": nn.Linear,
    "linear2": nn.Linear,
    "norm1": nn.LayerNorm,
    "norm2": nn.LayerNorm,
}


def _check_computes_as(
    name: str, module: nn.Module, base: type[nn.Module], methods: tuple[str, ...] = ("forward",)
) -> None:
    """Refuse a module that computes in a way of its own: its weights alone would be taken over."""
    own = [
        m
        for m in (*methods, "__call__")
        if getattr(getattr(module, m, None), "__func__", None) is not getattr(base, m)
    ]
    own += ["hooks"] * bool(module._forward_hooks or module._forward_pre_hooks)
    own += ["parametrizations"] * parametrize.is_parametrized(module)
    if own:
        raise input_error(
            _FROM_TORCH,
            "layer",
            f"{name}{type(module).__name__}, which has its own {' and '.join(own)}",
            f"what computes as torch.nn.{base.__name__} does",
            "Give looped_block its weights by name, if a block computes the same.",
        )


def _check_loop_norm(norm: nn.Module, fields: dict[str, Any]) -> None:
    """Refuse a norm that is not the layers' own kind."""
    alike = isinstance(norm, nn.LayerNorm) and norm.eps == fields["norm_eps"] and norm.weight is not None
    if not alike or (norm.bias is not None) != fields["bias"]:
        allowed = f"a LayerNorm with eps={fields['norm_eps']} and bias={fields['bias']}, as in the layers"
        raise input_error(_FROM_TORCH, "layer.norm", norm, allowed, "Apply it yourself: encoder.norm = None.")


def _collect_parameters(module: nn.Module, prefix: str, found: dict[str, Tensor]) -> None:
    """As ``named_parameters(remove_duplicate=False)``, which takes a sixth of a small block's call."""
    for name, p in module._parameters.items():
        if p is not None:
            found[prefix + name] = p
    for name, child in module._modules.items():
        if child is not None:
            _collect_parameters(child, f"{prefix}{name}.", found)


def _activation_name(function: str, layer: nn.TransformerEncoderLayer) -> str:
    activation = layer.activation
    if activation in RELUS or isinstance(activation, nn.ReLU):
        return "relu"
    if activation is nn.functional.gelu or (
        isinstance(activation, nn.GELU) and activation.approximate == "none"
    ):
        return "gelu"
    if isinstance(activation, nn.GELU):
        return "gelu_tanh"
    raise input_error(function, "layer", f"activation={activation}", "relu or gelu", "Use one of these.")
