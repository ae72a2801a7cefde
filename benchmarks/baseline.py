"""The looped block as people write it, in library calls: what our kernels are timed against."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shift_kernels import LoopedBlock


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by the library."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every position to every other by the library."""
    return F.scaled_dot_product_attention(q, k, v)


class PlainBlock(torch.nn.Module):
    """A pre-norm layernorm block of one layer with injection, sharing the weights of ``block``.

    Args:
        block: with gelu or gelu_tanh, with or without a norm in the loop.
        attend: q, k, v [batch, n_heads, seq_len, head_dim] -> the same; default: the library's.
    """

    def __init__(
        self, block: LoopedBlock, attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        spec = block.spec
        self.layer = block.layers.get_submodule("0")
        self.loop_norm = block.loop_norm if spec.loop_norm else None
        self.heads, self.approximate = spec.n_heads, "tanh" if spec.activation == "gelu_tanh" else "none"
        self.attend = attend or (sdpa if spec.causal else sdpa_of_all)

    def body(self, x: Tensor) -> Tensor:
        """One loop."""
        p = self.layer
        y = F.layer_norm(x, x.shape[-1:], p.norm1.weight, p.norm1.bias)
        qkv = F.linear(y, p.self_attn.in_proj_weight, p.self_attn.in_proj_bias)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        o = self.attend(q, k, v).transpose(1, 2).flatten(-2)
        x = x + F.linear(o, p.self_attn.out_proj.weight, p.self_attn.out_proj.bias)
        y = F.layer_norm(x, x.shape[-1:], p.norm2.weight, p.norm2.bias)
        y = F.gelu(F.linear(y, p.linear1.weight, p.linear1.bias), approximate=self.approximate)
        x = x + F.linear(y, p.linear2.weight, p.linear2.bias)
        if self.loop_norm is not None:
            x = F.layer_norm(x, x.shape[-1:], self.loop_norm.weight, self.loop_norm.bias)
        return x

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
