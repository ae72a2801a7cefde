"""How much arithmetic a step costs: one formula, checked in the tests against torch's own counter.

Counted are matrix products, 2 FLOPs a multiply-add, attention dense (a causal mask saves nothing), as
``torch.utils.flop_counter.FlopCounterMode`` counts them. Embeddings, norms and activations are not.
These are model FLOPs: what a backend recomputes in its backward pass does not count as progress.
"""

from __future__ import annotations

from shift.model import LoopedTransformer
from shift_kernels import BlockSpec


def block_flops(spec: BlockSpec, seq_len: int) -> int:
    """Forward FLOPs of one application of the block (one loop) to one sequence."""
    attn_dim = spec.n_heads * spec.head_dim
    projections = spec.d_model * (spec.qkv_dim + attn_dim)
    hidden_maps = 3 if spec.activation == "swiglu" else 2
    mlp = hidden_maps * spec.d_model * spec.d_ff
    attention = 2 * seq_len * attn_dim
    return 2 * seq_len * spec.n_layers * (projections + mlp + attention)


def head_flops(model: LoopedTransformer, seq_len: int) -> int:
    """Forward FLOPs of the read-out of one sequence."""
    return 2 * seq_len * model.head.in_features * model.head.out_features


def forward_flops(model: LoopedTransformer, batch_size: int, seq_len: int, n_loops: float) -> int:
    """Forward FLOPs of a batch; ``n_loops`` may be the mean of the samples' own loops."""
    return round(batch_size * (n_loops * block_flops(model.block.spec, seq_len) + head_flops(model, seq_len)))


def train_step_flops(
    model: LoopedTransformer,
    batch_size: int,
    seq_len: int,
    n_loops: float,
    grad_loops: float | None = None,
) -> int:
    """Forward plus backward FLOPs of a training step.

    The backward costs twice the forward of what carries gradient: ``grad_loops`` loops (default: all), the
    mean over the samples as ``n_loops`` is, and the read-out.
    """
    grad_loops = n_loops if grad_loops is None else grad_loops
    backward = 2 * forward_flops(model, batch_size, seq_len, grad_loops)
    return forward_flops(model, batch_size, seq_len, n_loops) + backward
