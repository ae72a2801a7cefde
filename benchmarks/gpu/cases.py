"""What is timed: shapes, directions, competitors and goals. No torch here, so that listing needs no GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.gpu.work import rehearsing

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

    @property
    def bytes(self) -> int:
        """The fewest bytes of a forward, bf16: e read, h written, the weights read once."""
        d, options = self.d_model, KINDS[self.kind]
        mlp = (3 if options.get("activation") == "swiglu" else 2) * d * options.get("d_ff", 4 * d)
        weights = options.get("n_layers", 1) * (4 * d**2 + mlp)
        return 2 * (2 * self.batch * self.seq_len * d + weights)


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

    @property
    def bytes(self) -> int:
        """The fewest bytes of a forward, bf16: q, k and v read, o written."""
        return 2 * 4 * self.batch * self.n_heads * self.seq_len * self.head_dim


BLOCKS: tuple[Block, ...] = (
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
ATTENTIONS: tuple[Attention, ...] = (
    Attention(1024, 4, 32, 16),
    Attention(256, 64, 64, 4),
    Attention(256, 8, 64, 32),
    Attention(32, 8, 512, 64),
    Attention(8, 16, 2048, 64),
    Attention(8, 8, 2048, 128),
)
SLOPES: tuple[Block, ...] = (BLOCKS[1], BLOCKS[4])
"""Timed against the number of loops, too."""

if rehearsing():  # tiny, since an interpreter runs them
    BLOCKS = (Block(1, 5, 64, 4, 1),)
    ATTENTIONS = (Attention(1, 2, 20, 16),)
    SLOPES = BLOCKS

CASES: dict[str, Block | Attention] = {case.name: case for case in (*BLOCKS, *ATTENTIONS)}

# In the order in which they run: what is cheap first, so that a cut-off leaves whole columns.
BLOCK_RUNNERS = ("eager", "triton", "cuda", "graphed", "compile", "torch", "flex")
AUTOTUNED = "max-autotune"  # a runner, too, but of a stage of its own
ATTENTION_RUNNERS = ("sdpa", "triton", "flash", "flex")
DIRECTIONS = ("forward", "both")  # both: forward and backward


def serves(runner: str, case: Attention) -> bool:
    """Whether a runner is timed on a case: on CUDA flex attention takes no head_dim below 16."""
    return runner != "flex" or case.head_dim >= 16


def goal(case: Block | Attention) -> float | None:
    """What ours should gain on the best of the others, forward and backward; a wish, no measurement."""
    if isinstance(case, Attention):
        small = case.seq_len <= 64 or case.head_dim <= 16
        return 2.0 if small else 0.9 if case.head_dim in (64, 128) and case.seq_len >= 512 else None
    if case.kind == "gpt" and case.seq_len <= 64:
        small_batch = case.d_model == 256 and case.batch <= 64
        return 2.0 if small_batch else {64: 2.0, 128: 1.5, 256: 1.15}.get(case.d_model)
    return None
