"""What is timed: sizes, who runs them, and the float64 result that everyone's is held against."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from shift_kernels import BlockSpec, LoopedBlock, attention
from shift_kernels.bench.baseline import PlainBlock, sdpa

OURS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
"""Backends with kernels of their own, by the type of the device."""
LIBRARY = ("eager", "compile")
"""What people run today: plain PyTorch, and the same under ``torch.compile``."""


def block_of(d_model: int) -> LoopedBlock:
    """A causal pre-norm block with injection, heads of 16 (32 from d_model 256 on), an MLP of 4 d_model."""
    return LoopedBlock(BlockSpec(d_model, d_model // (32 if d_model >= 256 else 16), injection="add"))


@dataclasses.dataclass(frozen=True)
class BlockCase:
    """:func:`block_of` ``d_model``, looped."""

    d_model: int
    seq_len: int
    batch: int
    n_loops: int
    dtype: str = "float32"
    backward: bool = True
    """Whether the backward pass is timed, too."""

    @property
    def name(self) -> str:
        direction = "both" if self.backward else "forward"
        size = f"d{self.d_model}-n{self.seq_len}-b{self.batch}-T{self.n_loops}"
        return f"block-{size}-{self.dtype}-{direction}"

    def calls(self, names: tuple[str, ...], device: str) -> dict[str, Callable[[], list[Tensor]]]:
        """name -> a call that returns h_T, or h_T and the gradients of e and of every weight.

        Args:
            names: of a backend, of :data:`LIBRARY`, or ``exact``: eager in float64.
            device: where.
        """
        torch.manual_seed(0)
        block = block_of(self.d_model)
        block.to(device, getattr(torch, self.dtype))
        e = torch.randn(self.batch, self.seq_len, self.d_model).to(device, getattr(torch, self.dtype))
        return {name: self._call(name, block, e) for name in names}

    def _call(self, name: str, block: LoopedBlock, e: Tensor) -> Callable[[], list[Tensor]]:
        run: Callable[[Tensor], Tensor]
        if name == "exact":
            block, e = copy.deepcopy(block).double(), e.double()
        if name in ("exact", *LIBRARY):
            plain = PlainBlock(block)
            run = functools.partial(plain.compile() if name == "compile" else plain, n_loops=self.n_loops)
        else:
            run = functools.partial(block, n_loops=self.n_loops, backend=name)
        return _directed(run, [e], list(block.parameters()), self.backward)


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Causal attention."""

    batch: int
    n_heads: int
    seq_len: int
    head_dim: int
    dtype: str = "float32"
    backward: bool = True

    @property
    def name(self) -> str:
        direction = "both" if self.backward else "forward"
        size = f"b{self.batch}-h{self.n_heads}-n{self.seq_len}-hd{self.head_dim}"
        return f"attention-{size}-{self.dtype}-{direction}"

    def calls(self, names: tuple[str, ...], device: str) -> dict[str, Callable[[], list[Tensor]]]:
        """As :meth:`BlockCase.calls`: the attention's output, or that and the gradients of q, k and v."""
        torch.manual_seed(0)
        shape = (self.batch, self.n_heads, self.seq_len, self.head_dim)
        qkv = [torch.randn(shape).to(device, getattr(torch, self.dtype)) for _ in range(3)]
        return {name: self._call(name, qkv) for name in names}

    def _call(self, name: str, qkv: list[Tensor]) -> Callable[[], list[Tensor]]:
        run: Callable[..., Tensor]
        if name == "exact":
            qkv = [x.double() for x in qkv]
        if name in ("exact", *LIBRARY):
            run = torch.compile(sdpa()) if name == "compile" else sdpa()
        else:
            run = functools.partial(attention, backend=name)
        return _directed(run, qkv, [], self.backward)


Case = BlockCase | AttentionCase


def _directed(
    run: Callable[..., Tensor], inputs: list[Tensor], weights: list[Tensor], backward: bool
) -> Callable[[], list[Tensor]]:
    """The call that is timed: forward without gradients, or forward and backward."""
    if not backward:

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [run(*inputs)]

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]
    grad = torch.ones_like(inputs[0])

    def both() -> list[Tensor]:
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, [*leaves, *weights], grad)]

    return both


def quick(device: str) -> tuple[Case, ...]:
    """A minute's worth: the demo's width with and without a backward pass, and in bfloat16."""
    blocks = (
        BlockCase(64, 32, 32, 8, backward=False),
        BlockCase(64, 32, 32, 8),
        BlockCase(64, 32, 32, 8, "bfloat16"),
        BlockCase(128, 32, 32, 8),
    )
    return blocks if device == "cpu" else (*blocks, AttentionCase(32, 8, 512, 64, "bfloat16"))


def full(device: str) -> tuple[Case, ...]:
    """Widths by dtypes, longer sequences and, where we have kernels for it, attention alone."""
    sizes = ((64, 32, 32), (64, 128, 32), (128, 32, 32), (256, 32, 32))
    blocks = tuple(BlockCase(*size, 8, dtype) for dtype in ("float32", "bfloat16") for size in sizes)
    if device == "cpu":
        return blocks
    shapes = ((256, 8, 64, 32), (32, 8, 512, 64), (8, 16, 2048, 64))
    return (*blocks, *(AttentionCase(*shape, "bfloat16") for shape in shapes))
