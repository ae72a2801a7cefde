"""Launches of the resident kernels: all T loops in one, the backward in windows of loops."""

from __future__ import annotations

import torch
from torch import Tensor

from shift_kernels.backends.triton.operands import OperandSums
from shift_kernels.backends.triton.packing import Packed, pack, packed_like, rotary, unpack
from shift_kernels.backends.triton.resident_backward import Gradients, resident_backward
from shift_kernels.backends.triton.resident_forward import Mode, States, resident_forward
from shift_kernels.backends.triton.resident_plan import Tile, layout, states
from shift_kernels.backends.windows import Forward, Window, backward_through_windows, seq_lens_on
from shift_kernels.call import CallOptions
from shift_kernels.spec import BlockSpec

TENSOR_MEMORY = 512
"""Columns."""


def saved_like(e: Tensor, spec: BlockSpec, n_loops: int, compute_dtype: torch.dtype) -> list[Tensor]:
    """Empty tensors of the shapes that :func:`forward` saves: states of every loop, and packed weights."""
    return [e.new_empty(n_loops * states(spec), *e.shape), *packed_like(e, spec, compute_dtype)]


def forward(
    e: Tensor,
    weights: dict[str, Tensor],
    spec: BlockSpec,
    options: CallOptions,
    for_backward: bool,
    tile: Tile,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """h_T (or all h_t), the loops used [batch]; for a backward, what :func:`saved_like` says."""
    batch, seq_len, _ = e.shape
    run = Forward.of(e, options, for_backward)
    saved = e.new_empty(run.most * tile.saves, *e.shape) if for_backward else None
    packed = pack(weights, spec, seq_len, options.compute_dtype)
    halt = options.halt_threshold is not None
    io = States(
        e.contiguous(), run.own_loops, seq_lens_on(e, options), run.h, saved, run.used if halt else None
    )
    kernel = resident_forward[(tile.programs(batch, seq_len),)](
        io,
        packed,
        run.most,
        seq_len,
        batch,
        float(options.halt_threshold or 0.0),
        tile,
        Mode(options.return_all_loops, halt),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    check_not_empty(kernel)
    return run.h, run.used, [] if saved is None else [saved, packed.w, packed.b, packed.v]


def backward(
    grad_h: Tensor,
    e: Tensor,
    weights: dict[str, Tensor],
    spec: BlockSpec,
    options: CallOptions,
    saved: list[Tensor],
    tile: Tile,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of e and of the weights, in the order of ``weights``."""
    batch, seq_len, _ = e.shape
    kept, grad_h = saved[0], grad_h.contiguous()
    most, programs = len(kept) // tile.saves, tile.programs(batch, seq_len)
    n_grad_loops = most if options.n_grad_loops is None else min(options.n_grad_loops, most)
    own_loops, lens = options.sample_loops(e.device), seq_lens_on(e, options)
    packed = Packed(*saved[1:], rotary(spec, seq_len, e.device))  # type: ignore[call-arg]
    sums = OperandSums(packed, layout(spec), programs, tile.precision)

    dn = torch.empty(e.shape, dtype=torch.float32, device=e.device)

    def launch(window: Window) -> None:
        kernel = resident_backward[(programs,)](
            Gradients(kept, grad_h, own_loops, lens, window.dh, window.de, dn, sums.vectors, window.operands),
            packed,
            most,
            n_grad_loops,
            window.low,
            window.high,
            seq_len,
            batch,
            tile,
            options.return_all_loops,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        check_not_empty(kernel)

    grad_e = backward_through_windows(grad_h, e, spec, options, most, sums, launch)
    return grad_e, unpack(sums.packed(), weights, spec)


def check_not_empty(kernel: object) -> None:
    """Triton makes a kernel that does nothing, without a word, of accumulators beyond tensor memory.

    Raises:
        RuntimeError: it did.
    """
    columns = getattr(getattr(kernel, "metadata", None), "tmem_size", None) or 0
    if columns > TENSOR_MEMORY:
        raise RuntimeError(
            f"shift_kernels: this block needs {columns} columns of tensor memory, and there are "
            f"{TENSOR_MEMORY}. Use backend='torch', or shorter sequences."
        )
