"""How a batch's tokens lie in memory: packed and left-padded batches become right-padded ones, and back.

Backends know right-padded batches alone: there a sample's first token has position 0, and is the first row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shift_kernels.checks import check_floating, check_offsets
from shift_kernels.errors import input_error, type_error


class Packed(NamedTuple):
    """Sequences one behind the other, without pads."""

    lengths: Tensor
    """int64 [batch], on the tokens' device."""
    longest: int
    row: tuple[Tensor, Tensor]
    """Every token's sample and position."""

    @classmethod
    def of(cls, function: str, e: Tensor, cu_seqlens: Tensor) -> Packed:
        """The layout of e [total, d_model] by its offsets, for which the host waits."""
        check_floating(function, "e", e)
        if e.ndim != 2:
            raise input_error(
                function,
                "e",
                list(e.shape),
                "[total, d_model] together with cu_seqlens",
                "Drop cu_seqlens for a padded e.",
            )
        if not isinstance(cu_seqlens, Tensor):
            given = type(cu_seqlens).__name__
            raise type_error(
                function, "cu_seqlens", given, "an int32 or int64 tensor", "Use torch.tensor(...)."
            )
        check_offsets(function, "cu_seqlens", cu_seqlens)
        remedy = "Use torch.nn.functional.pad(lengths.cumsum(0), (1, 0))."
        if cu_seqlens.is_meta:
            raise input_error(function, "cu_seqlens", "on meta", "offsets whose values are known", remedy)
        total = e.shape[0]
        offsets = cu_seqlens.detach().to("cpu", torch.int64, copy=True)  # once: it is the caller's memory
        if (
            offsets.ndim != 1
            or len(offsets) < 2
            or offsets[0] != 0
            or offsets[-1] != total
            or (lens := offsets.diff()).min() < 0
        ):
            allowed = f"offsets rising from 0 to {total}, the rows of e"
            raise input_error(function, "cu_seqlens", offsets.tolist(), allowed, remedy)
        sample = torch.arange(len(lens)).repeat_interleave(lens, output_size=total)
        position = torch.arange(total) - offsets[sample]
        row = sample.to(e.device), position.to(e.device)
        return cls(lens.to(e.device), max(int(lens.max()), 1), row)

    def padded(self, x: Tensor) -> Tensor:
        """x [total, d_model] as [batch, longest, d_model]."""
        return x.new_zeros(len(self.lengths), self.longest, x.shape[1]).index_put(self.row, x)

    def packed(self, x: Tensor) -> Tensor:
        """x [..., batch, longest, d_model] as [..., total, d_model]."""
        sample, position = self.row
        return x[..., sample, position, :]


def rolled(x: Tensor, shift: Tensor) -> Tensor:
    """x [..., batch, seq_len, d_model], each sample's tokens moved left by its shift; the first come last."""
    batch, seq_len = x.shape[-3:-1]
    token = (torch.arange(seq_len, device=x.device) + shift.to(x.device)[:, None]) % seq_len
    row = token + seq_len * torch.arange(batch, device=x.device)[:, None]
    return x.flatten(-3, -2).index_select(-2, row.flatten()).unflatten(-2, (batch, seq_len))
