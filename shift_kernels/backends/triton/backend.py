"""The ``triton`` backend: resident kernels, one program a tile of sequences, all T loops in one launch.

Where no tile holds the block, the streamed one: a few fused launches a layer around the library's matmuls.
Triton itself is imported when a kernel first runs, not with the package.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from shift_kernels.backends.base import UNVERIFIED, Kind, WhyNot
from shift_kernels.backends.device import matmul_precision, on_device_of
from shift_kernels.backends.triton import resident_plan
from shift_kernels.call import AttentionProblem, CallOptions, Problem, without_pads
from shift_kernels.spec import BlockSpec

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FOREVER = 2**31 - 1  # more loops than any sample asks for: its own number decides


_INSTALLED = importlib.util.find_spec("triton") is not None


def _absent() -> str | None:
    """Why this backend cannot be used on this machine, or None."""
    if not _INSTALLED:
        return "Triton is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return "no CUDA device"
    return None


def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors too: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _foreign_device(device: torch.device) -> str | None:
    if device.type == "cuda" or (_interpreted() and device.type == "cpu"):
        return None
    return f"is for CUDA tensors, not {device.type}"


def _foreign(problem: Problem) -> str | None:
    """Why the problem is of a kind that this backend is not for, or None."""
    device = _foreign_device(problem.device)
    if device is not None:
        return device
    for dtype in (problem.dtype, problem.compute_dtype):
        if dtype not in _DTYPES:
            return f"is for float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def _unserved(problem: Problem) -> str | None:
    """Why this backend does not serve a problem that it is meant for, or None."""
    return resident_plan.unserved(problem.spec)


def _too_large(
    spec: BlockSpec, seq_len: int, compute_dtype: torch.dtype, grad: bool, device: torch.device
) -> str | None:
    """Why no resident tile holds a block, or None."""
    return resident_plan.too_large(spec, seq_len, compute_dtype, grad=grad, capability=_capability(device))


def _capability(device: torch.device) -> int:
    """Major compute capability; a Hopper's where there is no such device (``explain``, the interpreter)."""
    exists = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device)[0] if exists else 9


class WeightGradients:
    """One matmul a weight over all loops and tokens of a launch, summed over launches in fp32."""

    def __init__(self, tile: resident_plan.Tile, packed: Tensor) -> None:
        self.columns = resident_plan.operand_columns(tile)
        self.like = packed
        self.rows = torch.zeros(packed.shape, dtype=torch.float32, device=packed.device)
        self.biases = self.rows.new_zeros(packed.shape[:2])
        # Gradients of the biases of out_proj and linear2.
        self.outputs = [self.rows.new_zeros(len(packed), tile.d_pad) for _ in range(2 if tile.d_ff else 1)]

    def operands(self, tokens: int, *, untouched: bool) -> dict[str, Tensor]:
        """Room for the kernel to write to; zeros where it may leave a sample's loops ``untouched``."""
        make = self.like.new_zeros if untouched else self.like.new_empty
        found = {name: make(len(self.like), tokens, width) for name, width in self.columns.items()}
        return {name: found.get(name, self.like) for name in resident_plan.OPERANDS}

    def add(self, operand: dict[str, Tensor]) -> None:
        first = 0
        pairs = [("dqkv", "xn"), ("o", "dy"), ("dpre", "xn2"), ("act", "dy2")]
        for left, right in pairs[: 2 * len(self.outputs)]:
            taken = slice(first, first + self.columns[left])
            self.rows[:, taken] += operand[left].transpose(1, 2) @ operand[right]
            if left.startswith("d"):
                self.biases[:, taken] += operand[left].sum(1, dtype=torch.float32)
            first = taken.stop
        for total, name in zip(self.outputs, ("dy", "dy2"), strict=False):
            total += operand[name].sum(1, dtype=torch.float32)


