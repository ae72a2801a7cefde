"""What a call of a looped block asks of a backend, beside e, the weights and the spec."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Asked:
    """The keywords of :func:`shift_kernels.reference.looped_block`, which says what they mean."""

    n_loops: int | Tensor
    compute_dtype: torch.dtype
    seq_lens: Tensor | None = None
    return_all_loops: bool = False
    n_grad_loops: int | None = None
    halt_threshold: float | None = None

    def own_loops(self, device: torch.device) -> Tensor | None:
        """Each sample's T, int64 [batch], or None where all have the same."""
        if isinstance(self.n_loops, Tensor):
            return self.n_loops.to(device, torch.int64).clamp(min=0).contiguous()
        return None

    def most_loops(self) -> int:
        """The largest T; the host waits for it where samples' own are on a device."""
        return max(int(self.n_loops.max()), 0) if isinstance(self.n_loops, Tensor) else self.n_loops
