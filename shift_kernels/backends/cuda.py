"""The ``cuda`` backend: resident kernels in CUDA C++ (csrc/cuda), all T loops in one launch.

They hold what Triton's registers do not: the residual stream of a program's sequences is in shared memory, on
Hopper that of one sequence in that of several blocks if need be, or in registers (forward up to d_model
256, backward up to 128).
Kept for the backward are the loop boundaries. It computes each loop again and writes the operands of the
weight gradients, which are then one matmul a weight over the rows of many loops.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shift_kernels import compiled
from shift_kernels.backends import cuda_shapes
from shift_kernels.backends.base import SERVED_BY_ALL, Served, WhyNot
from shift_kernels.backends.device import DTYPES, capturing, no_device, on_device_of, why_not
from shift_kernels.backends.weight_gradients import (
    NORM_VECTORS,
    ResidentGradients,
    Widths,
    in_order,
    norm_gradients,
)
from shift_kernels.backends.windows import Forward, Window, backward_through_windows, seq_lens_on
from shift_kernels.call import CallOptions, Problem
from shift_kernels.rotary import rotary_table
from shift_kernels.spec import BlockSpec, spec_from_key
from shift_kernels.torch_internals import constant_for_dynamo

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

RESIDUAL_IN = {"workspace": "in L2", "shared": "in shared memory", "registers": "in registers"}

# Asked once, here, so that torch.compile finds a constant where it traces the choice of a backend.
_LIBRARY: Any
_LIBRARY, _STATUS = compiled.load("_native_cuda")


def runs_on(archs: tuple[str, ...], major: int, minor: int) -> bool:
    """Whether code for these architectures runs on a device of this compute capability."""
    own = 10 * major + minor
    return any(int(arch[3:-1]) == own if arch[-1].isalpha() else int(arch[3:]) <= own for arch in archs)


def _absent() -> str | None:
    """Why this backend cannot be used on this machine, or None."""
    if _LIBRARY is None:
        return _STATUS
    if (reason := no_device(_emulated())) is not None:
        return reason
    if _LIBRARY.driver_is_too_old:
        return "the NVIDIA driver is older than the CUDA toolkit that compiled the library"
    return None


def _emulated() -> bool:
    """Whether the library plays a GPU on the CPU, with CPU tensors: for tests."""
    return _LIBRARY is not None and not _LIBRARY.archs


def _unserved(problem: Problem) -> str | None:
    """Why this backend does not serve a problem that it is meant for, or None."""
    return CudaBackend.served.refusal(problem) or _refusal(
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
        if not runs_on(_LIBRARY.archs, major, minor):
            return f"not compiled for compute capability {major}.{minor}: set CUDA_ARCHS and install again"
    call = sizes(spec_from_key(spec_key), 1, seq_len, dtype, compute_dtype, _limits(device))
    for backward in (False, True)[: 1 + grad]:
        reason = _LIBRARY.reason(_LIBRARY.plan(call, backward=backward))
        if reason is not None:
            return reason
    return None


def _limits(device: torch.device) -> Limits:
    return HOPPER if device.type != "cuda" or not torch.cuda.is_available() else _limits_of(device)


@functools.cache
def _limits_of(device: torch.device) -> Limits:
    properties = torch.cuda.get_device_properties(device)
    most = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    assert _LIBRARY is not None, "checked by the backend's choice"
    sm90a = (properties.major, properties.minor) == (9, 0) and "sm_90a" in _LIBRARY.archs
    return Limits(most, properties.multi_processor_count, sm90a)


def sizes(
    spec: BlockSpec,
    batch: int,
    seq_len: int,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    limits: Limits,
    library: Any = None,
) -> Any:
    """A call as far as the planner reads it, for another library than the installed one if it is given."""
    library = library or _LIBRARY
    return library.Call(
        compiled.block(library, spec),
        batch=batch,
        seq_len=seq_len,
        dtype=_name(dtype),
        compute_dtype=_name(compute_dtype),
        **limits._asdict(),
    )


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Prepared(NamedTuple):
    """What every call of a kind shares."""

    call: Any
    """Sizes and options; to be copied, not written to."""
    plan: Any
    packed_bytes: int
    workspace_bytes: int
    """What the plan says, to a multiple of 256."""
    shape: cuda_shapes.Shape
    """Of the kernel that may be compiled for such calls alone; it may have another plan than that for any."""
    kernel: int
    """That one, or 0: looked up here, once."""
    weights: tuple[str, ...]
    """Names of those that the block has."""
    places: tuple[int, ...]
    """Of every weight in the library's order the place in ``weights``; -1 where the block has none."""


