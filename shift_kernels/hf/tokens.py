"""Which tokens of a batch are real, read from the mask that a decoder layer gets; any other mask is refused.

A looped block knows causal sequences with pads. A mask of another kind (packed sequences, a prefix that sees
itself, a bias) would be lost in it, so the mask that these tokens should have is compared with the one given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shift_kernels.hf.families import refuse

REMEDY = (
    "Give attention_mask as 0 and 1 [batch, seq_len], and position_ids that count the tokens, or neither."
)
UNKNOWN = -(2**62)


class Seen(NamedTuple):
    """The tokens of the calls before, in a cache."""

    n: int = 0
    """Pads counted."""
    hidden: int = 0
    """How many of them a mask leaves out at the front: those that no window reaches."""
    real: Tensor | None = None
    """bool [batch, n], False at pads; None: there are none."""
    start: Tensor | None = None
    """Position of each sample's first real token, int64 [batch], or UNKNOWN; None: not asked."""

    def counts(self, batch: int, device: torch.device) -> Tensor:
        """Real tokens of each sample, int64 [batch]."""
        if self.real is None:
            return torch.full((batch,), self.n, device=device)
        return self.real.sum(1)


class Tokens(NamedTuple):
    """The tokens of one call."""

    real: Tensor | None
    """bool [batch, seq_len], False at pads; None: there are none."""
    start: Tensor | None
    """As in :class:`Seen`, these tokens included."""

    def pack(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [batch, seq_len, d_model] with each sample's tokens first, and their numbers [batch]."""
        if self.real is None:
            return x, None
        return x.gather(1, self._order(x)), self.real.sum(1)

    def unpack(self, x: Tensor) -> Tensor:
        """Undo :meth:`pack`."""
        return x if self.real is None else torch.zeros_like(x).scatter(1, self._order(x), x)

    def _order(self, x: Tensor) -> Tensor:
        assert self.real is not None
        return (~self.real).to(torch.int8).argsort(dim=1, stable=True)[..., None].expand_as(x)


def read(
    mask: Any, positions: Tensor | None, x: Tensor, seen: Seen, windows: Sequence[int | None] = (None,)
) -> Tokens:
    """The tokens of a call.

    Args:
        mask: None; [batch, keys], True or 1 at tokens; or [batch or 1, 1, seq_len, keys], True or 0. where a
            query sees a key.
        positions: int [batch or 1, seq_len]; None where there are no rotary angles.
        x: [batch, seq_len, ..].
        seen: the tokens before.
        windows: of the layer that this mask is for, then those of the layers that go by the same tokens.

    Raises:
        ShiftInputError: padded causal sequences have no such mask, or no such positions.
    """
    batch, n_new = x.shape[:2]
    real = None
    if mask is None:
        if seen.real is not None:
            refuse("attention_mask", None, "a mask, as the cached tokens had one", REMEDY)
    elif not isinstance(mask, Tensor):
        refuse("attention_mask", type(mask).__name__, "a tensor", "Use attn_implementation='sdpa'.")
    elif mask.ndim == 2:
        real = _of_keys(mask.bool(), batch, n_new, seen)
    else:
        real = _of_pairs(_allowed(mask, n_new), seen, batch, windows[0])
        if any(windows[1:]):
            _refuse_holes(real, seen)
    if real is not None and bool(real.all()):
        real = None
    start = None if positions is None else _start(positions, real, seen, batch)
    return Tokens(real, start)


def _refuse_holes(real: Tensor, seen: Seen) -> None:
    """Where another layer's window counts tokens, pads between them would count in its own mask."""
    cached = seen.real if seen.real is not None else real.new_ones(len(real), seen.n)
    keys = torch.cat([cached.new_zeros(len(real), 1), cached, real], 1).int()
    if bool(((keys.diff(dim=1) == 1).sum(1) > 1).any()):
        refuse("attention_mask", "pads between tokens", "none where some layers have a window", REMEDY)


def _of_keys(mask: Tensor, batch: int, n_new: int, seen: Seen) -> Tensor:
    if mask.shape != (batch, seen.n + n_new):
        refuse("attention_mask", list(mask.shape), f"[{batch}, {seen.n + n_new}]", REMEDY)
    before, real = mask.split([mask.shape[1] - n_new, n_new], dim=1)
    cached = seen.real if seen.real is not None else mask.new_ones(len(mask), seen.n)
    if not torch.equal(before, cached):
        refuse("attention_mask", list(mask.shape), "the same pads among cached tokens as before", REMEDY)
    return real


def _allowed(mask: Tensor, n_new: int) -> Tensor:
    """[batch or 1, seq_len, keys], True where a query sees a key."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != n_new:
        refuse("attention_mask", list(mask.shape), f"[batch, 1, {n_new}, keys]", REMEDY)
    if mask.dtype == torch.bool:
        return mask[:, 0]
    blocked = mask <= torch.finfo(mask.dtype).min / 2
    if not bool((blocked | (mask == 0)).all()):
        refuse("attention_mask", "a bias", "0 where a query sees a key, else the least float", REMEDY)
    return ~blocked[:, 0]


def _of_pairs(allowed: Tensor, seen: Seen, batch: int, window: int | None) -> Tensor:
    n_new, n_keys = allowed.shape[1:]
    first = seen.n - seen.hidden
    if n_keys < first + n_new:
        refuse("attention_mask", [n_new, n_keys], f"{first + n_new} keys", REMEDY)
    # A token sees itself, a pad does not.
    real = allowed.diagonal(first, 1, 2)[:, :n_new].expand(batch, n_new)
    cached = seen.real if seen.real is not None else real.new_ones(batch, seen.n)
    keys = torch.cat([cached, real], 1)
    rank = keys.cumsum(1)
    distance = rank[:, seen.n :, None] - rank[:, None, seen.hidden :]
    index = torch.arange(seen.n + n_new, device=real.device)
    expected = keys[:, None, seen.hidden :] & (index[seen.n :, None] >= index[seen.hidden :])
    if window is not None:
        expected = expected & (distance < window)
    unlike = allowed.expand(batch, n_new, n_keys).clone()
    unlike[..., : expected.shape[2]] ^= expected
    if bool((unlike & real[..., None]).any()):
        refuse(
            "attention_mask",
            f"another pattern, [{batch}, {n_new}, {n_keys}]",
            "that of padded causal sequences" + (f" with a window of {window}" if window else ""),
            REMEDY,
        )
    return real


def _start(positions: Tensor, real: Tensor | None, seen: Seen, batch: int) -> Tensor:
    """Position of each sample's first token, if from there on they count one by one."""
    if positions.ndim != 2:
        refuse("position_ids", list(positions.shape), "[batch, seq_len]", REMEDY)
    positions = positions.expand(batch, -1)
    if real is None:
        real = torch.ones_like(positions, dtype=torch.bool)
    counts = seen.counts(batch, positions.device)
    starts = positions - (counts[:, None] + real.cumsum(1) - 1)
    first = starts.gather(1, real.int().argmax(1, keepdim=True))[:, 0]
    start = torch.where(real.any(1), first, UNKNOWN)
    if seen.start is not None:
        start = torch.where(seen.start == UNKNOWN, start, seen.start)
    if bool(((starts != start[:, None]) & real).any()):
        refuse("position_ids", positions.tolist(), "positions that count each sample's tokens", REMEDY)
    return start
