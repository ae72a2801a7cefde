"""When a sample stops early: for the reference and those kernels that leave it to PyTorch."""

from __future__ import annotations

from torch import Tensor


def has_settled(after: Tensor, before: Tensor, threshold: float, valid: Tensor | None) -> Tensor:
    """Whether a loop changed a sample's state by less than ``threshold`` of itself, bool [batch].

    A state that is not a number never settles.

    Args:
        after, before: the state behind and in front of the loop, [batch, seq_len, d_model].
        threshold: of rms(after - before) / rms(before).
        valid: which positions are no pads, bool [batch, seq_len]; None: all.
    """
    return _rms(after - before, valid) < threshold * _rms(before, valid)


def _rms(x: Tensor, valid: Tensor | None) -> Tensor:
    """Root mean square per sample over its valid positions: [batch]."""
    square = x.double().square().mean(-1)
    if valid is None:
        return square.mean(-1).sqrt()
    return ((square * valid).sum(-1) / valid.sum(-1).clamp(min=1)).sqrt()
