"""What a loop body is, which weights it has, and which calls make sense. All validation lives here."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from shift_kernels.errors import input_error, type_error

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "swiglu")
NORMS = ("layernorm", "rmsnorm", "none")
PLACEMENTS = ("pre", "post", "sandwich")
POSITIONS = ("none", "rope")
INJECTIONS = ("none", "add")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One loop body: ``n_layers`` transformer layers that are applied together T times.

    Sizes left out are known from then on, so ``dataclasses.replace`` keeps them; None lets them follow again:
    ``replace(spec, n_heads=8, n_kv_heads=None, head_dim=None)``.

    Args:
        d_model: width of the residual stream.
        n_heads: query heads.
        n_kv_heads: key/value heads, a divisor of ``n_heads`` (grouped-query attention); default ``n_heads``.
        head_dim: width of a head; default ``d_model / n_heads``.
        n_layers: layers in one loop body.
        d_ff: hidden width of the MLP; 0 makes an attention-only block; default ``4 * d_model``.
        activation: ``relu``, ``gelu`` (erf), ``gelu_tanh`` or ``swiglu`` (``silu(gate) * up``).
        norm: ``layernorm``, ``rmsnorm`` or ``none``.
        norm_placement: ``pre`` ``x + f(norm(x))``, ``post`` ``norm(x + f(x))`` or
            ``sandwich`` ``x + norm_post(f(norm(x)))``.
        norm_eps: added to the variance (mean square) under the root.
        bias: biases in all linear maps and in layernorm.
        causal: position i attends to positions <= i.
        position: ``none`` or ``rope`` (rotary, halves rotated, applied to queries and keys).
        rope_theta: base of the rotary frequencies.
        injection: ``none``: h_0 = e; ``add``: h_0 = 0 and every loop reads ``h + e``.
        loop_norm: a final norm inside every loop (Fan et al., arXiv 2409.15647).
        residual_scale: factor on every branch before it is added to the residual stream.

    Raises:
        ShiftInputError: a value outside what is allowed; :class:`ShiftTypeError` for a wrong type.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    n_layers: int = 1
    d_ff: int = None  # type: ignore[assignment]
    activation: str = "gelu"
    norm: str = "layernorm"
    norm_placement: str = "pre"
    norm_eps: float = 1e-5
    bias: bool = True
    causal: bool = True
    position: str = "none"
    rope_theta: float = 10000.0
    injection: str = "none"
    loop_norm: bool = False
    residual_scale: float = 1.0
    key: str = dataclasses.field(init=False, repr=False, compare=False, default="")
    """This specification as JSON: how it travels through operator schemas."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "n_layers"):
            _check_int(name, getattr(self, name), 1)
        self._resolve("n_kv_heads", self.n_heads)
        self._resolve("d_ff", 4 * self.d_model)
        _check_int("n_kv_heads", self.n_kv_heads, 1)
        _check_int("d_ff", self.d_ff, 0)
        if self.n_heads % self.n_kv_heads:
            _refuse("n_kv_heads", self.n_kv_heads, f"a divisor of n_heads = {self.n_heads}", "Change either.")
        if self.head_dim is None and self.d_model % self.n_heads:
            _refuse(
                "n_heads",
                self.n_heads,
                f"a divisor of d_model = {self.d_model} when head_dim is not given",
                "Pass head_dim, or choose n_heads that divides d_model.",
            )
        self._resolve("head_dim", self.d_model // self.n_heads)
        _check_int("head_dim", self.head_dim, 1)
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("norm", self.norm, NORMS)
        _check_choice("norm_placement", self.norm_placement, PLACEMENTS)
        _check_choice("position", self.position, POSITIONS)
        _check_choice("injection", self.injection, INJECTIONS)
        for name in ("bias", "causal", "loop_norm"):
            if not isinstance(getattr(self, name), bool):
                raise type_error("BlockSpec", name, getattr(self, name), "True or False", "Pass a bool.")
        for name in ("norm_eps", "rope_theta", "residual_scale"):
            _check_positive(name, getattr(self, name))
        if self.position == "rope" and self.head_dim % 2:
            _refuse(
                "head_dim", self.head_dim, "an even number with position='rope'", "Rotary halves need pairs."
            )
        if self.loop_norm and self.norm == "none":
            _refuse("loop_norm", True, "False with norm='none'", "Choose norm='layernorm' or 'rmsnorm'.")
        if self.norm == "none" and self.norm_placement != "pre":
            _refuse(
                "norm_placement",
                self.norm_placement,
                "'pre' with norm='none'",
                "There is no norm to place; leave it out.",
            )
        object.__setattr__(self, "key", json.dumps(self.to_dict(), sort_keys=True))
        object.__setattr__(self, "_shapes", self._weight_shapes())

    def _resolve(self, name: str, default: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, default)

    def to_dict(self) -> dict[str, Any]:
        """All constructor arguments, resolved, as plain values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    @property
    def qkv_dim(self) -> int:
        """Rows of the fused input projection: queries, then keys, then values."""
        return (self.n_heads + 2 * self.n_kv_heads) * self.head_dim

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every weight, in order.

        Names and layouts are those of ``torch.nn.TransformerEncoder`` (linear weights are
        ``[out_features, in_features]``), so state dicts are interchangeable where both can express a block.
        """
        return self._shapes  # type: ignore[attr-defined]

    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        d, attn_dim = self.d_model, self.n_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}

        def norm(name: str) -> None:
            if self.norm != "none":
                shapes[f"{name}.weight"] = (d,)
                if self.norm == "layernorm" and self.bias:
                    shapes[f"{name}.bias"] = (d,)

        def linear(weight: str, bias: str, out_features: int, in_features: int) -> None:
            shapes[weight] = (out_features, in_features)
            if self.bias:
                shapes[bias] = (out_features,)

        for i in range(self.n_layers):
            p = f"layers.{i}."
            linear(p + "self_attn.in_proj_weight", p + "self_attn.in_proj_bias", self.qkv_dim, d)
            linear(p + "self_attn.out_proj.weight", p + "self_attn.out_proj.bias", d, attn_dim)
            norm(p + "norm1")
            if self.norm_placement == "sandwich":
                norm(p + "norm1_post")
            if self.d_ff:
                hidden = 2 * self.d_ff if self.activation == "swiglu" else self.d_ff
                linear(p + "linear1.weight", p + "linear1.bias", hidden, d)
                linear(p + "linear2.weight", p + "linear2.bias", d, self.d_ff)
                norm(p + "norm2")
                if self.norm_placement == "sandwich":
                    norm(p + "norm2_post")
        if self.loop_norm:
            norm("loop_norm")
        return shapes


