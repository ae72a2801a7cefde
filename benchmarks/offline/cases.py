"""The calls whose kernels are compiled offline: resident blocks, attention, the streamed layer."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from benchmarks.offline.limits import SHARED_LIMIT
from shift_kernels import BlockSpec, LoopedBlock
from shift_kernels.backends.triton import backend as triton_backend
from shift_kernels.backends.triton import resident_plan
from shift_kernels.call import CallOptions

TILES = ((32, 64), (64, 64), (64, 128), (128, 64), (128, 128), (64, 256))  # seq_len, d_model
HEAD_DIM = 32
WIDE = {
    "wide": dict(activation="swiglu", position="rope", norm_placement="sandwich", n_heads=2, head_dim=128),
    "wide-heads": dict(n_heads=2, head_dim=128),
}
"""Blocks that hold more than those of TILES: the most there is, and wide heads alone."""
# Rows, seq_len, d_model, gradients of tiles that short sequences may share.
PACKED = (
    (64, 32, 64, False),
    (64, 32, 64, True),
    (128, 32, 64, False),
    (128, 64, 128, False),
    (128, 64, 256, False),
)
HEAD_DIMS = (4, 16, 32, 64, 128)
WIDTHS = (64, 2048)  # d_model of the streamed layer's kernels
LAYERS = (
    dict(position="rope", injection="add"),
    dict(norm_placement="sandwich", activation="swiglu"),
    dict(norm="rmsnorm", bias=False),
    dict(norm="rmsnorm", norm_placement="sandwich"),
    dict(norm_placement="post", bias=False),
)
"""Streamed blocks: between them every row kernel, with norms that have a bias and norms that have none."""


def spec_of(d_model: int, **options: Any) -> BlockSpec:
    """A block with heads of HEAD_DIM, at least 4 of them."""
    return BlockSpec(**{"d_model": d_model, "n_heads": min(d_model, max(4, d_model // HEAD_DIM))} | options)


def chip(sm: int) -> resident_plan.Chip:
    """What the planner asks of an architecture."""
    return resident_plan.Chip(sm, SHARED_LIMIT[sm])


def fits(seq_len: int, d_model: int, dtype: torch.dtype, sm: int, *, grad: bool, **options: Any) -> bool:
    """Whether the resident kernels serve a tile."""
    return not resident_plan.too_large(spec_of(d_model, **options), seq_len, dtype, grad=grad, chip=chip(sm))


def block(
    seq_len: int,
    d_model: int,
    dtype: torch.dtype,
    *,
    grad: bool,
    training: bool = True,
    ragged: bool = False,
    own_loops: bool = False,
    keep_all: bool = False,
    halt: bool = False,
    **options: Any,
) -> None:
    """One loop of one sample through the triton backend: forward, saving if in ``training``; or backward."""
    spec = spec_of(d_model, **options)
    weights = {name: w.detach() for name, w in LoopedBlock(spec, dtype=dtype).weights().items()}
    e = torch.zeros(1, seq_len, d_model, dtype=dtype)
    call_options = CallOptions(
        n_loops=torch.ones(1, dtype=torch.int64) if own_loops else 1,
        compute_dtype=dtype,
        seq_lens=torch.tensor([seq_len]) if ragged else None,
        return_all_loops=keep_all,
        halt_threshold=0.1 if halt else None,
    )
    if grad:
        saved = triton_backend.TRITON.saved_like(e, spec, 1)
        grad_h = e[None] if keep_all else e
        triton_backend.TRITON.backward(grad_h, e, weights, spec, call_options, saved)
    else:
        triton_backend.TRITON.forward(e, weights, spec, call_options, for_backward=training and not halt)


def packed(rows: int, seq_len: int, d_model: int, grad: bool) -> None:
    """A training step's half of sequences that share tiles, whether that would be planned or not."""
    batch = 2 * rows * resident_plan.BUSY // seq_len
    spec, e = spec_of(d_model), torch.zeros(batch, seq_len, d_model, dtype=torch.bfloat16)
    weights = {name: w.detach() for name, w in LoopedBlock(spec, dtype=e.dtype).weights().items()}
    call_options = CallOptions(1, e.dtype)
    resident_plan.plan.cache_clear()
    with (
        mock.patch.multiple(resident_plan, PACKED_ROWS=rows, APART=0),
        mock.patch.dict(resident_plan.FORWARD_TILE, {2: rows * 256}),
    ):
        if grad:
            saved = triton_backend.TRITON.saved_like(e, spec, 1)
            triton_backend.TRITON.backward(e, e, weights, spec, call_options, saved)
        else:
            triton_backend.TRITON.forward(e, weights, spec, call_options, for_backward=True)
    resident_plan.plan.cache_clear()


def attention(head_dim: int, dtype: torch.dtype, *, ragged: bool = False) -> None:
    """Causal attention over a length that fills every tile, forward and backward."""
    from shift_kernels.backends.triton import attention as kernels

    q = torch.zeros(1, 2, 512, head_dim, dtype=dtype)
    lens = torch.tensor([500]) if ragged else None
    exact = q.float() if kernels.needs_exact(q) else None
    o, lse = kernels.attention_forward(q, q, q, True, lens, exact=exact)
    kernels.attention_backward(o, q, q, q, o if exact is None else exact, lse, True, lens)


def layer(d_model: int, dtype: torch.dtype) -> None:
    """One loop of every streamed block, forward and backward."""
    from shift_kernels.backends.triton import streamed

    for options in LAYERS:
        spec = spec_of(d_model, **options)
        weights = {name: w.detach() for name, w in LoopedBlock(spec, dtype=dtype).weights().items()}
        e = torch.zeros(1, 16, d_model, dtype=dtype)
        call_options = CallOptions(1, dtype)
        h, _, saved = streamed.forward(e, weights, spec, call_options, for_backward=True)
        streamed.backward(h, e, weights, spec, call_options, saved)
