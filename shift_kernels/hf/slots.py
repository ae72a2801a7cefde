"""What looped layers have in a Hugging Face cache: a LoopedCache, kept in step with all that happens there.

Transformers' own layer of the cache stays inside as a clock: it is given one channel a token, so it answers
for lengths and masks as everywhere else. Keys and values of the loops are in a shift_kernels.LoopedCache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import cache_utils

from shift_kernels.cache import LoopedCache, dtype_beside
from shift_kernels.hf.families import refuse
from shift_kernels.hf.tokens import Seen, Tokens, read
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

    def __init__(self, clock: Any) -> None:
        self.clock = clock
        self.is_sliding, self.is_croppable = clock.is_sliding, getattr(clock, "is_croppable", True)
        # By it Transformers knows that a mask must hide empty slots.
        self.is_compileable = clock.is_compileable
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

    def cache_for(self, call: int, block: LoopedBlock, n_loops: int, e: Tensor) -> LoopedCache:
        """The cache of call number ``call`` of a step, with room for e."""
        n = int(self.get_seq_length()) + e.shape[1]
        if call == len(self.caches):
            dtype = dtype_beside(e)
            new = LoopedCache(block.spec, len(e), max(n, ROOM), n_loops, dtype=dtype, device=e.device)
            self.caches.append(new)
        cache = self.caches[call]
        if cache.max_len < n:
            cache.grow(2 * n)
        return cache

    def count(self, tokens: Tokens, seen: Seen, h: Tensor) -> None:
        """The tokens of h [.., batch, seq_len, d_model] were appended to those that had been seen."""
        if tokens.real is not None or self.real is not None:
            batch, n_new = h.shape[-3:-1]
            old, new = (
                torch.ones(batch, n, dtype=torch.bool, device=h.device) if real is None else real
                for real, n in ((self.real, seen.n), (tokens.real, n_new))
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


class Step:
    """One call of a model with looped blocks: which tokens are new, and what a cache knows of those before.

        h = step.begin(e, model)
        h = step(block, h, n_loops)  # for each block, always in the same order
        h = step.end(h)

    Args:
        cache: Transformers' own; None for none.
        slots: the numbers of the layers that the blocks stand for.
        x: what the call is about, [batch, seq_len, ..]: hidden states, or ids with a last dimension.
        mask, positions, windows: see :func:`shift_kernels.hf.tokens.read`.

    Raises:
        ShiftInputError: a cache, a mask or positions that no looped block can serve.
    """

    def __init__(
        self,
        cache: Any,
        slots: range,
        x: Tensor,
        mask: Any,
        positions: Tensor | None,
        windows: Sequence[int | None] = (None,),
    ) -> None:
        self.cache, self.slots = cache, slots
        self.past = None if cache is None else slot(cache, slots[0])
        self.seen = Seen() if self.past is None else self.past.seen(x.shape[1])
        self.tokens = read(mask, positions, x, self.seen, windows)
        self.calls = 0

    def begin(self, e: Tensor, model: nn.Module, n_calls: int | None = None) -> Tensor:
        """e [batch, seq_len, d_model] with each sample's tokens first, for the first block.

        Args:
            n_calls: of blocks in this step; None: as many as in the others.
            model: whose parameters decide whether there will be gradients. A cache records nothing then: in
                training Transformers makes one, and nothing reads it.
        """
        grad = torch.is_grad_enabled() and (
            e.requires_grad or any(p.requires_grad for p in model.parameters())
        )
        if self.past is not None:
            if self.seen.n and (grad or not self.past.is_recorded):
                allowed = "one filled and read without"
                refuse("cache", "continued with gradients", allowed, "Use torch.no_grad().")
            self.past.is_recorded = not grad
            cached = len(self.past.caches)
            if self.seen.n and n_calls not in (None, cached):
                allowed = f"{cached} calls of blocks, as the cached tokens had (not {n_calls})"
                refuse("n_loops", "changed", allowed, "Begin with a new cache.")
        packed, self.seq_lens = self.tokens.pack(e)
        return packed

    def __call__(self, block: LoopedBlock, h: Tensor, n_loops: int, **options: Any) -> Tensor:
        """A block's result; ``options`` as for the block."""
        if self.past is not None and self.past.is_recorded:
            options["cache"] = self.past.cache_for(self.calls, block, n_loops, h)
        self.calls += 1
        return block(h, n_loops, seq_lens=self.seq_lens, **options)

    def end(self, h: Tensor) -> Tensor:
        """The last block's result [.., batch, seq_len, d_model] with each token in its place; pads are 0."""
        if self.past is not None:
            batch, n_new = h.shape[-3:-1]
            self.past.count(self.tokens, self.seen, h)
            tick = h.new_ones(batch, 1, n_new, 1)
            for i in self.slots:
                self.cache.update(tick, tick, i)
        if h.ndim > 3:
            return torch.stack([self.tokens.unpack(after) for after in h])
        return self.tokens.unpack(h)


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
    layer: Any = cache.layers[first]
    if not isinstance(layer, LoopedSlot):
        if type(layer) not in CLOCKS:
            refuse("cache", type(layer).__name__, ", ".join(c.__name__ for c in CLOCKS), remedy)
        if int(layer.get_seq_length()):
            refuse("cache", "filled by other layers", "an empty one", "Begin with a new cache.")
        layer = cache.layers[first] = LoopedSlot(layer)
    return layer
