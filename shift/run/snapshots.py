"""What a run records for a later look at its landscape: weights of successive steps, now and then.

Every ``every`` steps a burst of ``burst`` successive states, and the final one. A state is the step, all
weights, and Adam's second moments (zero before the first step); batches and gradients follow from the step.
Rows of ``snapshots.bin``, little-endian: int64 step, float32 [n] weights, float32 [n] second moments.

Cheap enough to leave on: ``python -m benchmarks.landscape.overhead`` measures it
(``benchmarks/results/landscape/overhead.json``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shift.run.optim import RunOptimizer
from shift_kernels.errors import input_error

SNAPSHOTS = "snapshots.bin"


@dataclass(frozen=True)
class Snapshots:
    """Recorded states: ``steps`` int64 [k], steps done before each, rising; ``weights`` and
    ``second_moments`` float32 [k, n], parameters in the model's order."""

    steps: np.ndarray
    weights: np.ndarray
    second_moments: np.ndarray

    def bursts(self) -> list[slice]:
        """Runs of successive steps."""
        ends = [*(np.flatnonzero(np.diff(self.steps) != 1) + 1).tolist(), len(self.steps)]
        return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


class SnapshotRecorder:
    """Takes the states that are due. They stay on the device until :meth:`read`.

    Args:
        model, optimizer: whose state it is.
        every: steps from burst to burst; 0: records nothing.
        burst: successive states in a burst.
        total_steps: of the run; the state after the last is recorded.
    """

    def __init__(
        self, model: nn.Module, optimizer: RunOptimizer, every: int, burst: int, total_steps: int
    ) -> None:
        self._parameters, self._optimizer = list(model.parameters()), optimizer
        self._every, self._burst, self._last = every, burst, total_steps
        self._pending: list[tuple[int, Tensor]] = []

    def take(self, step: int) -> None:
        """Record the state before step ``step``, if it is due."""
        if not self._every or (step % self._every >= self._burst and step != self._last):
            return
        moments = (self._optimizer.state.get(p, {}).get("exp_avg_sq") for p in self._parameters)
        squares = [
            torch.zeros_like(p) if m is None else m for p, m in zip(self._parameters, moments, strict=True)
        ]
        state = torch.cat([x.detach().reshape(-1) for x in (*self._parameters, *squares)]).float()
        self._pending.append((step, state))

    def read(self) -> Iterable[bytes]:
        """The rows since the last call; waits for the device."""
        pending, self._pending = self._pending, []
        for step, state in pending:
            yield np.int64(step).astype("<i8").tobytes() + state.cpu().numpy().astype("<f4").tobytes()


def read_snapshots(run_dir: Path, n_parameters: int) -> Snapshots:
    """The states that a run recorded.

    Raises:
        ShiftInputError: none, or not of a model with ``n_parameters``.
    """
    path = run_dir / SNAPSHOTS
    if not path.is_file() or path.stat().st_size == 0:
        raise input_error(
            "read_snapshots", "run_dir", str(run_dir), f"a run that recorded {SNAPSHOTS}",
            "Train it with --landscape.every 50.",
        )  # fmt: skip
    fields = [("step", "<i8"), ("weights", "<f4", n_parameters), ("second_moments", "<f4", n_parameters)]
    row = np.dtype(fields)
    if path.stat().st_size % row.itemsize:
        raise input_error(
            "read_snapshots", "run_dir", str(path), f"rows of {row.itemsize} bytes ({n_parameters} weights)",
            "It was written by another model, or cut short.",
        )  # fmt: skip
    rows = np.fromfile(path, row)
    # A run that was extended may have recorded the state at its old end twice.
    rows = rows[np.unique(rows["step"], return_index=True)[1]]
    return Snapshots(rows["step"].astype(np.int64), rows["weights"], rows["second_moments"])