def _tile(e: Tensor, spec: BlockSpec, options: CallOptions, *, grad: bool) -> resident_plan.Tile:
    return resident_plan.tile(
        spec,
        e.shape[1],
        e.shape[0],
        itemsize=options.compute_dtype.itemsize,
        # Sequences that end at different times share no program.
        pack=not isinstance(options.n_loops, Tensor) and options.halt_threshold is None,
        precision=matmul_precision(),
        grad=grad,
        capability=_capability(e.device),
    )


def _lengths(seq_lens: Tensor | None, unused: Tensor) -> Tensor:
    """The lengths on the device; any tensor where there are none, for the kernel's signature."""
    return unused if seq_lens is None else seq_lens.to(unused.device).contiguous()


class TritonBackend:
    """Resident or streamed kernels in Triton; see the top of this file."""

    name, saves = "triton", True

    def why_not(self, problem: Problem | None) -> WhyNot | None:
        found = WhyNot.of(Kind.ABSENT, _absent())
        if found is None and problem is not None:
            found = WhyNot.of(Kind.FOREIGN, _foreign(problem)) or WhyNot.of(Kind.UNSERVED, _unserved(problem))
            found = found or UNVERIFIED
        return found

    def describe(self, problem: Problem) -> str:
        """Resident or streamed, and why."""
        too_large = _too_large(
            problem.spec, problem.seq_len, problem.compute_dtype, problem.grad, problem.device
        )
        if too_large is None:
            return "resident, all loops in one launch"
        return f"streamed, a few launches a layer: the resident kernels do not hold {too_large}"

    def saved_bytes(self, problem: Problem) -> int:
        """Bytes kept for the backward pass, per loop: a state for each layer, one more for a loop norm.

        Streamed: the loop's boundary alone.
        """
        streamed = _too_large(
            problem.spec, problem.seq_len, problem.compute_dtype, problem.grad, problem.device
        )
        states = 1 if streamed else problem.spec.n_layers + problem.spec.loop_norm
        return states * problem.batch * problem.seq_len * problem.spec.d_model * problem.dtype.itemsize

    def saved_like(
        self, e: Tensor, spec: BlockSpec, n_loops: int, compute_dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Empty tensors of the shapes that :func:`forward` saves: every layer's input in every loop.

        Streamed: every loop's input alone.
        """
        streamed = _too_large(spec, e.shape[1], compute_dtype or e.dtype, True, e.device)
        return [e.new_empty(n_loops * (1 if streamed else spec.n_layers + spec.loop_norm), *e.shape)]

    def forward(
        self, e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, for_backward: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """h_T (or all h_t), the loops used [batch]; for a backward, every layer's input in every loop."""
        if _too_large(spec, e.shape[1], options.compute_dtype, for_backward, e.device):
            from shift_kernels.backends.triton import streamed as layer

            with on_device_of(e):
                return layer.forward(e, weights, spec, options, for_backward)
        from shift_kernels.backends.triton.packing import pack
        from shift_kernels.backends.triton.resident_forward import resident_forward

        batch, seq_len, _ = e.shape
        tile = _tile(e, spec, options, grad=False)
        own_loops = options.own_loops(e.device)
        # The number of states to return or keep is needed on the host, and only then.
        host = own_loops is None or options.return_all_loops or for_backward
        most = options.most_loops() if host else _FOREVER
        loops = torch.full((batch,), most, device=e.device) if own_loops is None else own_loops
        halts = options.halt_threshold is not None
        used = loops.clone() if halts else loops
        h = e.new_empty((most, *e.shape) if options.return_all_loops else e.shape)
        saved = self.saved_like(e, spec, most, options.compute_dtype) if for_backward else []
        packed = pack(weights, spec, tile, seq_len, options.compute_dtype)
        with on_device_of(e):
            resident_forward[(tile.programs(batch, seq_len),)](
                e.contiguous(),
                *packed,
                loops,
                _lengths(options.seq_lens, loops),
                h,
                saved[0] if saved else h,
                used,
                most,
                seq_len,
                batch,
                float(options.halt_threshold or 0.0),
                S=tile,
                own_loops=own_loops is not None,
                ragged=options.seq_lens is not None,
                keep_all=options.return_all_loops,
                save=for_backward,
                halt=halts,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
        return h, used, saved

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
        if _too_large(spec, e.shape[1], options.compute_dtype, True, e.device):
            from shift_kernels.backends.triton import streamed as layer

            with on_device_of(e):
                return layer.backward(grad_h, e, weights, spec, options, saved)
        from shift_kernels.backends.triton.packing import pack, unpack
        from shift_kernels.backends.triton.resident_backward import resident_backward

        batch, seq_len, _ = e.shape
        n_grad_loops, compute_dtype = options.n_grad_loops, options.compute_dtype
        tile = _tile(e, spec, options, grad=True)
        states = saved[0]
        most = len(states) // tile.saves
        own_loops = options.own_loops(e.device)
        loops = states if own_loops is None else own_loops
        end = 0 if own_loops is not None or n_grad_loops is None else max(most - n_grad_loops, 0)
        programs = tile.programs(batch, seq_len)
        dh = torch.zeros(e.shape, dtype=torch.float32, device=e.device)
        if not options.return_all_loops:
            dh += without_pads(grad_h, options.seq_lens)
        de = torch.zeros_like(dh) if tile.inject else dh
        packed = pack(weights, spec, tile, seq_len, compute_dtype)
        vectors = dh.new_zeros(programs, *packed.vectors.shape)
        grads = WeightGradients(tile, packed.weights)
        step = resident_plan.loops_per_launch(tile, batch * seq_len, compute_dtype.itemsize)
        for high in range(most, end, -step):
            low = max(high - step, end)
            operands = grads.operands((high - low) * batch * seq_len, untouched=own_loops is not None)
            with on_device_of(e):
                resident_backward[(programs,)](
                    states,
                    grad_h.contiguous(),
                    *packed,
                    loops,
                    _lengths(options.seq_lens, loops),
                    dh,
                    de,
                    vectors,
                    *operands.values(),
                    most,
                    most if n_grad_loops is None else n_grad_loops,
                    low,
                    high,
                    seq_len,
                    batch,
                    S=tile,
                    own_loops=own_loops is not None,
                    ragged=options.seq_lens is not None,
                    keep_all=options.return_all_loops,
                    num_warps=tile.warps,
                    num_stages=tile.stages,
                )
            grads.add(operands)
        grad_vectors = vectors.sum(0)
        grad_vectors[: tile.n_layers, : len(grads.outputs)] += torch.stack(grads.outputs, 1)
        if end > 0 and not tile.inject:  # every sample's first loops carry no gradient
            de = torch.zeros_like(de)
        return de.to(e.dtype), unpack(grads.rows, grads.biases, grad_vectors, weights, spec, tile)


TRITON = TritonBackend()


class TritonAttention:
    """Flash attention; see backends/triton/attention.py."""

    name = "triton"

    def why_not(self, problem: AttentionProblem | None) -> WhyNot | None:
        """Absent without Triton or a device; of foreign tensors; unserved dtypes and head_dims."""
        found = WhyNot.of(Kind.ABSENT, _absent())
        if found is None and problem is not None:
            from shift_kernels.backends.triton import attention

            device = _foreign_device(problem.device)
            found = WhyNot.of(Kind.FOREIGN, device) or WhyNot.of(Kind.UNSERVED, attention.unserved(problem))
            found = found or UNVERIFIED
        return found

    def describe(self, problem: AttentionProblem) -> str:
        """In a phrase."""
        return "flash attention, scores on chip"

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, seq_lens: Tensor | None) -> Tensor:
        """As :func:`shift_kernels.attention`, whose checks came before."""
        from shift_kernels.backends.triton import attention_op

        return attention_op.attention(q, k, v, causal=causal, seq_lens=seq_lens)


TRITON_ATTENTION = TritonAttention()
