"""The ``cuda`` backend: resident kernels in CUDA C++ (csrc/cuda), all T loops in one launch.

They hold what Triton's registers do not: the residual stream of a program's sequences is in shared memory, on
Hopper that of one sequence in that of several blocks if need be.
Kept for the backward are the loop boundaries. It computes each loop again and writes the operands of the
weight gradients, which are then one matmul a weight over the rows of many loops.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shift_kernels.backends.base import UNVERIFIED, Kind, WhyNot
from shift_kernels.call import CallOptions, Problem, without_pads
from shift_kernels.native import block, cuda
from shift_kernels.rotary import rotary_table
from shift_kernels.spec import BlockSpec, spec_from_key
from shift_kernels.torch_internals import constant_for_dynamo

OPERAND_BYTES = 512 * 2**20
"""Of weight-gradient operands alive at once: bounds the loops in a launch of the backward."""
LONG = 1024
"""Tokens that no program holds; any longer sequence is refused as one of these."""


class Limits(NamedTuple):
    """What the planner must know of a device."""

    shared_bytes: int
    """Shared memory that a block may use."""
    n_sms: int
    """Multiprocessors."""
    sm90a: bool = False
    """Whether it is an sm_90, and the library has code for sm_90a."""


HOPPER = Limits(227 * 1024, 132)
"""The device taken where there is none."""
_FOREVER = 2**31 - 1  # more loops than any sample asks for: its own number decides

# CallOptions once, here, so that torch.compile finds a constant where it traces the choice of a backend.
_LIBRARY, _STATUS = cuda.load()


def _absent() -> str | None:
    """Why this backend cannot be used on this machine, or None."""
    if _LIBRARY is None:
        return _STATUS
    if not torch.cuda.is_available() and not _emulated():
        return "no CUDA device"
    if _LIBRARY.driver_is_too_old:
        return "the NVIDIA driver is older than the CUDA toolkit that compiled the library"
    return None


def _emulated() -> bool:
    """Whether the library plays a GPU on the CPU, with CPU tensors: for tests."""
    return _LIBRARY is not None and not _LIBRARY.archs


def _foreign(problem: Problem) -> str | None:
    """Why the problem is of a kind that this backend is not for, or None."""
    if problem.device.type != ("cpu" if _emulated() else "cuda"):
        return f"is for CUDA tensors, not {problem.device.type}"
    for dtype in (problem.dtype, problem.compute_dtype):
        if dtype not in cuda.DTYPES:
            return f"is for float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def _unserved(problem: Problem) -> str | None:
    """Why this backend does not serve a problem that it is meant for, or None."""
    return _refusal(
        problem.spec.key,
        _rows(problem.seq_len),
        problem.dtype,
        problem.compute_dtype,
        problem.device,
        problem.grad,
    )


def _rows(seq_len: int) -> int:
    """seq_len to the next multiple of 16, which decides; a number even where torch.compile has a symbol.

    On Hopper programs have no more rows than tokens: there this may refuse what would just fit.
    """
    return next((rows for rows in range(16, LONG, 16) if seq_len <= rows), LONG)


@constant_for_dynamo
def _refusal(
    spec_key: str,
    seq_len: int,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device,
    grad: bool,
) -> str | None:
    """Asks the library, which torch.compile cannot trace."""
    assert _LIBRARY is not None, "asked only if available"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if not _LIBRARY.runs_on(major, minor):
            return f"not compiled for compute capability {major}.{minor}: set CUDA_ARCHS and install again"
    call = sizes(spec_from_key(spec_key), 1, seq_len, dtype, compute_dtype, _limits(device))
    for backward in (False, True)[: 1 + grad]:
        reason = _LIBRARY.reason(_LIBRARY.plan(call, backward=backward))
        if reason is not None:
            return reason
    return None


def _limits(device: torch.device) -> Limits:
    if device.type != "cuda" or not torch.cuda.is_available():
        return HOPPER
    properties = torch.cuda.get_device_properties(device)
    most = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    assert _LIBRARY is not None, "checked by the backend's choice"
    sm90a = (properties.major, properties.minor) == (9, 0) and "sm_90a" in _LIBRARY.archs
    return Limits(most, properties.multi_processor_count, sm90a)


class WeightGradients:
    """One matmul a weight over all loops and tokens of a launch, summed over launches in fp32.

    Args:
        spec: the block.
        ff_pad: the operands' hidden columns.
        like: a tensor of the operands' device and dtype.
    """

    def __init__(self, spec: BlockSpec, ff_pad: int, like: Tensor) -> None:
        self.spec, self.ff_pad, self.like = spec, ff_pad, like
        hidden = 2 if spec.activation == "swiglu" else 1
        d, heads = spec.d_model, spec.n_heads * spec.head_dim
        # By weight: its left operand and its right one. A bias is the sum of the left one's rows.
        self.pairs = {"self_attn.in_proj_": ("dqkv", "xn"), "self_attn.out_proj.": ("dy", "o")}
        self.columns = {"xn": d, "dqkv": spec.qkv_dim, "o": heads, "dy": d}
        if spec.d_ff:
            self.pairs |= {"linear1.": ("dpre", "xn2"), "linear2.": ("dy2", "act")}
            self.columns |= {"xn2": d, "dpre": hidden * ff_pad, "act": ff_pad, "dy2": d}
        zeros = like.new_zeros(spec.n_layers, dtype=torch.float32)
        self.weights = {
            name: zeros.new_zeros(spec.n_layers, self.columns[left], self.columns[right])
            for name, (left, right) in self.pairs.items()
        }
        self.biases = {
            name: zeros.new_zeros(spec.n_layers, self.columns[left]) for name, (left, _) in self.pairs.items()
        }

    def bytes_per_loop(self, tokens: int) -> int:
        """What the operands of one loop take."""
        return self.spec.n_layers * tokens * sum(self.columns.values()) * self.like.itemsize

    def operands(self, rows: int, *, untouched: bool) -> dict[str, Tensor]:
        """Room for the kernel to write to; zeros where it may leave a sample's loops ``untouched``."""
        make = self.like.new_zeros if untouched else self.like.new_empty
        return {name: make(self.spec.n_layers, rows, width) for name, width in self.columns.items()}

    def add(self, operands: dict[str, Tensor]) -> None:
        for name, (left, right) in self.pairs.items():
            self.weights[name] += operands[left].transpose(1, 2) @ operands[right]
            self.biases[name] += operands[left].sum(1, dtype=torch.float32)

    def by_name(self) -> dict[str, Tensor]:
        """Every weight's and bias's gradient, without the padding of hidden columns."""
        d_ff = self.spec.d_ff
        found: dict[str, Tensor] = {}
        for name in self.pairs:
            w, b = self.weights[name], self.biases[name]
            if name == "linear1.":
                w = w.unflatten(1, (-1, self.ff_pad))[:, :, :d_ff].flatten(1, 2)
                b = b.unflatten(1, (-1, self.ff_pad))[..., :d_ff].flatten(1)
            if name == "linear2.":
                w = w[..., :d_ff]
            for i in range(self.spec.n_layers):
                found |= {f"layers.{i}.{name}weight": w[i], f"layers.{i}.{name}bias": b[i]}
        return found


