"""Launches of the resident kernels: all T loops in one, the backward in windows of loops."""

from __future__ import annotations

from torch import Tensor

from shift_kernels.backends.triton.packing import Packed, pack, vector_gradients
from shift_kernels.backends.triton.resident_backward import resident_backward
from shift_kernels.backends.triton.resident_forward import resident_forward
from shift_kernels.backends.triton.resident_plan import Tile
from shift_kernels.backends.weight_gradients import OPERANDS, ResidentGradients, Widths, in_order
from shift_kernels.backends.windows import Forward, Window, backward_through_windows, seq_lens_on
from shift_kernels.call import CallOptions
from shift_kernels.spec import BlockSpec


def forward(
    e: Tensor,
    weights: dict[str, Tensor],
    spec: BlockSpec,
    options: CallOptions,
    for_backward: bool,
    tile: Tile,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """h_T (or all h_t), the loops used [batch]; for a backward, every layer's input in every loop."""
    batch, seq_len, _ = e.shape
    run, lens = Forward.of(e, options, for_backward), seq_lens_on(e, options)
    saved = [e.new_empty(run.most * tile.saves, *e.shape)] if for_backward else []
    packed = pack(weights, spec, tile, seq_len, options.compute_dtype)
    # A tensor that a launch does not read or write still has an argument: any tensor will do.
    resident_forward[(tile.programs(batch, seq_len),)](
        e.contiguous(),
        *packed,
        run.used if run.own_loops is None else run.own_loops,
        run.used if lens is None else lens,
        run.h,
        saved[0] if saved else run.h,
        run.used,
        run.most,
        seq_len,
        batch,
        float(options.halt_threshold or 0.0),
        S=tile,
        own_loops=run.own_loops is not None,
        ragged=lens is not None,
        keep_all=options.return_all_loops,
        save=for_backward,
        halt=options.halt_threshold is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return run.h, run.used, saved


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
    states, grad_h = saved[0], grad_h.contiguous()
    most, programs = len(states) // tile.saves, tile.programs(batch, seq_len)
    own_loops, lens = options.sample_loops(e.device), seq_lens_on(e, options)
    n_grad_loops = most if options.n_grad_loops is None else min(options.n_grad_loops, most)
    packed: Packed = pack(weights, spec, tile, seq_len, options.compute_dtype)
    vectors = packed.vectors.new_zeros(programs, *packed.vectors.shape)
    gradients = ResidentGradients(spec, Widths(tile.d_pad, tile.head_pad, tile.ff_pad), packed.weights)

    def launch(window: Window) -> None:
        resident_backward[(programs,)](
            states,
            grad_h,
            *packed,
            states if own_loops is None else own_loops,
            states if lens is None else lens,
            window.dh,
            window.de,
            vectors,
            *(window.operands.get(name, states) for name in OPERANDS),
            most,
            n_grad_loops,
            window.low,
            window.high,
            seq_len,
            batch,
            S=tile,
            own_loops=own_loops is not None,
            ragged=lens is not None,
            keep_all=options.return_all_loops,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    grad_e = backward_through_windows(grad_h, e, spec, options, most, gradients, launch)
    found = gradients.by_name() | vector_gradients(vectors.sum(0), spec)
    return grad_e, in_order(found, weights)
