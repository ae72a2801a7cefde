"""Gradients of weights as matmuls over the rows of many loops, for backends whose kernels write the operands.

For a linear map y = x W^T + b over all rows (loops x tokens) at once:

    dW = dy^T x,    db = sum of dy's rows

One library matmul a weight and launch, summed over launches in fp32: no atomics, so the same bits every time.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from shift_kernels.spec import GATED, BlockSpec

OPERAND_BYTES = 512 * 2**20
"""Of operands alive at once: bounds the loops in a launch, and the rows in a matmul."""


class WeightGradients:
    """Sums of dW and db in fp32, by a name that the caller chooses.

    Args:
        bias: whether there are any b.
    """

    def __init__(self, *, bias: bool) -> None:
        self.bias = bias
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}

    def add(self, name: str, dy: Tensor, x: Tensor) -> None:
        """Add the share of some rows: dy [..., rows, outputs], x [..., rows, inputs]."""
        self._add(self.weights, name, dy.transpose(-1, -2) @ x)
        if self.bias:
            self._add(self.biases, name, dy.sum(-2, dtype=torch.float32))

    def _add(self, sums: dict[str, Tensor], name: str, share: Tensor) -> None:
        if name in sums:
            sums[name] += share
        else:
            sums[name] = share.float()


@dataclasses.dataclass(frozen=True)
class Widths:
    """Sizes as a kernel pads them: of the model, of a head, of the hidden columns (0 without an MLP)."""

    d_model: int
    head_dim: int
    d_ff: int


# A layer's linear maps by name: their operands dy and x.
_ATTENTION = {"self_attn.in_proj_": ("dqkv", "xn"), "self_attn.out_proj.": ("dy", "o")}
_MLP = {"linear1.": ("dpre", "xn2"), "linear2.": ("dy2", "act")}
# In the order in which kernels take them.
OPERANDS = ("xn", "dqkv", "o", "dy", "xn2", "dpre", "act", "dy2")


class ResidentGradients:
    """The weight gradients of a block whose resident kernel writes each layer's operands.

    Args:
        spec: the block.
        widths: its sizes as the kernel pads them.
        like: a tensor of the operands' device and dtype.
    """

    def __init__(self, spec: BlockSpec, widths: Widths, like: Tensor) -> None:
        self.spec, self.widths, self.like = spec, widths, like
        self.maps = _ATTENTION | (_MLP if spec.d_ff else {})
        hidden = 2 if spec.activation in GATED else 1
        d, heads = widths.d_model, widths.head_dim * spec.n_heads
        self.columns = {"xn": d, "o": heads, "dy": d}
        self.columns["dqkv"] = heads + 2 * spec.n_kv_heads * widths.head_dim
        if spec.d_ff:
            self.columns |= {"xn2": d, "dpre": hidden * widths.d_ff, "act": widths.d_ff, "dy2": d}
        self.sums = WeightGradients(bias=spec.bias)

    def loops_per_launch(self, tokens: int) -> int:
        """How many loops' operands fit OPERAND_BYTES; at least one."""
        per_loop = self.spec.n_layers * tokens * sum(self.columns.values()) * self.like.itemsize
        return max(1, OPERAND_BYTES // per_loop)

    def operands(self, rows: int, *, untouched: bool) -> dict[str, Tensor]:
        """Room for the kernel to write to, each [n_layers, rows, columns], in the order of ``OPERANDS``.

        Zeros where the kernel may leave a sample's loops ``untouched``.
        """
        make = self.like.new_zeros if untouched else self.like.new_empty
        return {n: make(self.spec.n_layers, rows, self.columns[n]) for n in OPERANDS if n in self.columns}

    def add(self, operands: dict[str, Tensor]) -> None:
        """Add what a launch wrote."""
        for name, (dy, x) in self.maps.items():
            self.sums.add(name, operands[dy], operands[x])

    def by_name(self) -> dict[str, Tensor]:
        """Every weight's and bias's gradient without the padding, fp32; empty if no launch was made."""
        s, pad = self.spec, self.widths
        found: dict[str, Tensor] = {}
        for name in self.maps if self.sums.weights else ():
            w = self.sums.weights[name]  # [n_layers, outputs, inputs]
            b = self.sums.biases.get(name, w[..., 0])  # [n_layers, outputs]; unused without biases
            if name == "self_attn.in_proj_":
                w = w.unflatten(1, (-1, pad.head_dim))[:, :, : s.head_dim, : s.d_model].flatten(1, 2)
                b = b.unflatten(1, (-1, pad.head_dim))[..., : s.head_dim].flatten(1)
            elif name == "self_attn.out_proj.":
                w = w.unflatten(2, (-1, pad.head_dim))[:, : s.d_model, :, : s.head_dim].flatten(2)
                b = b[:, : s.d_model]
            elif name == "linear1.":
                w = w.unflatten(1, (-1, pad.d_ff))[:, :, : s.d_ff, : s.d_model].flatten(1, 2)
                b = b.unflatten(1, (-1, pad.d_ff))[..., : s.d_ff].flatten(1)
            else:
                w, b = w[:, : s.d_model, : s.d_ff], b[:, : s.d_model]
            for i in range(s.n_layers):
                found |= {f"layers.{i}.{name}weight": w[i], f"layers.{i}.{name}bias": b[i]}
        return found


NORM_VECTORS = tuple(
    f"{norm}.{kind}" for norm in ("norm1", "norm1_post", "norm2", "norm2_post") for kind in ("weight", "bias")
)
"""A layer's norm weights and biases as kernels have them; the loop norm is the first of "layer" n_layers."""


def norm_gradients(vectors: Tensor, spec: BlockSpec) -> dict[str, Tensor]:
    """Gradients of the norms by name, from [n_layers + 1, 8, d_model or wider]."""
    vectors = vectors[..., : spec.d_model]
    found = {
        f"layers.{i}.{name}": vectors[i, j]
        for i in range(spec.n_layers)
        for j, name in enumerate(NORM_VECTORS)
    }
    return found | {f"loop_norm.{kind}": vectors[-1, j] for j, kind in enumerate(("weight", "bias"))}


def in_order(found: dict[str, Tensor], weights: dict[str, Tensor]) -> list[Tensor]:
    """Gradients in the weights' order, shapes and dtypes; zeros for what no launch reached."""
    return [
        found[name].to(w.dtype).contiguous() if name in found else torch.zeros_like(w)
        for name, w in weights.items()
    ]
