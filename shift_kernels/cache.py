"""LoopedCache: keys and values of the tokens so far, so that a new token costs one token's work.

Every loop of every layer has keys and values of its own: T x n_layers caches. One cache for all loops is
another model: a token would read what its predecessors looked like in another loop. ``keep_loops=k`` shares
on purpose, as Huginn's cache budget does (arXiv 2502.05171): loop t reads and writes cache t mod k, which
therefore holds a token's last k loops.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shift_kernels.checks import check_dtype, check_int, check_offsets, check_usable_device
from shift_kernels.errors import input_error, refuses_unknown_keywords, type_error
from shift_kernels.spec import MAX_LOOPS, MAX_TOKENS, BlockSpec

_FUNCTION = "shift_kernels.LoopedCache"


def dtype_beside(x: Tensor) -> torch.dtype:
    """Of keys and values that are kept for x: on a CPU at least float32, as the cpu backend reads them."""
    return x.dtype if x.device.type != "cpu" else torch.promote_types(x.dtype, torch.float32)


class LoopedCache:
    """Keys and values of up to ``max_len`` tokens of each sample, for every loop and layer.

    ``block(e_new, n_loops, cache=cache)`` appends the new tokens and returns their h_T, which is what one
    call with all tokens returns for them (with ``keep_loops`` below T only about that). A prompt may be
    ragged: ``seq_lens`` of that call says which tokens are real, and each sample goes on from its own length.
    Memory is allocated when the first token comes. For inference: gradients must be off.

    Args:
        spec: the block, which must be causal.
        batch: samples.
        max_len: tokens of a sample, at most.
        n_loops: the most loops of any call.
        keep_loops: caches of the last k loops, shared by the others; None: one for each of the ``n_loops``.
        dtype: of keys and values.
        device: where they live; that of e.

    Attributes:
        lengths: tokens of each sample so far, int64 [batch] on the CPU.

    Raises:
        ShiftInputError: a size out of range, a block that is not causal, no such device.
    """

    @refuses_unknown_keywords(_FUNCTION)
    def __init__(
        self,
        spec: BlockSpec,
        batch: int,
        max_len: int,
        n_loops: int,
        keep_loops: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(spec, BlockSpec):
            raise type_error(
                _FUNCTION, "spec", type(spec).__name__, "a BlockSpec", "Build one: BlockSpec(...)."
            )
        if not spec.causal:
            raise input_error(
                _FUNCTION,
                "spec",
                "causal=False",
                "a causal block",
                "Run all tokens at once: each of them changes with every new one.",
            )
        self.spec = spec
        self.batch = check_int(_FUNCTION, "batch", batch, 1, MAX_TOKENS)
        self.max_len = check_int(_FUNCTION, "max_len", max_len, 1, MAX_TOKENS)
        self.n_loops = check_int(_FUNCTION, "n_loops", n_loops, 1, MAX_LOOPS)
        kept = self.n_loops if keep_loops is None else keep_loops
        self.keep_loops = check_int(_FUNCTION, "keep_loops", kept, 1, self.n_loops)
        check_dtype(_FUNCTION, "dtype", dtype)
        check_usable_device(_FUNCTION, "device", device)
        self.dtype, self.device = dtype, torch.device(device)
        self.lengths = torch.zeros(self.batch, dtype=torch.int64)
        self.loops: Tensor | None = None
        """Loops of each sample, int64 [batch]; None before the first call, which decides them."""
        self._memory: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[keep_loops, n_layers, 2 (keys, values), batch, n_kv_heads, max_len, head_dim]."""
        s = self.spec
        return (
            *(self.keep_loops, s.n_layers, 2),
            *(self.batch, s.n_kv_heads, self.max_len, s.head_dim),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, allocated or not."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def memory(self) -> Tensor:
        """Keys and values, :attr:`shape`; allocated when first asked for."""
        if self._memory is None:
            self._memory = self._allocated(self.shape)
        return self._memory

    def _allocated(self, shape: tuple[int, ...]) -> Tensor:
        n = math.prod(shape)  # and some numbers that vector loads may touch
        with torch.inference_mode(False):  # or it could not be written outside of the caller's
            return torch.zeros(n + 16, dtype=self.dtype, device=self.device)[:n].view(shape)

    def __repr__(self) -> str:
        return f"LoopedCache({self.describe()})"

    def describe(self) -> str:
        """Its size, in a phrase."""
        s = self.spec
        return (
            f"{self.nbytes / 2**20:.1f} MiB: {self.keep_loops} loops x {s.n_layers} layers x 2 x "
            f"[{self.batch}, {s.n_kv_heads}, {self.max_len}, {s.head_dim}] "
            f"{str(self.dtype).removeprefix('torch.')}"
        )

    def grow(self, max_len: int) -> None:
        """Make room for ``max_len`` tokens of each sample; those that are there stay."""
        longer = check_int(f"{_FUNCTION}.grow", "max_len", max_len, self.max_len, MAX_TOKENS)
        if (before := self._memory) is not None:
            *outer, _, head_dim = self.shape
            grown = self._allocated((*outer, longer, head_dim))
            grown[..., : self.max_len, :] = before
            self._memory = grown
        self.max_len = longer

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.lengths = torch.zeros_like(self.lengths)
        self.loops = None

    def crop(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Forget each sample's tokens from ``lengths`` (one number, or one a sample) on.

        Raises:
            ShiftInputError: no such numbers; nothing is forgotten then.
        """
        if lengths.ndim == 0 if isinstance(lengths, Tensor) else not isinstance(lengths, Sequence):
            lengths = [lengths] * self.batch  # type: ignore[list-item]
        self.lengths = torch.minimum(self.lengths, self._numbers("crop", "lengths", lengths, MAX_TOKENS))

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Sample i becomes what ``index[i]`` was: int [batch], with repetitions, as beam search needs it.

        Raises:
            ShiftInputError: no such index; nothing has moved then.
        """
        host = self._numbers("reorder", "index", index, self.batch - 1)
        if self._memory is not None:
            used = self._memory[..., : int(self.lengths[host].max()), :]
            used.copy_(used.index_select(3, host.to(self.device)))
        self.lengths = self.lengths[host]
        if self.loops is not None:
            self.loops = self.loops[host]

    def _numbers(self, method: str, name: str, values: Any, high: int) -> Tensor:
        """One number from 0 to ``high`` a sample: int64 [batch] on the CPU."""
        function, allowed = f"{_FUNCTION}.{method}", f"{self.batch} ints from 0 to {high}, one a sample"
        if isinstance(values, Tensor):
            check_offsets(function, name, values)
            shape, numbers = list(values.shape), values.flatten().tolist()
        elif isinstance(values, Sequence):
            shape, numbers = [len(values)], list(values)
        else:
            raise type_error(function, name, type(values).__name__, allowed, "Pass a tensor.")
        if shape != [self.batch]:
            raise input_error(function, name, f"of shape {shape}", allowed, "Give one entry a sample.")
        return torch.tensor([check_int(function, name, n, 0, high, allowed) for n in numbers])

    def slot(self, loop: int) -> Tensor:
        """Keys and values that loop 1, 2, ... reads and writes: :attr:`shape` from its second number on."""
        return self.memory[(loop - 1) % self.keep_loops]


@dataclasses.dataclass
class Step:
    """The tokens that one call appends to a cache.

    Args:
        cache: which.
        n_new: int64 [batch] on the CPU: so many of e's tokens are real, those after them pads.
    """

    cache: LoopedCache
    n_new: Tensor

    def __post_init__(self) -> None:
        self.before = self.cache.lengths.clone()
        self.after = self.before + self.n_new

    def commit(self, n_loops: int | Tensor) -> None:
        """All loops are done: the tokens count from now on."""
        self.cache.lengths = self.after
        self.cache.loops = torch.as_tensor(n_loops, device="cpu").expand(self.cache.batch).clone()


def check_step(
    function: str,
    cache: LoopedCache,
    shape: Sequence[int],
    device: torch.device,
    spec: BlockSpec,
    n_loops: int | Tensor,
    seq_lens: Tensor | None,
) -> Step:
    """The step of arguments that are else checked.

    Args:
        shape: of e, [batch, seq_len, ...].
        device: of e.

    Raises:
        ShiftInputError: the cache is another block's or batch's, is full, or had other loops before.
    """
    if not isinstance(cache, LoopedCache):
        given = type(cache).__name__
        raise type_error(function, "cache", given, "a LoopedCache", "Build one: LoopedCache(spec, ...).")

    def refuse(value: object, allowed: str, remedy: str) -> None:
        raise input_error(function, "cache", value, allowed, remedy)

    if cache.spec != spec:
        refuse(f"of {cache.spec}", "one of this block's spec", "Build one from block.spec.")
    batch, seq_len, *_ = shape
    if cache.batch != batch:
        refuse(f"for batch {cache.batch}", f"one for e's batch {batch}", "Build another, or reorder().")
    if cache.device.type != device.type:
        refuse(f"on {cache.device}", f"one on e's device {device}", "Build it with device=.")
    loops = torch.as_tensor(n_loops, device="cpu").expand(cache.batch)
    if loops.max() > cache.n_loops:
        refuse(f"of {cache.n_loops} loops", f"one of {int(loops.max())}", "Build it with n_loops=.")
    before = cache.loops if cache.lengths.any() else None  # nothing binds an empty cache
    if before is not None and not torch.equal(loops, before):
        refuse(
            f"filled with n_loops {before.tolist()}",
            f"one filled with {loops.tolist()}",
            "Keep n_loops: a token's deeper loops would read keys that earlier tokens never wrote.",
        )
    lengths = torch.as_tensor(seq_len if seq_lens is None else seq_lens, device="cpu")
    step = Step(cache, lengths.expand(cache.batch).to(torch.int64).clamp(min=0))
    if step.after.max() > cache.max_len:
        refuse(f"of max_len {cache.max_len}", f"one of {int(step.after.max())}", "Build a longer one.")
    return step
