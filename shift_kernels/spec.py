"""What a loop body is, which weights it has, and which calls make sense. All validation lives here."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from shift_kernels.errors import input_error, near_miss, refuses_unknown_keywords, type_error
from shift_kernels.torch_internals import has_no_values

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "swiglu", "relu2")
NORMS = ("layernorm", "rmsnorm", "none")
PLACEMENTS = ("pre", "post", "sandwich")
POSITIONS = ("none", "rope")
INJECTIONS = ("none", "add")
CHOICES = {
    "activation": ACTIVATIONS,
    "norm": NORMS,
    "norm_placement": PLACEMENTS,
    "position": POSITIONS,
    "injection": INJECTIONS,
}
"""Fields of :class:`BlockSpec` that are words, and the words."""
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH, MAX_LAYERS = 2**24, 2**12
"""Of d_model, heads, head_dim, d_ff and the projection to all heads; of n_layers. Far beyond any block, and
so small that a product of two fits 64 bits."""
MAX_LOOPS = MAX_TOKENS = 2**31 - 1
"""Of n_loops; of batch and of seq_len."""


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
        activation: ``relu``, ``relu2`` (``relu(x)^2``; So et al., arXiv 2109.08668), ``gelu`` (erf),
            ``gelu_tanh`` or ``swiglu`` (``silu(gate) * up``).
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
        self._check_int("d_model")
        self._check_int("n_heads")
        self._check_int("n_layers", high=MAX_LAYERS)
        self._resolve("n_kv_heads", self.n_heads)
        self._resolve("d_ff", 4 * self.d_model)
        self._check_int("n_kv_heads")
        self._check_int("d_ff", low=0)
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
        self._check_int("head_dim")
        if self.qkv_dim > MAX_WIDTH:
            _refuse(
                "head_dim",
                self.head_dim,
                f"(n_heads + 2 n_kv_heads) * head_dim up to {MAX_WIDTH}, not {self.qkv_dim}",
                "Choose fewer or narrower heads.",
            )
        for name, choices in CHOICES.items():
            check_choice("BlockSpec", name, getattr(self, name), choices)
        for name in ("bias", "causal", "loop_norm"):
            check_bool("BlockSpec", name, getattr(self, name))
        for name in ("norm_eps", "rope_theta", "residual_scale"):
            value = check_positive("BlockSpec", name, getattr(self, name), "a finite float > 0")
            object.__setattr__(self, name, value)
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

    def __hash__(self) -> int:
        return hash(self.key)  # a string keeps its hash: plans are looked up by it in every call

    def _resolve(self, name: str, default: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, default)

    def _check_int(self, name: str, low: int = 1, high: int = MAX_WIDTH) -> None:
        object.__setattr__(self, name, check_int("BlockSpec", name, getattr(self, name), low, high))

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


BlockSpec.__init__ = refuses_unknown_keywords("BlockSpec")(BlockSpec.__init__)  # type: ignore[method-assign]


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
    return_all_loops: bool,
) -> tuple[int | Tensor, Tensor | None, int | None]:
    """Refuse a call of the looped block that makes no sense, before any kernel runs.

    Values inside tensors are checked where they lie in host memory; on an accelerator that would cost a
    synchronisation, so kernels clamp them instead (lengths to [0, seq_len], loops to >= 0).

    Returns:
        n_loops, seq_lens and n_grad_loops as backends take them. Tensors are copies, int64 [batch]: what the
        caller does to theirs after this cannot reach the call or its backward.
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
    check_bool(function, "return_all_loops", return_all_loops)
    n_loops = _check_loops(function, n_loops, e)
    if seq_lens is not None:
        seq_lens = own_per_sample(function, "seq_lens", seq_lens, e, 0, e.shape[1])
    if n_grad_loops is not None:
        n_grad_loops = check_int(function, "n_grad_loops", n_grad_loops, 1, None, "None or an int >= 1")
        if n_grad_loops > MAX_LOOPS:
            n_grad_loops = MAX_LOOPS
    if halt_threshold is not None:
        _check_halting(function, e, weights, halt_threshold)
    return n_loops, seq_lens, n_grad_loops


def _check_halting(function: str, e: Tensor, weights: Mapping[str, Tensor], halt_threshold: float) -> None:
    check_positive(function, "halt_threshold", halt_threshold, "None or a finite float > 0")
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
            near_miss(unknown[0], shapes, "Remove what the spec does not have."),
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


