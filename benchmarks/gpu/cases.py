"""What is timed: shapes, directions and competitors. No torch here, so that listing needs no GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

# BlockSpec's options, by kind. gpt: pre-norm, layernorm, causal, gelu, MLP 4 d_model. trm: the block of Tiny
# Recursive Models and HRM at their d_model of 512, MLP 8/3 d_model to the next multiple of 256.
KINDS: dict[str, dict[str, Any]] = {
    "gpt": dict(injection="add"),
    "trm": dict(
        n_layers=2,
        d_ff=1536,
        norm="rmsnorm",
        norm_placement="post",
        activation="swiglu",
        causal=False,
        position="rope",
        bias=False,
        injection="add",
    ),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """A looped block of a kind, bf16."""

    batch: int
    seq_len: int
    d_model: int
    n_heads: int
    n_loops: int
    kind: str = "gpt"

    @property
    def name(self) -> str:
        head = "block" if self.kind == "gpt" else self.kind
        return f"{head}-b{self.batch}-n{self.seq_len}-d{self.d_model}-h{self.n_heads}-T{self.n_loops}"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of BlockSpec."""
        return dict(d_model=self.d_model, n_heads=self.n_heads) | KINDS[self.kind]

    @property
    def flops(self) -> int:
        """Forward matmul FLOPs: linear maps, and attention over all pairs."""
        d, options = self.d_model, KINDS[self.kind]
        mlp = (6 if options.get("activation") == "swiglu" else 4) * d * options.get("d_ff", 4 * d)
        per_token = options.get("n_layers", 1) * (8 * d**2 + mlp + 4 * self.seq_len * d)
        return self.batch * self.seq_len * self.n_loops * per_token


@dataclasses.dataclass(frozen=True)
class Attention:
    """Causal attention, bf16."""

    batch: int
    n_heads: int
    seq_len: int
    head_dim: int

    @property
    def name(self) -> str:
        return f"attention-b{self.batch}-h{self.n_heads}-n{self.seq_len}-hd{self.head_dim}"

    @property
    def flops(self) -> int:
        """Forward matmul FLOPs over the pairs that a causal mask leaves."""
        return 2 * self.batch * self.n_heads * self.seq_len**2 * self.head_dim


BLOCKS = (
    Block(1024, 32, 64, 4, 20),
    Block(512, 64, 128, 4, 12),
    Block(256, 64, 256, 8, 12),
    Block(64, 64, 256, 8, 12),
    Block(256, 97, 512, 8, 6, "trm"),
    Block(64, 128, 512, 8, 8),
    Block(64, 64, 1024, 16, 8),
    Block(128, 96, 512, 8, 8),
    Block(32, 512, 512, 8, 6),
    Block(8, 2048, 1024, 16, 4),
)
ATTENTIONS = (
    Attention(1024, 4, 32, 16),
    Attention(256, 64, 64, 4),
    Attention(256, 8, 64, 32),
    Attention(32, 8, 512, 64),
    Attention(8, 16, 2048, 64),
    Attention(8, 8, 2048, 128),
)
CASES = {case.name: case for case in (*BLOCKS, *ATTENTIONS)}

BLOCK_RUNNERS = ("cuda", "triton", "streamed", "eager", "graphed", "compile", "max-autotune", "flex")
ATTENTION_RUNNERS = ("triton", "sdpa", "flash", "flex")
DIRECTIONS = ("forward", "both")  # both: forward and backward


def runners(case: Block | Attention) -> tuple[str, ...]:
    """Who runs this case, ours first."""
    return BLOCK_RUNNERS if isinstance(case, Block) else ATTENTION_RUNNERS