def _norms(vectors: Tensor, spec: BlockSpec) -> dict[str, Tensor]:
    """The norms' gradients by name, from [n_layers + 1, 8, d_model]."""
    found = {
        f"layers.{i}.{name}": vectors[i, j]
        for i in range(spec.n_layers)
        for j, name in enumerate(block.NORM_WEIGHTS)
    }
    return found | {"loop_norm.weight": vectors[-1, 0], "loop_norm.bias": vectors[-1, 1]}


def sizes(
    spec: BlockSpec,
    batch: int,
    seq_len: int,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    limits: Limits | tuple[int, int],
) -> cuda.Call:
    """A call as far as the planner reads it."""
    return cuda.Call(
        batch=batch,
        seq_len=seq_len,
        dtype=cuda.DTYPES.index(dtype),
        compute_dtype=cuda.DTYPES.index(compute_dtype),
        **Limits(*limits)._asdict(),
        **block.options(spec),
    )


def _call(
    e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, loops: Tensor | None
) -> tuple[cuda.Call, Sequence[object]]:
    """The part of a call that forward and backward share, and what must live as long as it."""
    batch, seq_len, _ = e.shape
    lengths = None if options.seq_lens is None else options.seq_lens.to(e.device, torch.int64).contiguous()
    rotary = None
    if spec.position == "rope":
        rotary = rotary_table(seq_len, spec, e.device).to(torch.float32).contiguous()
    e = e.contiguous()
    weight_dtype = _common_dtype(weights)
    values = {name: w.to(weight_dtype).contiguous() for name, w in weights.items()}
    addresses = block.addresses(values, spec)
    call = sizes(spec, batch, seq_len, e.dtype, options.compute_dtype, _limits(e.device))
    call.return_all, call.n_grad_loops = options.return_all_loops, options.n_grad_loops or 0
    call.own_loops, call.ragged = loops is not None, lengths is not None
    call.weight_dtype = cuda.DTYPES.index(weight_dtype)
    call.e, call.weights = e.data_ptr(), ctypes.addressof(addresses)
    call.loops, call.lengths, call.rotary = map(_address, (loops, lengths, rotary))
    return call, (e, loops, lengths, rotary, values, addresses)


