"""Rotary positions (Su et al., arXiv 2104.09864), halves of a head rotated: for the reference and kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from shift_kernels.spec import BlockSpec


def rotary_table(
    seq_len: int, spec: BlockSpec, device: torch.device, position_offset: Tensor | None = None
) -> Tensor:
    """cos and sin of position * frequency: float64 [2, seq_len, spec.rotary_pairs].

    Args:
        position_offset: int [batch], added to a sample's positions; the table is then [2, batch, 1, ...], a
            sample's for all its heads.
    """
    if spec.rope_freqs is None:
        half = spec.head_dim // 2
        frequency = spec.rope_theta ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    else:
        frequency = torch.tensor(spec.rope_freqs, dtype=torch.float64, device=device)
    position = torch.arange(seq_len, dtype=torch.float64, device=device)
    if position_offset is not None:
        position = position + position_offset.to(device)[:, None, None]
    angle = position[..., None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + n}) of the leading 2 n channels by their n angles.

    Args:
        x: [..., seq_len, head_dim].
        table: [2, ..., seq_len, n].
    """
    cos, sin = table.to(x.dtype)
    n = table.shape[-1]
    a, b, still = x.tensor_split((n, 2 * n), dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, still], dim=-1)
