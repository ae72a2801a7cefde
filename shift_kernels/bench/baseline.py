"""The looped block as people write it, in library calls: what our kernels are timed against."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shift_kernels import BlockSpec, LoopedBlock
from shift_kernels.rotary import rotary_table, rotate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(causal: bool = True) -> Attend:
    """Attention by the library."""
    return functools.partial(F.scaled_dot_product_attention, is_causal=causal)


class PlainBlock(torch.nn.Module):
    """A pre-norm layernorm block with injection, sharing the weights of ``block``.

    Args:
        block: with gelu or gelu_tanh, with or without a norm in the loop.
        attend: q, k, v [batch, n_heads, seq_len, head_dim] -> the same; default: the library's.
    """

    layers: Any  # a module's attribute is a Tensor or a Module to a type checker
    loop_norm: Any

    def __init__(self, block: LoopedBlock, attend: Attend | None = None) -> None:
        super().__init__()
        self.layers, self.spec = block.layers, block.spec
        self.loop_norm = block.loop_norm if self.spec.loop_norm else None
        self.attend = attend or sdpa(self.spec.causal)

    def body(self, x: Tensor) -> Tensor:
        """One loop."""
        for p in self.layers.children():
            x = self.layer(p, x)
        if self.loop_norm is not None:
            x = F.layer_norm(x, x.shape[-1:], self.loop_norm.weight, self.loop_norm.bias)
        return x

    def layer(self, p: Any, x: Tensor) -> Tensor:
        x = x + self.attention(p, F.layer_norm(x, x.shape[-1:], p.norm1.weight, p.norm1.bias))
        y = F.layer_norm(x, x.shape[-1:], p.norm2.weight, p.norm2.bias)
        approximate = "tanh" if self.spec.activation == "gelu_tanh" else "none"
        y = F.gelu(F.linear(y, p.linear1.weight, p.linear1.bias), approximate=approximate)
        return x + F.linear(y, p.linear2.weight, p.linear2.bias)

    def attention(self, p: Any, x: Tensor) -> Tensor:
        bias = (p.self_attn.in_proj_bias, p.self_attn.out_proj.bias) if self.spec.bias else (None, None)
        qkv = F.linear(x, p.self_attn.in_proj_weight, bias[0])
        q, k, v = (t.unflatten(-1, (self.spec.n_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        o = self.attend(*self.positioned(q, k), v).transpose(1, 2).flatten(-2)
        return F.linear(o, p.self_attn.out_proj.weight, bias[1])

    def positioned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys with what tells their positions: nothing."""
        return q, k

    def compile(self, mode: str | None = None) -> PlainBlock:  # type: ignore[override]
        """Compile the body, not the loop: unrolled T times it takes minutes, and again for every T."""
        self.body = torch.compile(self.body, mode=mode)  # type: ignore[method-assign]
        return self

    def forward(self, e: Tensor, n_loops: int | Tensor) -> Tensor:
        """h_T of [batch, seq_len, d_model]; for samples' own T [batch] all loops of all, of which each takes
        its own: with library calls there is no better way."""
        h = torch.zeros_like(e)
        if isinstance(n_loops, Tensor):
            for t in range(int(n_loops.max())):
                h = torch.where(t < n_loops[:, None, None], self.body(h + e), h)
            return h
        for _ in range(n_loops):
            h = self.body(h + e)
        return h


class PlainTrmBlock(PlainBlock):
    """With post-norm rmsnorm, swiglu, rotary positions and no biases, as Tiny Recursive Models have it."""

    def layer(self, p: Any, x: Tensor) -> Tensor:
        eps = self.spec.norm_eps
        x = F.rms_norm(x + self.attention(p, x), x.shape[-1:], p.norm1.weight, eps)
        gate, value = F.linear(x, p.linear1.weight).chunk(2, -1)
        y = F.linear(F.silu(gate) * value, p.linear2.weight)
        return F.rms_norm(x + y, x.shape[-1:], p.norm2.weight, eps)

    def positioned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(q, self.table), rotate(k, self.table)

    def forward(self, e: Tensor, n_loops: int | Tensor) -> Tensor:
        self.table = _rotary_table(e.shape[1], self.spec, e.device, e.dtype)
        return super().forward(e, n_loops)


@functools.lru_cache
def _rotary_table(seq_len: int, spec: BlockSpec, device: torch.device, dtype: torch.dtype) -> Tensor:
    return rotary_table(seq_len, spec, device).to(dtype)


PLAIN = {"gpt": PlainBlock, "trm": PlainTrmBlock}
"""By the kind of block: a GPT's, or that of Tiny Recursive Models."""
