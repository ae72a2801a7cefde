"""What is timed: shapes, directions and competitors. No torch here, so that listing needs no GPU."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Block:
    """A looped block: bf16, pre-norm, causal, MLP 4 d_model, injection."""

    batch: int
    seq_len: int
    d_model: int
    n_heads: int
    n_loops: int

    @property
    def name(self) -> str:
        return f"block-b{self.batch}-n{self.seq_len}-d{self.d_model}-h{self.n_heads}-T{self.n_loops}"

    @property
    def flops(self) -> int:
        """Forward matmul FLOPs: linear maps, and attention over all pairs."""
        per_token = 24 * self.d_model**2 + 4 * self.seq_len * self.d_model
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

BLOCK_RUNNERS = ("ours", "streamed", "eager", "graphed", "compile", "max-autotune", "flex")
ATTENTION_RUNNERS = ("ours", "sdpa", "flash", "flex")
DIRECTIONS = ("forward", "both")  # both: forward and backward


def runners(case: Block | Attention) -> tuple[str, ...]:
    """Who runs this case; the first is ours."""
    return BLOCK_RUNNERS if isinstance(case, Block) else ATTENTION_RUNNERS
