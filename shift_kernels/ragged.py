"""Right-padded samples of different lengths."""

from __future__ import annotations

import torch
from torch import Tensor


def without_pads(x: Tensor, seq_lens: Tensor | None) -> Tensor:
    """x [batch, seq_len, d_model] with zeros at pads, where it may hold anything."""
    if seq_lens is None:
        return x
    pad = torch.arange(x.shape[1], device=x.device) >= seq_lens.to(x.device)[:, None]
    return x.masked_fill(pad[..., None], 0)
