"""A device that is none, for ``rehearse.sh``: Triton's interpreter, emulated CUDA, the CPU's clock.

It tries the scripts: stages, processes, rows, the report. What others stand in for meets hardware untried:

    nvcc and what it builds          the emulated library of tests/cuda_emulation
    Triton's compiler, its launcher  its interpreter; tests/kernels/test_triton_launch.py has these two
    events, graphs, memory           the CPU's clock, the call itself, no bytes
    Inductor                         torch.compile's backend aot_eager
    flex attention's backward        that of PyTorch's attention
    compute-sanitizer                a script that runs what it is given
    a process for each batch         a forked one for all of a stage
    sizes, lists of cases            tiny ones; two of the tests with marker gpu

Each place asks ``work.rehearsing()``.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


class Fake:
    """The CPU, in the place of a CUDA device."""

    name, torch = "Rehearsal (no GPU)", "cpu"

    def synchronize(self) -> None:
        pass

    def milliseconds(self, step: Callable[[], object]) -> float:
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)

    def on_side_stream(self, step: Callable[[], object], calls: int) -> None:
        step()

    def graphed(self, step: Callable[[], object]) -> Callable[[], object]:
        return step

    def allocated(self) -> int:
        return 0

    def peak(self) -> int:
        return 0

    def release(self) -> None:
        pass


class Forked:
    """A child process of a rehearsal, which shares what takes seconds to import with all the others.

    It is to the parent what a :class:`subprocess.Popen` is, with a session of its own.
    """

    def __init__(self, run: Callable[..., int], arguments: Sequence[str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.gpu.rehearsed"])
        self.process = context.Process(target=_in_a_session, args=(run, arguments, log))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode


def _in_a_session(run: Callable[..., int], arguments: Sequence[str], log: Path) -> None:
    """What a forked child does: all that it prints goes to the log."""
    os.setsid()
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(run(*arguments))


@functools.cache
def install() -> None:
    """Let the triton and cuda backends serve CPU tensors in this process; before any kernel is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "tests"))
    import triton_interpreter  # noqa: F401
    from cuda_emulation import LIBRARY, emulated

    from shift_kernels import compiled
    from shift_kernels.backends import cuda as cuda_backend

    _let_flex_have_gradients()
    library, _ = compiled.load("_native_cuda", Path(emulated(*LIBRARY).library._name))
    cuda_backend._LIBRARY = library  # type: ignore[attr-defined]


def _let_flex_have_gradients() -> None:
    """Flex attention has no backward on a CPU: there the library's attention stands in for it."""
    from torch.nn.attention import flex_attention as module
    from torch.nn.functional import scaled_dot_product_attention

    forward = module.flex_attention

    def flex_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        out = forward(q.detach(), k.detach(), v.detach(), **options)
        theirs = scaled_dot_product_attention(q, k, v)
        return out + theirs - theirs.detach()

    module.flex_attention = flex_attention  # type: ignore[assignment]
