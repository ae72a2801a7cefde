"""The ``torch_graph`` backend: what ``torch`` launches in a call, recorded once and replayed as a CUDA graph.

    forward    copy the inputs to where the recording reads  ->  replay T loops  ->  copy h_T out
    backward   the same of a recording that runs the loops again under autograd

Nothing of a recording belongs to one call, so forwards and backwards may come in any order and number. All
recordings of a device share their memory, and run one after the other on a stream of their own.

``auto`` takes it only where it was measured on the device. It has never run on one: tests record otherwise.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from shift_kernels.backends.base import UNVERIFIED, Kind, Served, WhyNot
from shift_kernels.backends.cpu import CPU
from shift_kernels.backends.device import capturing, foreign_device, matmul_precision, no_device
from shift_kernels.backends.torch import TORCH
from shift_kernels.call import CallOptions, Problem
from shift_kernels.spec import BlockSpec

Step = Callable[[], Sequence[Tensor]]
Function = Callable[[list[Tensor]], Sequence[Tensor]]
MOST_RECORDINGS = 32
"""Kept at a time, the last used ones: one a direction, shape and T."""
WARM_UPS = 3
"""Steps before a recording, in which libraries make their workspaces."""


class Recorder(Protocol):
    """Records launches."""

    def alone(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """What is launched within waits for all launched before, and what is launched later waits for it."""

    def record(self, step: Step, device: torch.device) -> tuple[Callable[[], object], Sequence[Tensor]]:
        """What launches the step's work again, and its results, which that overwrites. Call it alone."""


class CudaGraphs:
    """A :class:`Recorder` of CUDA graphs."""

    def __init__(self) -> None:
        self._of: dict[torch.device, tuple[torch.cuda.Stream, Any]] = {}  # stream and memory pool

    @contextlib.contextmanager
    def alone(self, device: torch.device) -> Iterator[None]:
        if device not in self._of:
            self._of[device] = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        callers, own = torch.cuda.current_stream(device), self._of[device][0]
        own.wait_stream(callers)
        try:
            with torch.cuda.stream(own):
                yield
        finally:
            callers.wait_stream(own)

    def record(self, step: Step, device: torch.device) -> tuple[Callable[[], object], Sequence[Tensor]]:
        stream, pool = self._of[device]
        for _ in range(WARM_UPS):
            step()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may ask the driver for anything meanwhile, such as pinned memory.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            results = step()
        return graph.replay, results


class _Recording:
    """A function of tensors, recorded on memory of its own."""

    def __init__(self, run: Function, inputs: list[Tensor], recorder: Recorder) -> None:
        self._recorder, self._device = recorder, inputs[0].device
        # What is made in inference mode could not be written to outside of it.
        with recorder.alone(self._device), torch.inference_mode(False), torch.no_grad():
            self._inputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
            torch._foreach_copy_(self._inputs, inputs)
            self._replay, self._results = recorder.record(lambda: run(self._inputs), self._device)

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        results = [torch.empty_like(x) for x in self._results]  # of the caller's stream
        with self._recorder.alone(self._device):
            torch._foreach_copy_(self._inputs, inputs)
            self._replay()
            for result, x in zip(results, self._results, strict=True):
                result.copy_(x)
        return results


class TorchGraphBackend:
    """See the top of this file."""

    name, saves = "torch_graph", False
    served = Served({name: values for name, values in CPU.served.block.items() if name != "rope_freqs"})

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._lock = threading.Lock()  # a recording's inputs are one call's until its results are copied

    def why_not(self, problem: Problem | None) -> WhyNot | None:
        """Absent without a device; for what launches the same kernels in every call."""
        found = WhyNot.of(Kind.ABSENT, no_device(False))
        if found is None and problem is not None:
            foreign = foreign_device(problem.device, False) or _foreign(problem)
            found = WhyNot.of(Kind.FOREIGN, foreign) or UNVERIFIED
        return found

    def describe(self, problem: Problem) -> str:
        """In a phrase."""
        return "plain PyTorch, replayed as a CUDA graph; calls with a tensor of lengths or loops as 'torch'"

    def saved_bytes(self, problem: Problem) -> int:
        """None: the backward runs the loops again."""
        return 0

    def saved_like(
        self, e: Tensor, spec: BlockSpec, n_loops: int, compute_dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Nothing."""
        return []

    def forward(
        self, e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, for_backward: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """h_T (or all h_t), the loops used, and nothing."""

        names = tuple(weights)

        def run(inputs: list[Tensor]) -> Sequence[Tensor]:
            e, *rest = inputs
            return TORCH.forward(e, dict(zip(names, rest, strict=True)), spec, options, for_backward)[:2]

        h, used = self._run("forward", run, [e, *weights.values()], spec, options)
        return h, used, []

    def backward(
        self,
        grad_h: Tensor,
        e: Tensor,
        weights: dict[str, Tensor],
        spec: BlockSpec,
        options: CallOptions,
        saved: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of e and of the weights, in the order of ``weights``."""

        names = tuple(weights)

        def run(inputs: list[Tensor]) -> Sequence[Tensor]:
            grad_h, e, *rest = inputs
            named = dict(zip(names, rest, strict=True))
            grad_e, grads = TORCH.backward(grad_h, e, named, spec, options, [])
            return grad_e, *grads

        grad_e, *grads = self._run("backward", run, [grad_h, e, *weights.values()], spec, options)
        return grad_e, grads

    def _run(
        self,
        direction: str,
        run: Function,
        inputs: list[Tensor],
        spec: BlockSpec,
        options: CallOptions,
    ) -> Sequence[Tensor]:
        """What ``run`` gives for these inputs, by the recording of such a call, made where there is none."""
        inputs = [x.detach() for x in inputs]
        settings = tuple(options.keywords().values())
        if capturing(inputs[0].device) or any(isinstance(value, Tensor) for value in settings):
            return run(inputs)
        shapes = tuple((x.shape, x.dtype, x.device) for x in inputs)
        key = direction, spec, settings, shapes, _switches()
        with self._lock:
            if key not in self._recordings:
                self._recordings[key] = _Recording(run, inputs, self._recorder)
                if len(self._recordings) > MOST_RECORDINGS:
                    self._recordings.popitem(last=False)
            self._recordings.move_to_end(key)
            return self._recordings[key](inputs)


def _switches() -> tuple[object, ...]:
    """Torch's own, by which it chooses the kernels that are recorded."""
    attention = torch.backends.cuda
    return (
        matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        attention.flash_sdp_enabled(),
        attention.mem_efficient_sdp_enabled(),
        attention.cudnn_sdp_enabled(),
        attention.math_sdp_enabled(),
    )


def _foreign(problem: Problem) -> str | None:
    """Why no graph holds a call, or None: it waits for the host, or copies from it."""
    if problem.halting or problem.cache_dtype is not None:
        return "is for calls without a cache and halt_threshold"
    return TorchGraphBackend.served.refusal(problem)


TORCH_GRAPH = TorchGraphBackend(CudaGraphs())
