"""How much arithmetic a step costs: one formula, checked in the tests against torch's own counter.

Counted are matrix products, 2 FLOPs a multiply-add, attention dense (a causal mask saves nothing), as
``torch.utils.flop_counter.FlopCounterMode`` counts them. Embeddings, norms and activations are not.
These are model FLOPs: what a backend recomputes in its backward pass does not count as progress.
"""

from __future__ import annotations

import math

from shift.model import LoopedTransformer
from shift_kernels import BlockSpec, LoopedBlock


def block_flops(spec: BlockSpec, seq_len: int) -> int:
    """Forward FLOPs of one application of the block (one loop) to one sequence."""
    maps = sum(math.prod(shape) for shape in spec.weight_shapes().values() if len(shape) == 2)
    attention = 2 * seq_len * spec.n_heads * spec.head_dim
    return 2 * seq_len * (maps + spec.n_layers * attention)


def head_flops(model: LoopedTransformer, seq_len: int) -> int:
    """Forward FLOPs of the read-out of one sequence."""
    return 2 * seq_len * model.block.spec.d_model * model.n_classes


def forward_flops(
    model: LoopedTransformer, batch_size: int, seq_len: int, n_loops: float, *, all_loops: bool = False
) -> int:
    """Forward FLOPs of a batch; packed rows count as one sequence each.

    Args:
        model: with its prelude and coda.
        batch_size, seq_len: of the batch.
        n_loops: may be the mean of the samples' own loops.
        all_loops: coda and read-out run after every loop.
    """
    core, read = _core_and_read(model, seq_len, n_loops, n_loops if all_loops else 1)
    return round(batch_size * (_once(model.prelude, seq_len) + core + read))


def train_step_flops(
    model: LoopedTransformer,
    batch_size: int,
    seq_len: int,
    n_loops: float,
    grad_loops: float | None = None,
    *,
    all_loops: bool = False,
) -> int:
    """Forward plus backward FLOPs of a training step.

    The backward costs twice the forward of what carries gradient: ``grad_loops`` loops (default: all), the
    mean over the samples as ``n_loops`` is, and all that runs once. (Where truncation leaves the prelude a
    gradient of 0, that is computed all the same.)
    """
    grad_loops = n_loops if grad_loops is None else grad_loops
    core, read = _core_and_read(model, seq_len, grad_loops, n_loops if all_loops else 1)
    once = _once(model.prelude, seq_len)
    forward = forward_flops(model, batch_size, seq_len, n_loops, all_loops=all_loops)
    return forward + 2 * round(batch_size * (once + core + read))


def _core_and_read(
    model: LoopedTransformer, seq_len: int, n_loops: float, n_reads: float
) -> tuple[float, float]:
    read = _once(model.coda, seq_len) + head_flops(model, seq_len)
    return n_loops * block_flops(model.block.spec, seq_len), n_reads * read


def _once(block: LoopedBlock | None, seq_len: int) -> int:
    return 0 if block is None else block_flops(block.spec, seq_len)
