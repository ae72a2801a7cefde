"""What the calls into both libraries have in common: a block's options, and where its weights are."""

from __future__ import annotations

import ctypes

from torch import Tensor

from shift_kernels.spec import ACTIVATIONS, NORMS, PLACEMENTS, BlockSpec

# The order of `enum Weight` in csrc/*/call.h.
NORM_WEIGHTS = (
    *("norm1.weight", "norm1.bias", "norm1_post.weight", "norm1_post.bias"),
    *("norm2.weight", "norm2.bias", "norm2_post.weight", "norm2_post.bias"),
)
LAYER_WEIGHTS = (
    *("self_attn.in_proj_weight", "self_attn.in_proj_bias"),
    *("self_attn.out_proj.weight", "self_attn.out_proj.bias"),
    *NORM_WEIGHTS[:4],
    *("linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"),
    *NORM_WEIGHTS[4:],
)
_AS_NAMED = (
    *("d_model", "n_heads", "n_kv_heads", "head_dim", "n_layers", "d_ff", "causal", "loop_norm"),
    "residual_scale",
)


def options(spec: BlockSpec) -> dict[str, int | float]:
    """The fields of a ``Call`` that say what the block is."""
    return {
        "activation": ACTIVATIONS.index(spec.activation),
        "norm": NORMS.index(spec.norm),
        "placement": PLACEMENTS.index(spec.norm_placement),
        "rope": spec.position == "rope",
        "injection": spec.injection == "add",
        "eps": spec.norm_eps,
    } | {name: getattr(spec, name) for name in _AS_NAMED}


def addresses(tensors: dict[str, Tensor], spec: BlockSpec) -> ctypes.Array[ctypes.c_void_p]:
    """Addresses in the order of ``Call::weights``, null where the block has no such weight."""
    names = [f"layers.{i}.{name}" for i in range(spec.n_layers) for name in LAYER_WEIGHTS]
    names += ["loop_norm.weight", "loop_norm.bias"]
    found = [tensors[name].data_ptr() if name in tensors else None for name in names]
    return (ctypes.c_void_p * len(found))(*found)
