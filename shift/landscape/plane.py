"""The loss on a plane that the run's path lies near: its sharpest direction, and the flat one it drifts in.

The flattest eigenvectors of a network are weights that nothing reads, and a picture along them shows nothing.
The flat axis here is the run's own: its net displacement, with what lies along the sharpest direction
taken out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shift.landscape.hessian import Hessian
from shift.landscape.recording import open_recording


@dataclass(frozen=True)
class Plane:
    """Loss [len(y), len(x)] over offsets from the last weights; ``path`` [k, 2] are the recorded states from
    step ``start`` on, projected; ``curvature`` along x (sharpest) and y (drift); ``n_loops`` of the loss."""

    x: np.ndarray
    y: np.ndarray
    loss: np.ndarray
    path: np.ndarray
    steps: np.ndarray
    curvature: tuple[float, float]
    n_loops: int
    start: int


def plane(run_dir: Path, start: int, n_loops: int, samples: int = 32, grid: int = 31) -> Plane:
    """The plane at a run's last recorded weights.

    Args:
        run_dir: of a run with snapshots.
        start: first step of the path, after any switch.
        n_loops: of the loss.
        samples: sequences of the probe.
        grid: points along each axis.

    Raises:
        ShiftInputError: no snapshots.
    """
    run = open_recording(run_dir)
    used = run.snapshots.steps >= start
    states = torch.from_numpy(run.snapshots.weights[used])
    surface = run.surface(n_loops, samples, torch.float32)
    last = surface.vector(states[-1])
    hessian = Hessian(surface.loss, last)
    sharp = surface.vector(hessian.extreme(1, tol=1e-3)[1][:, 0])
    drift = last - states[0]
    drift = drift - (drift @ sharp) * sharp
    length = drift.norm()
    drift = drift / length if length > 0 else hessian.gradient.detach() / hessian.gradient.detach().norm()
    path = torch.stack([(states - last) @ sharp, (states - last) @ drift], dim=1).numpy()

    def axis(values: np.ndarray) -> np.ndarray:
        reach = max(float(np.ptp(values)), 1e-3)
        return np.linspace(values.min() - 0.5 * reach, values.max() + 0.5 * reach, grid)

    x, y = axis(path[:, 0]), axis(path[:, 1])
    with torch.no_grad():
        loss = [[float(surface.loss(last + float(a) * sharp + float(b) * drift)) for a in x] for b in y]
    curvature = tuple(float((u @ hessian.matvec(u)).detach()) for u in (sharp, drift))
    return Plane(x, y, np.array(loss), path, run.snapshots.steps[used], curvature, n_loops, start)  # type: ignore[arg-type]
