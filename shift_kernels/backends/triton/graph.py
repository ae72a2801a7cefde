"""A step that is launched again and again on the same memory: as a CUDA graph where that is asked for.

A loop body of the streamed layer is about a dozen launches; as a graph it is one. Capturing waits for the
device once a call, so it pays only for many loops: ``SHIFT_KERNELS_GRAPHS=1`` turns it on.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

_WORTH = 4  # loops below which capturing a body costs more than launching it


def wanted(device: torch.device, n_loops: int) -> bool:
    """Whether a body that runs ``n_loops`` times on this device should become a graph."""
    return (
        device.type == "cuda"
        and n_loops >= _WORTH
        and os.environ.get("SHIFT_KERNELS_GRAPHS") == "1"
        and not torch.cuda.is_current_stream_capturing()  # the caller makes a graph of us already
    )


class Repeated:
    """Calls ``step``; if ``graphed``, only the first two times, and replays what the second one launched.

    Args:
        step: launches work that reads and writes the same memory every time.
        graphed: see :func:`wanted`.
    """

    def __init__(self, step: Callable[[], object], graphed: bool) -> None:
        self.step, self.graphed = step, graphed
        self.warm = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self.graphed or not self.warm:
            self.step()  # the first call compiles kernels and makes workspaces, which no capture may
            self.warm = True
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step()  # recorded, not run
            self.graph = graph
        self.graph.replay()
