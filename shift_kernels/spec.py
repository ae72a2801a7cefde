"""What a loop body is, and which weights it has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NoReturn

from shift_kernels.checks import check_bool, check_choice, check_int, check_positive
from shift_kernels.errors import input_error, refuses_unknown_keywords

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


def _refuse(name: str, value: object, allowed: str, remedy: str) -> NoReturn:
    raise input_error("BlockSpec", name, value, allowed, remedy)