@lru_cache(maxsize=256)
def spec_from_key(key: str) -> BlockSpec:
    """The :class:`BlockSpec` whose ``key`` this is."""
    return BlockSpec(**json.loads(key))


def check_call(
    function: str,
    e: Tensor,
    weights: Mapping[str, Tensor],
    spec: BlockSpec,
    n_loops: int | Tensor,
    seq_lens: Tensor | None,
    n_grad_loops: int | None,
    halt_threshold: float | None,
) -> None:
    """Refuse a call of the looped block that makes no sense, before any kernel runs.

    Values inside tensors are checked where they lie in host memory; on an accelerator that would cost a
    synchronisation, so kernels clamp them instead (lengths to [0, seq_len], loops to >= 0).
    """
    if not isinstance(spec, BlockSpec):
        raise type_error(function, "spec", type(spec).__name__, "a BlockSpec", "Build one: BlockSpec(...).")
    check_floating(function, "e", e)
    if e.ndim != 3 or e.shape[2] != spec.d_model:
        raise input_error(
            function,
            "e",
            list(e.shape),
            f"a tensor of shape [batch, seq_len, {spec.d_model}]",
            "The last dimension is d_model of the spec.",
        )
    if e.shape[0] < 1 or e.shape[1] < 1:
        raise input_error(
            function, "e", list(e.shape), "batch >= 1 and seq_len >= 1", "Skip empty batches before the call."
        )
    _check_weights(function, weights, spec, e.device)
    _check_loops(function, n_loops, e)
    if seq_lens is not None:
        check_per_sample(function, "seq_lens", seq_lens, e, 0, e.shape[1])
    if n_grad_loops is not None:
        if not isinstance(n_grad_loops, (int, torch.SymInt)) or isinstance(n_grad_loops, bool):
            raise type_error(function, "n_grad_loops", n_grad_loops, "None or an int >= 1", "Pass an int.")
        if n_grad_loops < 1:
            raise input_error(
                function, "n_grad_loops", n_grad_loops, "None or an int >= 1", "Use torch.no_grad() for none."
            )
    if halt_threshold is not None:
        _check_halting(function, e, weights, halt_threshold)


def _check_halting(function: str, e: Tensor, weights: Mapping[str, Tensor], halt_threshold: float) -> None:
    if not isinstance(halt_threshold, (int, float)) or isinstance(halt_threshold, bool):
        raise type_error(function, "halt_threshold", halt_threshold, "None or a float > 0", "Pass a float.")
    if not (math.isfinite(halt_threshold) and halt_threshold > 0):
        raise input_error(
            function,
            "halt_threshold",
            halt_threshold,
            "None or a finite float > 0",
            "Leave it out to never halt.",
        )
    if torch.is_grad_enabled() and (e.requires_grad or any(w.requires_grad for w in weights.values())):
        raise input_error(
            function,
            "halt_threshold",
            halt_threshold,
            "None while gradients are recorded (halting is for inference)",
            "Wrap the call in torch.no_grad().",
        )


