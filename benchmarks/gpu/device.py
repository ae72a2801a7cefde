"""What the stages ask of the device: its name, clock, memory and graphs. A rehearsal's is in rehearsal.py."""

from __future__ import annotations

import gc
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from benchmarks.gpu.work import rehearsing

ROUNDS = (10, 200)
"""Fewest and most timed calls."""
ROOFLINES = {"NVIDIA H100 80GB HBM3": (989.0, 3.35), "NVIDIA H200": (989.0, 4.8)}
"""Dense bf16 TFLOP/s and device memory's TB/s, of the vendor's data sheets (SXM parts), by torch's name."""


class Device(Protocol):
    """Where the cases run."""

    name: str
    """As torch tells it."""
    torch: str
    """What tensors' ``device=`` takes."""

    def synchronize(self) -> None:
        """Wait for all that was launched; raises what went wrong."""

    def milliseconds(self, step: Callable[[], object]) -> float:
        """Of one call."""

    def on_side_stream(self, step: Callable[[], object], calls: int) -> None:
        """Warm up as a capture wants it."""

    def graphed(self, step: Callable[[], object]) -> Callable[[], object]:
        """A replay of the call, which has been warmed up on a side stream."""

    def allocated(self) -> int:
        """Bytes of tensors."""

    def peak(self) -> int:
        """The most bytes of tensors so far."""

    def release(self) -> None:
        """Give back what an earlier case left in caches."""


class Cuda:
    """The first CUDA device."""

    torch = "cuda"

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def milliseconds(self, step: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def on_side_stream(self, step: Callable[[], object], calls: int) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(calls):
                step()
        torch.cuda.synchronize()

    def graphed(self, step: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def here() -> Device:
    """The device of this process."""
    if rehearsing():
        from benchmarks.gpu.rehearsal import Fake

        return Fake()
    return Cuda()


def exists() -> bool:
    """Whether there is a device to run on."""
    return rehearsing() or torch.cuda.is_available()


def machine() -> dict[str, Any]:
    """Facts for the head of a report."""
    facts = dict(device=here().name, python=platform.python_version(), torch=torch.__version__)
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = "none"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]):
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=60)
            facts["driver"] = (done.stdout.splitlines() or ["unknown"])[0]
        except subprocess.TimeoutExpired:
            facts["driver"] = "unknown: nvidia-smi hangs"
    return facts


def times(device: Device, step: Callable[[], object], seconds: float) -> list[float]:
    """Times of calls in ms: for so many seconds, but at least and at most :data:`ROUNDS` calls."""
    found: list[float] = []
    start = time.monotonic()
    fewest, most = (1, 1) if rehearsing() else ROUNDS
    while len(found) < fewest or (len(found) < most and time.monotonic() - start < seconds):
        found.append(device.milliseconds(step))
    return found


def floor_ms(device: Device, flops: float, n_bytes: float) -> float | None:
    """The roofline's time: arithmetic or traffic, whichever takes longer; None on an unknown device."""
    if device.name not in ROOFLINES:
        return None
    tflops, terabytes = ROOFLINES[device.name]
    return max(flops / tflops, n_bytes / terabytes) / 1e9