def prepared(
    library: ModuleType,
    spec: BlockSpec,
    shape: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    limits: Limits,
    arch: str,
    *,
    own_loops: bool,
    halting: bool,
    backward: bool,
) -> _Prepared:
    """The planner asked.

    Args:
        shape: batch and seq_len.
        dtypes: of e, and of matmul operands.
        arch: of the device, for kernels compiled for it alone.
    """
    call = sizes(spec, *shape, *dtypes, limits, library)
    call.own_loops, call.halting, call.own_kernel = own_loops, halting, True
    plan = library.plan(call, backward=backward)
    operand = "bf16" if dtypes[1] is torch.bfloat16 else "fp16"
    words = tuple(library.shape(call, plan, backward=backward))
    of = cuda_shapes.Shape(words, "sm_90a" if plan.tiles else arch, operand)
    kernel = cuda_shapes.kernel(of)
    if not kernel:
        call.own_kernel = False
        plan = library.plan(call, backward=backward)
    packed, workspace = (-(-n // 256) * 256 for n in (plan.packed_bytes, plan.workspace_bytes))
    ordered = compiled.weight_names(library, spec.n_layers)
    names = tuple(n for n in ordered if n in spec.weight_shapes())
    places = tuple(names.index(n) if n in names else -1 for n in ordered)
    return _Prepared(call, plan, packed, workspace, of, kernel, names, places)


@functools.lru_cache(maxsize=4096)
def _prepared_on(
    device: torch.device,
    limits: Limits,
    library: ModuleType,
    spec: BlockSpec,
    sizes: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    own_loops: bool,
    halting: bool,
    backward: bool,
) -> _Prepared:
    """The same on a device of these limits: one look for every such call.

    Args:
        sizes: those of e.
    """
    ways = dict(own_loops=own_loops, halting=halting, backward=backward)
    return prepared(library, spec, (sizes[0], sizes[1]), dtypes, limits, _arch(device), **ways)


class _Launch:
    """A call of the library: its plan, what forward and backward share, and the tensors that it reads.

    Weights are packed by each call, not kept from one to the next: whether they have changed cannot be known.
    A write through ``.data``, or by the replay of a CUDA graph, leaves a tensor's version as it was.
    """

    def __init__(
        self, e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, backward: bool
    ) -> None:
        own_loops, halting = isinstance(options.n_loops, Tensor), options.halt_threshold is not None
        dtypes = e.dtype, options.compute_dtype
        limits = _limits_of(e.device) if e.is_cuda else HOPPER
        self.prepared = found = _prepared_on(
            e.device, limits, _LIBRARY, spec, e.shape, dtypes, own_loops, halting, backward
        )
        self.e, self.plan, self.backward = aligned(e), found.plan, backward
        loops, lengths = options.sample_loops(e.device), seq_lens_on(e, options)
        rotary = _rotary(e.shape[1], spec, e.device) if spec.position == "rope" else None
        values = _readable([weights[name] for name in found.weights])
        addresses = [*map(Tensor.data_ptr, values), None]
        self.call = call = found.call.copy()
        call.return_all, call.ragged = options.return_all_loops, lengths is not None
        call.halt_threshold = options.halt_threshold or 0.0
        call.weight_dtype = _name(values[0].dtype)
        call.e = self.e.data_ptr()
        call.weights = [addresses[place] for place in found.places]
        call.loops, call.lengths, call.rotary = _address(loops), _address(lengths), _address(rotary)
        self._alive = loops, lengths, rotary, values
        self._memory: Tensor | None = None

    def run(self) -> None:
        """On e's device and its current stream, with memory that is free again behind the last launch."""
        assert _LIBRARY is not None, "checked by the backend's choice"
        with on_device_of(self.e):
            stream = torch.cuda.current_stream().cuda_stream if self.e.is_cuda else 0
            if self._memory is None:
                self._memory = self._packed(stream)
            _LIBRARY.run(self.call, self.plan, self.backward, stream, self.prepared.kernel)

    def _packed(self, stream: int) -> Tensor:
        """Memory for packed weights, which are packed, and what a launch puts aside."""
        packed, workspace = self.prepared.packed_bytes, self.prepared.workspace_bytes
        memory = torch.empty(packed + workspace + 256, dtype=torch.uint8, device=self.e.device)
        self.call.packed = -(-memory.data_ptr() // 256) * 256
        self.call.workspace = self.call.packed + packed
        _LIBRARY.pack(self.call, self.plan, stream)
        return memory


@functools.cache
def _arch(device: torch.device) -> str:
    """As nvcc names the device's architecture."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "sm_80"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _rotary(seq_len: int, spec: BlockSpec, device: torch.device) -> Tensor:
    """cos and sin, float32. Kept, unless made while a graph is captured: that memory is the graph's."""
    if capturing(device):
        return _rotary_table.__wrapped__(seq_len, spec, device)
    return _rotary_table(seq_len, spec, device)


@functools.cache
def _rotary_table(seq_len: int, spec: BlockSpec, device: torch.device) -> Tensor:
    table = rotary_table(seq_len, spec, device).to(torch.float32).contiguous()
    if device.type == "cuda" and not capturing(device):
        torch.cuda.current_stream(device).synchronize()  # calls on other streams may read it
    return table


def _readable(weights: list[Tensor]) -> list[Tensor]:
    """Of one dtype that the kernels read, float32 where they are of several, and each :func:`aligned`."""
    first, *others = {w.dtype for w in weights}
    if others or first not in DTYPES:
        weights = [w.to(torch.float32) for w in weights]
    fit = [w.data_ptr() % 16 == 0 and w.is_contiguous() for w in weights]
    return weights if all(fit) else [aligned(w) for w in weights]


def aligned(x: Tensor) -> Tensor:
    """Contiguous, and at a multiple of 16 bytes as the kernels' widest loads need: a copy where x is not.

    A view such as ``flat[1:].view(...)`` is contiguous, but at any multiple of its numbers' size.
    """
    if x.is_contiguous() and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _of_problem(p: Problem) -> list[_Prepared]:
    """Of the forward, and of the backward where there is one; all samples have the same number of loops."""
    sizes, dtypes = (p.batch, p.seq_len, p.spec.d_model), (p.dtype, p.compute_dtype)
    limits = _limits(p.device)
    return [
        _prepared_on(p.device, limits, _LIBRARY, p.spec, sizes, dtypes, False, p.halting, backward)
        for backward in (False, True)[: 1 + p.grad]
    ]


class CudaBackend:
    """Resident kernels in CUDA C++; see the top of this file."""

    name, saves = "cuda", True
    served = Served(SERVED_BY_ALL)

    def why_not(self, problem: Problem | None) -> WhyNot | None:
        return why_not(problem, absent=_absent(), emulated=_emulated(), unserved=_unserved)

    def describe(self, problem: Problem) -> str:
        """The tile of a program, of the backward's where there is one, and where it is."""
        assert _LIBRARY is not None, "asked only if available"
        parts: list[str] = []
        for found in _of_problem(problem):
            plan, backward = found.plan, len(parts) > 0
            where = RESIDUAL_IN[plan.residual]
            if plan.split > 1:
                where += f" of {plan.split} programs a sequence"
            parts.append(
                f"{'backward' if backward else 'forward'} {plan.programs} programs of {plan.rows} tokens, "
                f"residual stream {where}, {plan.shared_bytes / 1024:.0f} KiB shared memory, compiled for "
                + ("this shape" if found.kernel else "any shape")
            )
        kernels = "sm_90a" if plan.tiles else "sm_80 and newer"
        return "; ".join([f"resident, all loops in one launch, kernels for {kernels}", *parts])

    def prepare(self, problem: Problem, say: Callable[[str], object]) -> None:
        """Compile the kernels of the problem's shape: far fewer instructions than those for any shape."""
        for found, direction in zip(_of_problem(problem), ("forward", "backward"), strict=False):
            start = time.perf_counter()
            try:
                cuda_shapes.compile_kernel(found.shape)
                seconds = time.perf_counter() - start
                say(f"  cuda    the {direction} for this shape: {seconds:.0f} s to compile")
            except (OSError, RuntimeError) as error:
                say(f"  cuda    no {direction} for this shape, the one for any serves: {error}")
        _prepared_on.cache_clear()

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
        launch, run = _Launch(e, weights, spec, options, False), Forward.of(e, options, for_backward)
        saved = self.saved_like(e, spec, run.most) if for_backward else []
        call = launch.call
        call.most_loops, call.save = run.most, for_backward
        call.out, call.used = run.h.data_ptr(), run.used.data_ptr()
        call.boundaries = _address(saved[0]) if saved else None
        launch.run()
        return run.h, run.used, saved

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
        launch, boundaries, grad_h = _Launch(e, weights, spec, options, True), saved[0], aligned(grad_h)
        call, plan, most = launch.call, launch.plan, len(boundaries)
        boundaries = aligned(boundaries)
        call.most_loops, call.boundaries, call.grad_out = most, boundaries.data_ptr(), grad_h.data_ptr()
        call.n_grad_loops = min(options.n_grad_loops or 0, most)  # 0: all
        vectors = torch.zeros(
            plan.blocks, spec.n_layers + 1, len(NORM_VECTORS), spec.d_model, device=e.device
        )
        call.dv = vectors.data_ptr()
        widths = Widths(spec.d_model, spec.head_dim, plan.ff_pad)
        gradients = ResidentGradients(spec, widths, e.new_empty(0, dtype=options.compute_dtype))

        def run(window: Window) -> None:
            call.low, call.high = window.low, window.high
            call.dh, call.de = window.dh.data_ptr(), window.de.data_ptr()
            for name, x in window.operands.items():
                setattr(call, name, x.data_ptr())
            launch.run()

        grad_e = backward_through_windows(grad_h, e, spec, options, most, gradients, run)
        return grad_e, in_order(gradients.by_name() | norm_gradients(vectors.sum(0), spec), weights)


CUDA = CudaBackend()