def _check_loops(function: str, n_loops: int | Tensor, e: Tensor) -> int | Tensor:
    if isinstance(n_loops, Tensor):
        if n_loops.is_meta:
            raise input_error(function, "n_loops", "on meta", "loops whose number is known", "Pass an int.")
        if n_loops.ndim == 0:
            n_loops = n_loops.expand(e.shape[0])
        return own_per_sample(function, "n_loops", n_loops, e, 0, MAX_LOOPS)
    allowed = f"an int from 0 to {MAX_LOOPS}, or an int tensor of shape [] or [batch]"
    return check_int(function, "n_loops", n_loops, 0, MAX_LOOPS, allowed)


def own_per_sample(function: str, name: str, x: Tensor, e: Tensor, low: int, high: int) -> Tensor:
    """A copy of one int per sample, int64 [batch], on the same device: copied once, then checked."""
    batch = e.shape[0]
    if not isinstance(x, Tensor):
        raise type_error(
            function, name, type(x).__name__, f"an int tensor of shape [{batch}]", "Use torch.tensor(...)."
        )
    check_offsets(function, name, x)
    if tuple(x.shape) != (batch,):
        raise input_error(
            function, name, list(x.shape), f"shape [{batch}], one per sample", "One entry a sample."
        )
    if x.device.type != "cpu" and x.device != e.device:
        raise input_error(
            function, name, f"on {x.device}", f"the CPU or the device of e ({e.device})", "Move it."
        )
    if torch.compiler.is_compiling():
        return torch.ops.shift_kernels.own_copy(x)
    x = x.detach().to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    if x.device.type == "cpu" and not has_no_values(x):
        smallest, largest = map(int, x.aminmax())
        if smallest < low or largest > high:
            bad = smallest if smallest < low else largest
            raise input_error(
                function, name, bad, f"values from {low} to {high}", "Check how it was computed."
            )
    return x


def check_offsets(function: str, name: str, x: Tensor) -> None:
    """Refuse a tensor that does not hold plain int32 or int64 numbers."""
    if x.dtype not in (torch.int32, torch.int64):
        raise type_error(function, name, x.dtype, "int32 or int64", f"Cast it: {name}.long().")
    if x.is_nested or x.layout != torch.strided:
        given = "a nested tensor" if x.is_nested else x.layout
        raise type_error(function, name, given, "a dense tensor", "Use torch.tensor(...).")


def _refuse(name: str, value: object, allowed: str, remedy: str) -> NoReturn:
    raise input_error("BlockSpec", name, value, allowed, remedy)


def check_int(
    function: str, name: str, value: Any, low: int, high: int | None, allowed: str | None = None
) -> int:
    """The value as an int, if it is one (numpy's too) and within the bounds."""
    allowed = allowed or (f"an int >= {low}" if high is None else f"an int from {low} to {high}")
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)
        except (TypeError, ValueError, RuntimeError):
            raise type_error(function, name, value, allowed, "Pass an int.") from None
    elif isinstance(value, bool):
        raise type_error(function, name, value, allowed, "Pass an int.")
    if value < low or (high is not None and value > high):
        raise input_error(
            function, name, value, allowed, f"Choose a {'larger' if value < low else 'smaller'} one."
        )
    return value


def check_bool(function: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise type_error(function, name, value, "True or False", "Pass a bool.")


def check_choice(function: str, name: str, value: object, choices: Sequence[str]) -> None:
    allowed = "one of " + ", ".join(map(repr, choices))
    if not isinstance(value, str):
        raise type_error(function, name, value, allowed, "Pass a string.")
    if value not in choices:
        raise input_error(function, name, value, allowed, near_miss(value, choices, "Check the spelling."))


def check_positive(function: str, name: str, value: Any, allowed: str) -> float:
    """The value as a float, if it is a number (numpy's too), finite and above 0."""
    if not isinstance(value, numbers.Real) or isinstance(value, (bool, np.bool_)):
        raise type_error(function, name, value, allowed, "Pass a float.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise input_error(function, name, value, allowed, "Choose a positive number that a float holds.")
    return number


def check_device(function: str, name: str, value: Any) -> torch.device:
    """The device of this name, which need not exist on this machine."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise input_error(
            function, name, value, "a device's name, such as 'cpu' or 'cuda:0'", "Change it."
        ) from error


def check_usable_device(function: str, name: str, value: Any) -> None:
    """Refuse a device that is not one, or not on this machine."""
    device = check_device(function, name, value)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        allowed = "a device that torch can use here"
        raise input_error(function, name, str(device), allowed, "See torch.cuda.is_available().") from error


def check_dtype(function: str, name: str, value: Any) -> None:
    if not isinstance(value, torch.dtype) or value not in DTYPES:
        allowed = "one of " + ", ".join(map(str, DTYPES))
        raise type_error(function, name, value, allowed, "Pass one of these.")
