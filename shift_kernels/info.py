"""What is installed here and which backends work: what to paste into a bug report."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import numpy as np
import torch

import shift_kernels
from shift_kernels import compiled
from shift_kernels.console import command
from shift_kernels.machine import version_of

MOST_LINES = 30
"""Of what a compiler said, the last ones."""


def report() -> str:
    """Versions, devices and backends, one fact a line; and what the compiler said of what was not built."""
    rows = [
        ("shift_kernels", shift_kernels.__version__),
        ("python", sys.version.split()[0]),
        ("platform", platform.platform()),
        ("torch", torch.__version__),
        ("numpy", np.__version__),
        ("triton", version_of("triton")),
        ("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
        ("cuda", _cuda()),
        ("cpu library", compiled.load("_native")[1]),
        ("cuda library", compiled.load("_native_cuda")[1]),
    ]
    rows += [(f"backend {name}", status) for name, status in shift_kernels.backends().items()]
    lines = [f"{name:<21}{value}" for name, value in rows]
    for name in ("_native", "_native_cuda"):
        words = compiled.reason(name).splitlines()[-MOST_LINES:]
        lines += [f"why there is no {name}:", *(f"  {line}" for line in words)] if words else []
    return "\n".join(lines)


@command("shift-info")
def main(argv: Sequence[str] | None = None) -> int:
    """``shift-info``, also ``python -m shift_kernels``."""
    argparse.ArgumentParser("shift-info", description=__doc__).parse_args(argv)
    print(report())
    return 0


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device" if torch.version.cuda else "no device (torch is a CPU build)"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}, {', '.join(names)}"


if __name__ == "__main__":
    sys.exit(main())
