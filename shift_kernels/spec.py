"""What a loop body is, and which weights it has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Set
from functools import lru_cache
from typing import Any, NoReturn

from shift_kernels.checks import check_bool, check_choice, check_int, check_positive, check_reals
from shift_kernels.errors import input_error, refuses_unknown_keywords, type_error

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "swiglu", "relu2", "geglu_tanh")
GATED = ("swiglu", "geglu_tanh")
"""Activations whose first linear map gives a gate and values, of ``d_ff`` each."""
NORMS = ("layernorm", "rmsnorm", "none")
PLACEMENTS = ("pre", "post", "sandwich", "sandwich_post")
NORM_WEIGHTS = ("scale", "one_plus", "none")
POSITIONS = ("none", "rope")
INJECTIONS = ("none", "add", "concat", "diagonal", "norm_add")
CHOICES = {
    "activation": ACTIVATIONS,
    "norm": NORMS,
    "norm_placement": PLACEMENTS,
    "norm_weight": NORM_WEIGHTS,
    "position": POSITIONS,
    "injection": INJECTIONS,
}
"""Fields of :class:`BlockSpec` that are words, and the words."""
ONE_OVER_T = "1/T"
"""The ``residual_scale`` that is one over each sample's number of loops."""
BOOLS = ("bias", "causal", "loop_norm", "qk_norm")
POSITIVES = {"norm_eps": "", "rope_theta": "", "residual_scale": ONE_OVER_T, "softcap": "", "attn_scale": ""}
"""Fields that are positive numbers, and the word that each may be instead."""
NEEDS_NORM = {"norm_placement": "pre", "norm_weight": "scale", "loop_norm": False, "qk_norm": False}
"""Fields that speak of a norm, and what they are without one."""
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
            ``gelu_tanh``, ``swiglu`` (``silu(gate) * up``) or ``geglu_tanh`` (Gemma's
            ``gelu_tanh(gate) * up``).
        norm: ``layernorm``, ``rmsnorm`` or ``none``.
        norm_placement: where a branch f and the residual stream x meet the norms. ``pre``:
            ``x + f(norm(x))``. ``post``: ``norm(x + f(x))``. ``sandwich``: ``x + norm_post(f(norm(x)))``, the
            second norm is on the branch alone and x stays as it was (Gemma 2, Ouro). ``sandwich_post``:
            ``norm_post(x + f(norm(x)))``, the second norm is on the sum, and so on x as well (Huginn,
            arXiv 2502.05171). The last two have weights of the same names, and do not mean the same.
        norm_eps: added to the variance (mean square) under the root.
        bias: biases in all linear maps and in layernorm.
        causal: position i attends to positions <= i.
        position: ``none`` or ``rope`` (rotary, halves rotated, applied to queries and keys).
        rope_theta: base of the rotary frequencies.
        injection: what a loop's layers read, of the state h and the input e. ``none``: ``h``, and h_0 = e.
            With all others h_0 = 0. ``add``: ``h + e``. ``concat``: ``W [h, e]``, one linear map of both
            (Huginn). ``diagonal``: ``a h + b e`` with a and b for each channel, a = sigmoid(-decay) in (0, 1)
            (Parcae). ``norm_add``: ``norm(h) + alpha e`` with alpha for each channel (Chen et al.,
            arXiv 2609.19107).
        loop_norm: a final norm inside every loop (Fan et al., arXiv 2409.15647).
        residual_scale: factor on every branch before it is added to the residual stream. ``"1/T"``: one over
            the loops of the call, where samples have their own over each sample's. A call may give another.
        norm_weight: what a norm multiplies by. ``scale``: its weight w. ``one_plus``: 1 + w (Gemma).
            ``none``: nothing, and it has no bias either.
        qk_norm: every query and key head is normed, before it is rotated (Qwen 3, Gemma 3).
        window: position i attends to positions j with ``i - j < window`` (not causal: ``|i - j| < window``).
        softcap: scores s become ``softcap * tanh(s / softcap)`` (Gemma 2).
        attn_scale: factor of queries times keys; default ``head_dim ** -0.5``.
        rope_freqs: the rotary angles of position 1, one for each rotated pair of channels, instead of those
            of ``rope_theta``. n of them rotate a head's first 2 n channels, channel i with channel i + n. So
            linear, llama3 and yarn scaling, and partial rotary, are numbers that the caller computes.
        qkv_bias: biases of the maps to queries, keys and values; default ``bias``. (Qwen 2: these alone.)

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
    residual_scale: float | str = 1.0
    key: str = dataclasses.field(init=False, repr=False, compare=False, default="")
    """This specification as JSON: how it travels through operator schemas and is found in measured tables.
    Fields below this one are in it only where they are not at their defaults: keys made before them hold."""
    norm_weight: str = "scale"
    qk_norm: bool = False
    window: int | None = None
    softcap: float | None = None
    attn_scale: float | None = None
    rope_freqs: tuple[float, ...] | None = None
    qkv_bias: bool | None = None

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
        for name in BOOLS:
            check_bool("BlockSpec", name, getattr(self, name))
        if self.qkv_bias is not None:
            check_bool("BlockSpec", "qkv_bias", self.qkv_bias)
        if self.window is not None:
            self._check_int("window", high=MAX_TOKENS)
        for name, word in POSITIVES.items():
            value = getattr(self, name)
            if value is None and name in ("softcap", "attn_scale"):
                continue
            if isinstance(value, str) and value == word:
                continue
            allowed = "a finite float > 0" + (f" or {word!r}" if word else "")
            object.__setattr__(self, name, check_positive("BlockSpec", name, value, allowed))
        self._check_rotary()
        for name, without in NEEDS_NORM.items():
            if self.norm == "none" and getattr(self, name) != without:
                _refuse(
                    name,
                    getattr(self, name),
                    f"{without!r} with norm='none'",
                    "Choose a norm, or leave it out.",
                )
        object.__setattr__(self, "key", json.dumps(self._told(), sort_keys=True))
        self._list_weights()

    def __hash__(self) -> int:
        return hash(self.key)  # a string keeps its hash: plans are looked up by it in every call

    def _resolve(self, name: str, default: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, default)

    def _check_int(self, name: str, low: int = 1, high: int = MAX_WIDTH) -> None:
        object.__setattr__(self, name, check_int("BlockSpec", name, getattr(self, name), low, high))

    def _check_rotary(self) -> None:
        if self.rope_freqs is None:
            if self.position == "rope" and self.head_dim % 2:
                _refuse(
                    "head_dim",
                    self.head_dim,
                    "an even number with position='rope'",
                    "Rotary halves need pairs; or give rope_freqs for some of the channels.",
                )
            return
        if self.position != "rope":
            _refuse(
                "rope_freqs", self.rope_freqs, "None without position='rope'", "Ask for rotary positions."
            )
        pairs = self.head_dim // 2
        allowed = f"1 to {pairs} finite floats >= 0: one for each rotated pair of head_dim = {self.head_dim}"
        freqs = check_reals("BlockSpec", "rope_freqs", self.rope_freqs, allowed)
        if not 1 <= len(freqs) <= pairs or min(freqs) < 0:
            _refuse("rope_freqs", self.rope_freqs, allowed, "Give those of the leading channels alone.")
        object.__setattr__(self, "rope_freqs", freqs)

    def to_dict(self) -> dict[str, Any]:
        """All constructor arguments, resolved, as plain values; :meth:`from_dict` takes them back."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BlockSpec:
        """The specification of which :meth:`to_dict` gave these fields; those left out have their defaults.

        Raises:
            ShiftInputError: a field that there is not, with the nearest one, one that is missing, or a value
                that is not allowed.
        """
        if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
            raise type_error(
                "BlockSpec.from_dict",
                "fields",
                fields,
                "a dict of fields by name",
                "Pass what to_dict() returned.",
            )
        defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.init}
        needed = [name for name, default in defaults.items() if default is dataclasses.MISSING]
        missing = [name for name in needed if name not in fields]
        if missing and fields.keys() <= defaults.keys():  # a misspelt one is told of as such
            raise input_error(
                "BlockSpec.from_dict",
                "fields",
                dict(fields),
                f"fields with {' and '.join(needed)}",
                f"Add {' and '.join(missing)}.",
            )
        return cls(**fields)

    def _told(self) -> dict[str, Any]:
        """Of :meth:`to_dict`, what the key holds."""
        known = [f.name for f in dataclasses.fields(self)]
        later = {f.name: f.default for f in dataclasses.fields(self)[known.index("key") :]}
        return {k: v for k, v in self.to_dict().items() if k not in later or v != later[k]}

    @property
    def rotary_pairs(self) -> int:
        """Pairs of a head's channels that are rotated."""
        if self.position != "rope":
            return 0
        return self.head_dim // 2 if self.rope_freqs is None else len(self.rope_freqs)

    @property
    def score_scale(self) -> float:
        """``attn_scale``, or its default."""
        return self.head_dim**-0.5 if self.attn_scale is None else self.attn_scale

    @property
    def has_qkv_bias(self) -> bool:
        """``qkv_bias``, or its default."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_post_norms(self) -> bool:
        """Whether a branch has a second norm."""
        return self.norm_placement in ("sandwich", "sandwich_post")

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

    def linear_weights(self) -> Set[str]:
        """Names of the weights and biases of linear maps, which are cast to the dtype of matrix products."""
        return self._linear  # type: ignore[attr-defined]

    def _list_weights(self) -> None:
        d, attn_dim = self.d_model, self.n_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {}
        linear_names: set[str] = set()

        def norm(name: str, width: int = d) -> None:
            if self.norm != "none" and self.norm_weight != "none":
                shapes[f"{name}.weight"] = (width,)
                if self.norm == "layernorm" and self.bias:
                    shapes[f"{name}.bias"] = (width,)

        def linear(prefix: str, out_features: int, in_features: int, bias: bool = self.bias) -> None:
            shapes[prefix + "weight"] = (out_features, in_features)
            if bias:
                shapes[prefix + "bias"] = (out_features,)
            linear_names.update((prefix + "weight", prefix + "bias"))

        if self.injection == "concat":
            linear("injection.", d, 2 * d)
        elif self.injection == "diagonal":
            shapes["injection.decay"] = shapes["injection.gain"] = (d,)
        elif self.injection == "norm_add":
            norm("injection.norm")
            shapes["injection.alpha"] = (d,)
        for i in range(self.n_layers):
            p = f"layers.{i}."
            linear(p + "self_attn.in_proj_", self.qkv_dim, d, self.has_qkv_bias)
            if self.qk_norm:
                norm(p + "self_attn.q_norm", self.head_dim)
                norm(p + "self_attn.k_norm", self.head_dim)
            linear(p + "self_attn.out_proj.", d, attn_dim)
            norm(p + "norm1")
            if self.has_post_norms:
                norm(p + "norm1_post")
            if self.d_ff:
                hidden = 2 * self.d_ff if self.activation in GATED else self.d_ff
                linear(p + "linear1.", hidden, d)
                linear(p + "linear2.", d, self.d_ff)
                norm(p + "norm2")
                if self.has_post_norms:
                    norm(p + "norm2_post")
        if self.loop_norm:
            norm("loop_norm")
        object.__setattr__(self, "_shapes", shapes)
        object.__setattr__(self, "_linear", frozenset(linear_names))


BlockSpec.__init__ = refuses_unknown_keywords("BlockSpec")(BlockSpec.__init__)  # type: ignore[method-assign]


@lru_cache(maxsize=256)
def spec_from_key(key: str) -> BlockSpec:
    """The :class:`BlockSpec` whose ``key`` this is."""
    return BlockSpec.from_dict(json.loads(key))


def _refuse(name: str, value: object, allowed: str, remedy: str) -> NoReturn:
    raise input_error("BlockSpec", name, value, allowed, remedy)
