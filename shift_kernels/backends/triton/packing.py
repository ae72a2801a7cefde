"""Weights as the resident kernels read them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shift_kernels.backends.triton.resident_plan import Tile
from shift_kernels.backends.weight_gradients import NORM_VECTORS, norm_gradients
from shift_kernels.rotary import rotary_table
from shift_kernels.spec import BlockSpec

# Slots of the vectors along d_model, as resident_forward.py numbers them.
SLOTS = ("self_attn.out_proj.bias", "linear2.bias", *NORM_VECTORS)


class Packed(NamedTuple):
    """W [n_layers, weight_rows, d_pad] operands; B [n_layers, weight_rows] and V [n_layers + 1, 10, d_pad]
    f32; rotary [2, seq_len, head_pad] f32 (empty without rope)."""

    weights: Tensor
    biases: Tensor
    vectors: Tensor
    rotary: Tensor


def pack(
    weights: dict[str, Tensor], spec: BlockSpec, tile: Tile, seq_len: int, compute_dtype: torch.dtype
) -> Packed:
    """Lay all weights of a block out for the kernels, zero-padded. A few copies a call, not a loop."""
    device = next(iter(weights.values())).device
    rows = [_layer_rows(weights, spec, tile, f"layers.{i}.") for i in range(spec.n_layers)]
    vectors = torch.zeros(spec.n_layers + 1, len(SLOTS), tile.d_pad, device=device)
    for where, name in _vector_names(spec):
        if name in weights:
            vectors[where][: spec.d_model] = weights[name]
    rotary = torch.empty(0, device=device)
    if tile.rope:
        table = rotary_table(seq_len, spec, device).float()
        rotary = F.pad(table.repeat(1, 1, 2), (0, tile.head_pad - tile.head_dim)).contiguous()
    return Packed(
        torch.stack([r[..., :-1] for r in rows]).to(compute_dtype).contiguous(),
        torch.stack([r[..., -1] for r in rows]).float().contiguous(),
        vectors,
        rotary,
    )


def _layer_rows(w: dict[str, Tensor], spec: BlockSpec, tile: Tile, prefix: str) -> Tensor:
    """One layer's weight rows [weight_rows, d_pad + 1], the bias of a row in the last column."""
    ff_pad, head_pad = (0, tile.ff_pad - tile.d_ff), (0, tile.head_pad - tile.head_dim)

    def rows(matrix: Tensor, bias: Tensor | None, heads: int, pad: tuple[int, int]) -> Tensor:
        bias = matrix.new_zeros(len(matrix)) if bias is None else bias
        x = torch.cat([F.pad(matrix.float(), (0, tile.d_pad - tile.d_model)), bias.float()[:, None]], 1)
        return F.pad(x.unflatten(0, (heads, -1)), (0, 0, *pad)).flatten(0, 1)

    attn = prefix + "self_attn."
    parts = [
        rows(
            w[attn + "in_proj_weight"],
            w.get(attn + "in_proj_bias"),
            spec.n_heads + 2 * spec.n_kv_heads,
            head_pad,
        ),
        rows(w[attn + "out_proj.weight"].T, None, spec.n_heads, head_pad),
    ]
    if spec.d_ff:
        hidden = 2 if spec.activation == "swiglu" else 1
        parts += [
            rows(w[prefix + "linear1.weight"], w.get(prefix + "linear1.bias"), hidden, ff_pad),
            rows(w[prefix + "linear2.weight"].T, None, 1, ff_pad),
        ]
    return torch.cat(parts)


def _vector_names(spec: BlockSpec) -> list[tuple[tuple[int, int], str]]:
    """Where in V each vector weight stands: ((layer, slot), name)."""
    names = [((i, s), f"layers.{i}.{slot}") for i in range(spec.n_layers) for s, slot in enumerate(SLOTS)]
    return names + [
        ((spec.n_layers, SLOTS.index(f"norm1.{k}")), f"loop_norm.{k}") for k in ("weight", "bias")
    ]


def vector_gradients(vectors: Tensor, spec: BlockSpec) -> dict[str, Tensor]:
    """Gradients of the norms by name, from those of V, where the places of other biases stay 0."""
    return norm_gradients(vectors[:, SLOTS.index(NORM_VECTORS[0]) :], spec)
