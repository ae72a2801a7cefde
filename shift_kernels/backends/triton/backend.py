"""The ``triton`` backend: resident kernels, one program a tile of sequences, all T loops in one launch.

Where no tile holds the block, the streamed one: a few fused launches a layer around the library's matmuls.
Triton itself is imported when a kernel first runs, not with the package.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from shift_kernels.backends.base import SERVED_BY_ALL, UNVERIFIED, Kind, Served, WhyNot
from shift_kernels.backends.device import (
    foreign_device,
    matmul_precision,
    no_device,
    on_device_of,
    why_not,
)
from shift_kernels.backends.triton import resident_plan
from shift_kernels.backends.triton.resident_plan import HOPPER, Chip
from shift_kernels.call import AttentionProblem, CallOptions, Problem
from shift_kernels.spec import ACTIVATIONS, BlockSpec

_INSTALLED = importlib.util.find_spec("triton") is not None


def _absent() -> str | None:
    """Why this backend cannot be used on this machine, or None."""
    if not _INSTALLED:
        return "Triton is not installed"
    return no_device(_interpreted())


def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors too: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unserved(problem: Problem) -> str | None:
    """Why this backend does not serve a problem that it is meant for, or None."""
    refused = TritonBackend.served.refusal(problem) or resident_plan.unserved(problem.spec)
    return refused or _too_old(problem.device)


def _chip(device: torch.device) -> Chip:
    """What the planner asks of a device; a Hopper where there is none (``explain``, the interpreter)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return HOPPER
    found = torch.cuda.get_device_properties(device)
    return Chip(10 * found.major + found.minor, found.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _too_old(device: torch.device) -> str | None:
    """Why no kernel here runs on a device, or None."""
    sm = _chip(device).sm
    return None if sm >= 80 else f"sm_{sm}: the kernels need compute capability 8.0 (sm_80) or later"


def _too_large(problem: Problem) -> str | None:
    """Why no resident tile holds a block, or None."""
    return resident_plan.too_large(
        problem.spec,
        problem.seq_len,
        problem.compute_dtype,
        grad=problem.grad,
        chip=_chip(problem.device),
    )


def _tile(
    e: Tensor, spec: BlockSpec, options: CallOptions, *, training: bool, backward: bool = False
) -> resident_plan.Tile | None:
    """The tile of a call's kernel, planned once for every such call; None: streamed."""
    return resident_plan.plan(
        spec,
        e.shape[1],
        e.shape[0],
        compute_dtype=options.compute_dtype,
        # Sequences that end at different times share no program.
        pack=not isinstance(options.n_loops, Tensor) and options.halt_threshold is None,
        precision=matmul_precision(),
        training=training,
        backward=backward,
        chip=_chip(e.device),
    )


class TritonBackend:
    """Resident or streamed kernels in Triton; see the top of this file."""

    name, saves = "triton", True
    served = Served({**SERVED_BY_ALL, "activation": ACTIVATIONS})

    def why_not(self, problem: Problem | None) -> WhyNot | None:
        return why_not(problem, absent=_absent(), emulated=_interpreted(), unserved=_unserved)

    def describe(self, problem: Problem) -> str:
        """Resident or streamed, and why."""
        too_large = _too_large(problem)
        if too_large is None:
            return "resident, all loops in one launch"
        return f"streamed, a few launches a layer: the resident kernels do not hold {too_large}"

    def saved_bytes(self, problem: Problem) -> int:
        """Bytes kept for the backward, per loop: the loop's input; resident, every half layer's."""
        states = resident_plan.states(problem.spec) if _too_large(problem) is None else 1
        return states * problem.batch * problem.seq_len * problem.spec.d_model * problem.dtype.itemsize

    def saved_like(
        self, e: Tensor, spec: BlockSpec, n_loops: int, compute_dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Empty tensors of the shapes that :func:`forward` saves."""
        problem = Problem(
            spec, e.shape[0], e.shape[1], e.dtype, compute_dtype or e.dtype, e.device, grad=True
        )
        if _too_large(problem) is not None:
            return [e.new_empty(n_loops, *e.shape)]
        from shift_kernels.backends.triton import resident

        return resident.saved_like(e, spec, n_loops, problem.compute_dtype)

    def forward(
        self, e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, for_backward: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """h_T (or all h_t), the loops used [batch]; for a backward, the states of every loop."""
        tile = _tile(e, spec, options, training=for_backward)
        with on_device_of(e):
            if tile is None:
                from shift_kernels.backends.triton import streamed

                return streamed.forward(e, weights, spec, options, for_backward)
            from shift_kernels.backends.triton import resident

            return resident.forward(e, weights, spec, options, for_backward, tile)

    def backward(
        self,
        grad_h: Tensor,
        e: Tensor,
        weights: dict[str, Tensor],
        spec: BlockSpec,
        options: CallOptions,
        saved: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of e and of the weights, in the order of ``weights``. The same bits every time."""
        tile = _tile(e, spec, options, training=True, backward=True)
        with on_device_of(e):
            if tile is None:
                from shift_kernels.backends.triton import streamed

                return streamed.backward(grad_h, e, weights, spec, options, saved)
            from shift_kernels.backends.triton import resident

            return resident.backward(grad_h, e, weights, spec, options, saved, tile)


TRITON = TritonBackend()


class TritonAttention:
    """Flash attention; see backends/triton/attention.py."""

    name = "triton"

    def why_not(self, problem: AttentionProblem | None) -> WhyNot | None:
        """Absent without Triton or a device; of foreign tensors; unserved dtypes and head_dims."""
        found = WhyNot.of(Kind.ABSENT, _absent())
        if found is None and problem is not None:
            from shift_kernels.backends.triton import attention

            foreign = foreign_device(problem.device, _interpreted())
            unserved = foreign or attention.unserved(problem) or _too_old(problem.device)
            found = WhyNot.of(Kind.FOREIGN, foreign) or WhyNot.of(Kind.UNSERVED, unserved) or UNVERIFIED
        return found

    def describe(self, problem: AttentionProblem) -> str:
        """In a phrase."""
        return "flash attention, scores on chip"

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, seq_lens: Tensor | None) -> Tensor:
        """As :func:`shift_kernels.attention`, whose checks came before."""
        from shift_kernels.backends.triton import attention_op

        return attention_op.attention(q, k, v, causal=causal, seq_lens=seq_lens)


TRITON_ATTENTION = TritonAttention()
