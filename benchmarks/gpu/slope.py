"""Time against the number of loops: ``python -m benchmarks.gpu.slope CASE...``, a JSON line a runner.

The slope is what a loop costs, the intercept all else. A resident block moves no activations between loops:
its slope may be less than one reading and writing of the residual stream (``stream_ms``), which no
implementation that keeps it in device memory can undercut.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import torch

from benchmarks.gpu.bench import floor_ms, measure, times
from benchmarks.gpu.cases import CASES, Block
from benchmarks.gpu.table import median

N_LOOPS = (1, 2, 4, 8, 16)
RUNNERS = ("cuda", "triton", "eager", "compile")


def fit(n_loops: list[int], ms: list[float]) -> tuple[float, float]:
    """Slope and intercept of the line with the least squares of errors."""
    n, t = torch.tensor(n_loops, dtype=torch.float64), torch.tensor(ms, dtype=torch.float64)
    slope = ((n - n.mean()) * (t - t.mean())).sum() / (n - n.mean()).square().sum()
    return float(slope), float(t.mean() - slope * n.mean())


def stream_ms(case: Block) -> float:
    """Time of copying the residual stream once, in bf16, at the rate of a copy that no cache holds."""
    x = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    numbers = case.batch * case.seq_len * case.d_model
    return median(times(lambda: y.copy_(x))) * numbers / x.numel()


def main() -> None:
    for name in sys.argv[1:]:
        case = CASES[name]
        assert isinstance(case, Block), name
        stream, cases = stream_ms(case), [dataclasses.replace(case, n_loops=n) for n in N_LOOPS]
        for runner in RUNNERS:
            line = dict(case=name, runner=runner, n_loops=N_LOOPS, stream_ms=stream, error=None)
            try:
                ms = [median(measure(c, runner, "forward")[0]) for c in cases]
                slope, intercept = fit(list(N_LOOPS), ms)
                line |= dict(ms=ms, slope_ms=slope, intercept_ms=intercept)
            except Exception as error:  # one runner's failure is a line, not the end of the others
                line["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            print(json.dumps(line | {"floor_ms": floor_ms(cases[0], "forward")}), flush=True)


if __name__ == "__main__":
    main()