def _common_dtype(weights: dict[str, Tensor]) -> torch.dtype:
    """The weights' dtype as they are, where the kernels read it and all have the same; else float32."""
    found = {w.dtype for w in weights.values()}
    (first, *others) = found
    return torch.float32 if others or first not in cuda.DTYPES else first


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _run(call: cuda.Call, e: Tensor, *, backward: bool) -> None:
    """Launch on e's device and its current stream, with a workspace that is free again behind the launch."""
    assert _LIBRARY is not None, "checked by the backend's choice"
    align = 256
    size = _LIBRARY.plan(call, backward=backward).workspace_bytes
    workspace = torch.empty(size + align, dtype=torch.uint8, device=e.device)
    call.workspace = -(-workspace.data_ptr() // align) * align
    on_device: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if e.is_cuda:
        on_device = torch.cuda.device(e.device)
    with on_device:
        stream = torch.cuda.current_stream().cuda_stream if e.is_cuda else 0
        _LIBRARY.run(call, backward=backward, stream=stream)


class CudaBackend:
    """Resident kernels in CUDA C++; see the top of this file."""

    name, saves = "cuda", True

    def why_not(self, problem: Problem | None) -> WhyNot | None:
        found = WhyNot.of(Kind.ABSENT, _absent())
        if found is None and problem is not None:
            found = WhyNot.of(Kind.FOREIGN, _foreign(problem)) or WhyNot.of(Kind.UNSERVED, _unserved(problem))
            found = found or UNVERIFIED
        return found

    def describe(self, problem: Problem) -> str:
        """The tile of a program, of the backward's where there is one, and where it is."""
        assert _LIBRARY is not None, "asked only if available"
        p = problem
        call = sizes(p.spec, p.batch, p.seq_len, p.dtype, p.compute_dtype, _limits(p.device))
        parts = []
        for backward in (False, True)[: 1 + p.grad]:
            plan = _LIBRARY.plan(call, backward=backward)
            where = "in shared memory" if plan.tile_in_shared else "in L2"
            if plan.split > 1:
                where += f" of {plan.split} programs a sequence"
            parts.append(
                f"{'backward' if backward else 'forward'} {plan.programs} programs of {plan.rows} tokens, "
                f"residual stream {where}, {plan.shared_bytes / 1024:.0f} KiB shared memory"
            )
        return "; ".join(["resident, all loops in one launch", *parts])

    def saved_bytes(self, problem: Problem) -> int:
        """Bytes kept for the backward pass, per loop: its boundary."""
        return problem.batch * problem.seq_len * problem.spec.d_model * problem.dtype.itemsize

    def saved_like(
        self, e: Tensor, spec: BlockSpec, n_loops: int, compute_dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Empty tensors of the shapes that :func:`forward` saves: h_0 .. h_{T-1}."""
        return [e.new_empty(n_loops, *e.shape)]

    def forward(
        self, e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, for_backward: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """h_T (or all h_t), the loops used [batch]; for a backward, the loop boundaries."""
        loops = options.own_loops(e.device)
        # The number of states to return or keep is needed on the host, and only then.
        host = loops is None or options.return_all_loops or for_backward
        most = options.most_loops() if host else _FOREVER
        halts = options.halt_threshold is not None
        used = (
            torch.full((len(e),), most, device=e.device)
            if loops is None
            else loops.clone()
            if halts
            else loops
        )
        out = e.new_empty((most, *e.shape) if options.return_all_loops else e.shape)
        saved = self.saved_like(e, spec, most) if for_backward else []
        call, keep = _call(e, weights, spec, options, loops)
        call.most_loops, call.save = most, for_backward
        call.halting, call.halt_threshold = halts, options.halt_threshold or 0.0
        call.out, call.used = out.data_ptr(), used.data_ptr()
        call.boundaries = saved[0].data_ptr() if saved else None
        _run(call, e, backward=False)
        del keep
        return out, used, saved

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
        assert _LIBRARY is not None, "checked by the backend's choice"
        loops, n_grad_loops = options.own_loops(e.device), options.n_grad_loops
        boundaries, grad_h = saved[0], grad_h.contiguous()
        most, tokens = len(boundaries), e.shape[0] * e.shape[1]
        call, keep = _call(e, weights, spec, options, loops)
        call.most_loops, call.boundaries, call.grad_out = most, boundaries.data_ptr(), grad_h.data_ptr()
        plan = _LIBRARY.plan(call, backward=True)
        dh = torch.zeros(e.shape, dtype=torch.float32, device=e.device)
        if not options.return_all_loops:
            dh += without_pads(grad_h, options.seq_lens)
        de = torch.zeros_like(dh) if spec.injection == "add" else dh
        vectors = dh.new_zeros(plan.programs, spec.n_layers + 1, len(block.NORM_WEIGHTS), spec.d_model)
        call.dh, call.de, call.dv = dh.data_ptr(), de.data_ptr(), vectors.data_ptr()
        grads = WeightGradients(spec, plan.ff_pad, e.new_empty(0, dtype=options.compute_dtype))
        step = max(1, OPERAND_BYTES // grads.bytes_per_loop(tokens))
        # Where samples have loops of their own, nobody knows here which are the last k of each.
        end = 0 if loops is not None or n_grad_loops is None else max(most - n_grad_loops, 0)
        for high in range(most, end, -step):
            call.low, call.high = max(high - step, end), high
            operands = grads.operands((high - call.low) * tokens, untouched=loops is not None)
            for name, x in operands.items():
                setattr(call, name, x.data_ptr())
            _run(call, e, backward=True)
            grads.add(operands)
        del keep
        if end > 0 and spec.injection != "add":  # every sample's first loops carry no gradient
            de = torch.zeros_like(de)
        found = grads.by_name() | _norms(vectors.sum(0), spec)
        return de.to(e.dtype), [found[name].to(w.dtype) for name, w in weights.items()]


CUDA = CudaBackend()