def check_floating(function: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise type_error(function, name, type(x).__name__, "a torch.Tensor", "Convert it first.")
    if x.dtype not in DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise type_error(function, name, x.dtype, f"a tensor of dtype {allowed}", f"Cast it: {name}.float().")
    if x.is_nested or x.layout != torch.strided:
        given = "a nested tensor" if x.is_nested else x.layout
        raise type_error(function, name, given, "a dense tensor", "Pad it, and give its seq_lens.")


def _check_weights(
    function: str, weights: Mapping[str, Tensor], spec: BlockSpec, device: torch.device
) -> None:
    if not isinstance(weights, Mapping):
        raise type_error(
            function,
            "weights",
            type(weights).__name__,
            "a dict of tensors",
            "Pass dict(block.named_parameters()).",
        )
    shapes = spec.weight_shapes()
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise input_error(
            function,
            "weights",
            f"without {missing}",
            f"exactly the keys {list(shapes)}",
            "See BlockSpec.weight_shapes().",
        )
    unknown = [name for name in weights if name not in shapes]
    if unknown:
        raise input_error(
            function,
            "weights",
            f"with {unknown}",
            f"exactly the keys {list(shapes)}",
            "Remove what the spec does not have.",
        )
    for name, shape in shapes.items():
        w = weights[name]
        check_floating(function, f"weights[{name!r}]", w)
        if tuple(w.shape) != shape:
            raise input_error(
                function,
                f"weights[{name!r}]",
                list(w.shape),
                f"shape {list(shape)}",
                "It follows from the spec.",
            )
        if w.device != device:
            raise input_error(
                function,
                f"weights[{name!r}]",
                f"on {w.device}",
                f"the device of e ({device})",
                "Move one of them.",
            )


def _check_loops(function: str, n_loops: int | Tensor, e: Tensor) -> None:
    if isinstance(n_loops, Tensor):
        if n_loops.ndim == 0 and not n_loops.is_floating_point():
            n_loops = n_loops.expand(e.shape[0])
        check_per_sample(function, "n_loops", n_loops, e, 0, None)
    elif not isinstance(n_loops, (int, torch.SymInt)) or isinstance(n_loops, bool):
        raise type_error(
            function,
            "n_loops",
            n_loops,
            "an int >= 0 or an int tensor of shape [] or [batch]",
            "Pass an int.",
        )
    elif n_loops < 0:
        raise input_error(function, "n_loops", n_loops, "an int >= 0", "0 loops return h_0.")


def check_per_sample(function: str, name: str, x: Tensor, e: Tensor, low: int, high: int | None) -> None:
    batch = e.shape[0]
    if not isinstance(x, Tensor):
        raise type_error(
            function, name, type(x).__name__, f"an int tensor of shape [{batch}]", "Use torch.tensor(...)."
        )
    if x.dtype not in (torch.int32, torch.int64):
        raise type_error(function, name, x.dtype, "int32 or int64", f"Cast it: {name}.long().")
    if tuple(x.shape) != (batch,):
        raise input_error(
            function, name, list(x.shape), f"shape [{batch}], one per sample", "One entry a sample."
        )
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_fake(x):
        smallest, largest = int(x.min()), int(x.max())
        if smallest < low or (high is not None and largest > high):
            bad = smallest if smallest < low else largest
            allowed = f"values >= {low}" if high is None else f"values from {low} to {high}"
            raise input_error(function, name, bad, allowed, "Check how it was computed.")
    elif x.device.type != "cpu" and x.device != e.device:
        raise input_error(
            function, name, f"on {x.device}", f"the CPU or the device of e ({e.device})", "Move it."
        )


def _is_fake(x: Tensor) -> bool:
    return isinstance(x, torch._subclasses.FakeTensor) or x.is_meta


def _refuse(name: str, value: object, allowed: str, remedy: str) -> NoReturn:
    raise input_error("BlockSpec", name, value, allowed, remedy)


def _check_int(name: str, value: object, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise type_error("BlockSpec", name, value, f"an int >= {low}", "Pass an int.")
    if value < low:
        _refuse(name, value, f"an int >= {low}", "Choose a larger one.")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        _refuse(name, value, "one of " + ", ".join(map(repr, choices)), "Check the spelling.")


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise type_error("BlockSpec", name, value, "a finite float > 0", "Pass a float.")
    if not (math.isfinite(value) and value > 0):
        _refuse(name, value, "a finite float > 0", "Choose a positive number.")
