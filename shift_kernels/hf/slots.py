"""What looped layers have in a Hugging Face cache: a LoopedCache, kept in step with all that happens there.

Transformers' own layer of the cache stays inside as a clock: it is given one channel a token, so it answers
for lengths and masks as everywhere else. Keys and values of the loops are in a shift_kernels.LoopedCache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import cache_utils

from shift_kernels.cache import LoopedCache
from shift_kernels.hf.families import refuse
from shift_kernels.hf.tokens import Seen, Tokens
from shift_kernels.module import LoopedBlock

CLOCKS = (
    cache_utils.DynamicLayer,
    cache_utils.DynamicSlidingWindowLayer,
    cache_utils.StaticLayer,
    cache_utils.StaticSlidingWindowLayer,
)
ROOM = 64
"""Tokens for which there is memory at first; it doubles when more come."""


class LoopedSlot(cache_utils.CacheLayerMixin):
    """The slot of the first looped layer.

    Args:
        clock: Transformers' own layer for this slot.
    """

    is_compileable = False

    def __init__(self, clock: Any) -> None:
        self.clock = clock
        self.is_sliding, self.is_croppable = clock.is_sliding, getattr(clock, "is_croppable", True)
        self._forget()

    def _forget(self) -> None:
        self.caches: list[LoopedCache] = []
        self.real: Tensor | None = None
        self.start: Tensor | None = None
        self.is_recorded = True

    def __getattr__(self, name: str) -> Any:
        """All but this slot's own tensors is for the clock to say."""
        if name == "clock":  # when copied, before it is there
            raise AttributeError(name)
        return getattr(self.clock, name)

    def seen(self, n_new: int) -> Seen:
        """The tokens so far, as a call with ``n_new`` further ones needs to know them."""
        n = int(self.get_seq_length())
        return Seen(n, int(self.get_mask_sizes(n_new)[1]) if n else 0, self.real, self.start)

    def caches_for(self, blocks: Sequence[LoopedBlock], n_loops: int, e: Tensor) -> list[LoopedCache]:
        """One cache of one block; of several one a call, in the order of the calls. With room for e."""
        n = int(self.get_seq_length()) + e.shape[1]
        if not self.caches:
            one = len(blocks) == 1
            self.caches = [
                LoopedCache(
                    block.spec, len(e), max(n, ROOM), n_loops if one else 1, dtype=e.dtype, device=e.device
                )
                for _ in range(1 if one else n_loops)
                for block in blocks
            ]
        for cache in self.caches:
            if cache.max_len < n:
                cache.grow(2 * n)
        return self.caches

    def count(self, tokens: Tokens, seen: Seen, e: Tensor) -> None:
        """The tokens of e were appended to those that had been seen."""
        if tokens.real is not None or self.real is not None:
            old, new = (
                torch.ones(len(e), n, dtype=torch.bool, device=e.device) if real is None else real
                for real, n in ((self.real, seen.n), (tokens.real, e.shape[1]))
            )
            self.real = torch.cat([old, new], 1)
        self.start = tokens.start

    def update(self, *args: Any, **kwargs: Any) -> Any:
        return self.clock.update(*args, **kwargs)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        self.clock.lazy_initialization(*args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.clock.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.clock.get_seq_length()

    def get_max_length(self) -> int:
        return self.clock.get_max_length()

    def reset(self) -> None:
        self.clock.reset()
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        self.clock.crop(tokens_to_remove)
        n = int(self.get_seq_length())
        if self.real is not None:
            self.real = self.real[:, :n]
        for cache in self.caches:
            cache.crop(n if self.real is None else self.real.sum(1))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.clock.reorder_cache(beam_idx)
        self.real, self.start = (
            x if x is None else x[beam_idx.to(x.device)] for x in (self.real, self.start)
        )
        for cache in self.caches:
            cache.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        _refuse_other_batch()

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        _refuse_other_batch()


def _refuse_other_batch() -> NoReturn:
    refuse(
        "cache", "another batch", "the batch that it was filled with", "Call the model with use_cache=False."
    )


def slot(cache: Any, first: int) -> LoopedSlot:
    """The slot of the looped layers in this cache, made at the first call.

    Raises:
        ShiftInputError: a cache of an unknown kind, or one that other layers have filled.
    """
    remedy = "Use a DynamicCache or a StaticCache, or use_cache=False."
    if not isinstance(cache, cache_utils.Cache) or isinstance(cache, cache_utils.EncoderDecoderCache):
        refuse("cache", type(cache).__name__, "a DynamicCache or a StaticCache", remedy)
    if cache.offloading:
        refuse("cache", "offloading", "a cache that stays on its device", remedy)
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= first:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[first]
    if not isinstance(layer, LoopedSlot):
        if type(layer) not in CLOCKS:
            refuse("cache", type(layer).__name__, ", ".join(c.__name__ for c in CLOCKS), remedy)
        if int(layer.get_seq_length()):
            refuse("cache", "filled by other layers", "an empty one", "Begin with a new cache.")
        layer = cache.layers[first] = LoopedSlot(layer)
    return layer
