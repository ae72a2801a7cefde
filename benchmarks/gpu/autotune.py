"""max-autotune of torch.compile, timed as bench.py times the others. It takes minutes a shape.

It times while it compiles, so that each case has the device for itself.
"""

from __future__ import annotations

from benchmarks.gpu import bench
from benchmarks.gpu.cases import AUTOTUNED, BLOCKS, DIRECTIONS
from benchmarks.gpu.work import Case, Finding, Group


def groups() -> list[Group]:
    """All blocks, in one process."""
    cases = [bench.timing(case, AUTOTUNED, d, stage="autotune") for case in BLOCKS for d in DIRECTIONS]
    return [Group([cases])]


def run(case: Case) -> Finding:
    """As bench's."""
    return bench.run(case)
