"""The ``triton`` backend: resident kernels, one program a tile of sequences, all T loops in one launch.

Triton itself is imported when a kernel first runs, not with the package.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from shift_kernels.problem import Problem
from shift_kernels.spec import BlockSpec
from shift_kernels.triton import resident_plan

NAME = "triton"
SAVES = True
# Triton's interpreter also serves CPU tensors, by name alone: it is for tests.
DEVICES = ("cuda",)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FOREVER = 2**31 - 1  # more loops than any sample asks for: its own number decides


def unavailable() -> str | None:
    """Why this backend cannot be used on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return "no CUDA device"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(problem: Problem) -> str | None:
    """Why this backend does not serve the problem, or None."""
    if problem.device.type != "cuda" and not (_interpreted() and problem.device.type == "cpu"):
        return f"device {problem.device.type}, not cuda"
    for dtype in (problem.dtype, problem.compute_dtype):
        if dtype not in _DTYPES:
            return f"dtype {str(dtype).removeprefix('torch.')}"
    if problem.grad:
        return "gradients"
    return resident_plan.refusal(problem.spec, problem.seq_len, problem.compute_dtype, grad=problem.grad)


def saved_bytes(problem: Problem) -> int:
    """Bytes kept for the backward pass, per loop: a state for each layer, one more for a loop norm."""
    states = problem.spec.n_layers + problem.spec.loop_norm
    return states * problem.batch * problem.seq_len * problem.spec.d_model * problem.dtype.itemsize


def saved_like(e: Tensor, spec: BlockSpec, n_loops: int) -> list[Tensor]:
    """Empty tensors of the shapes that :func:`forward` saves: every layer's input in every loop."""
    return [e.new_empty(n_loops * (spec.n_layers + spec.loop_norm), *e.shape)]


def forward(
    e: Tensor,
    weights: dict[str, Tensor],
    spec: BlockSpec,
    n_loops: int | Tensor,
    *,
    seq_lens: Tensor | None,
    return_all_loops: bool,
    n_grad_loops: int | None,
    halt_threshold: float | None,
    compute_dtype: torch.dtype | None,
    for_backward: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """h_T (or all h_t), the loops used [batch], and every layer's input in every loop if a backward follows."""
    from shift_kernels.triton.packing import pack
    from shift_kernels.triton.resident_forward import resident_forward

    batch, seq_len, _ = e.shape
    compute_dtype = compute_dtype or e.dtype
    own_loops = isinstance(n_loops, Tensor)
    halts = halt_threshold is not None
    tile = resident_plan.tile(
        spec,
        seq_len,
        batch,
        itemsize=compute_dtype.itemsize,
        pack=not own_loops and not halts,
        precision=_precision(),
        grad=False,
    )
    if isinstance(n_loops, Tensor):
        used = n_loops.to(e.device, torch.int64).clamp(min=0).contiguous()
        # The number of states to return or keep is needed on the host, and only then.
        most = int(used.max()) if return_all_loops or for_backward else _FOREVER
    else:
        used = torch.full((batch,), n_loops, dtype=torch.int64, device=e.device)
        most = n_loops
    loops, used = used, (used.clone() if halts else used)
    h = e.new_empty((most, *e.shape) if return_all_loops else e.shape)
    saved = saved_like(e, spec, most) if for_backward else []
    packed = pack(weights, spec, tile, seq_len, compute_dtype)
    resident_forward[(-(-batch // tile.sequences),)](
        e.contiguous(),
        *packed,
        loops,
        _lengths(seq_lens, loops),
        h,
        saved[0] if saved else h,
        used,
        most,
        seq_len,
        batch,
        float(halt_threshold or 0.0),
        S=tile,
        own_loops=own_loops,
        ragged=seq_lens is not None,
        keep_all=return_all_loops,
        save=for_backward,
        halt=halts,
        num_warps=resident_plan.warps(tile, grad=False),
        num_stages=1,
    )
    return h, used, saved


def _precision() -> str:
    """fp32 matmuls follow torch's own switch."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _lengths(seq_lens: Tensor | None, unused: Tensor) -> Tensor:
    """The lengths on the device; any tensor where there are none, for the kernel's signature."""
    return unused if seq_lens is None else seq_lens.to(unused.device).contiguous()
