"""The landscape along one recorded run: all measures at each of its bursts.

Everything is taken on one fixed held-out batch (the probe) with the number of loops that the run used there.
Data only; pictures and words are made elsewhere.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shift.checked import Checked, positive, real, whole, word
from shift.config import TrainConfig
from shift.landscape.cuts import cut
from shift.landscape.hessian import Hessian, LossSurface
from shift.landscape.hopping import hopping
from shift.landscape.information import effective_rank, matrix_entropy, mutual_information, phases
from shift.landscape.recording import open_recording
from shift.landscape.spectrum import exact_spectrum, lanczos_spectrum
from shift.landscape.upstream import agreement
from shift.landscape.valley import RULES, exponent, sensitivity, split, threshold
from shift.schedules.registry import switch_step
from shift_kernels.errors import input_error


@dataclass(frozen=True)
class SurveyConfig(Checked):
    """How closely to look."""

    points: int = whole(12, 1)
    """Bursts to look at, spread evenly over the run."""
    samples: int = whole(32, 1)
    """Sequences of the probe."""
    rule: str = word("relative", RULES)
    """Rule of the threshold between valley and river: absolute, relative or gap."""
    threshold: float = real(0.01, "a finite float > 0", positive)
    """Its value."""
    leading: int = whole(10, 1)
    """Sharpest directions to resolve; the valley of the hopping is those of them above the threshold."""
    lanczos_steps: int = whole(60, 1)
    """Of the spectrum's density."""
    lanczos_vectors: int = whole(2, 1)
    """Random vectors it is averaged over."""
    exact: bool = False
    """All eigenvalues instead of a density; for models up to about 5,000 parameters."""
    double: bool = False
    """float64 instead of float32."""
    heights: tuple[float, ...] = real((0.01, 0.1, 1.0), "finite floats > 0", positive)
    """Nats that a cut through the valley rises by."""


def survey(run_dir: Path, config: SurveyConfig) -> dict[str, Any]:
    """Measure a run that recorded snapshots.

    Args:
        run_dir: of the run.
        config: how closely.

    Returns:
        Plain JSON values: ``points`` (one dict a burst, see :func:`_point`), ``phases``, ``looks`` of the
        criterion, ``switch_step``, evaluations, and the configs.

    Raises:
        ShiftInputError: no snapshots, or none of at least three successive states.
    """
    run = open_recording(run_dir)
    found, steps = run.snapshots, run.steps()
    bursts = [b for b in found.bursts() if b.stop - b.start >= 3 and int(found.steps[b.start]) in steps]
    if not bursts:
        raise input_error(
            "survey", "run_dir", str(run_dir), "bursts of at least three states", "Use --landscape.burst 9."
        )
    chosen = [
        bursts[i] for i in np.unique(np.linspace(0, len(bursts) - 1, config.points).round().astype(int))
    ]

    dtype = torch.float64 if config.double else torch.float32
    surfaces = {
        k: run.surface(k, config.samples, dtype)
        for k in {1, run.config.model.n_loops, *(row["n_loops"] for row in steps.values())}
    }
    points, pairs = [], None
    for burst in chosen:
        # Not across the switch: the two halves would be of two different functions.
        step = int(found.steps[burst.start])
        n_loops, lr = steps[step]["n_loops"], steps[step]["lr"]
        same = {"n_loops": n_loops}
        states = [
            j
            for j in range(burst.start, burst.stop)
            if steps.get(int(found.steps[j]), same)["n_loops"] == n_loops
        ]
        moments = found.second_moments[states[0]], run.moments_age(step)
        point, pairs = _point(
            surfaces, n_loops, found.weights[states], moments, lr, run.config, config, pairs
        )
        points.append({"step": step, "n_loops": n_loops, "lr": lr, **point})
    return {
        "run": str(run_dir),
        "config": run.config.to_dict(),
        "survey": dataclasses.asdict(config),
        "n_parameters": run.n_parameters,
        "switch_step": switch_step(
            run.config.schedule.kind, [row["n_loops"] for row in run.of_kind("train")]
        ),
        "points": points,
        "phases": {
            k: [points[i]["step"] for i in v]
            for k, v in phases([p["effective_rank"] for p in points]).items()
        },
        "looks": run.of_kind("look"),
        "evaluations": run.of_kind("eval"),
        "losses": [[row["step"], row["loss"]] for row in run.of_kind("train")],
    }


def _point(
    surfaces: dict[int, LossSurface],
    n_loops: int,
    weights: np.ndarray,
    moments: tuple[np.ndarray, int | None],
    lr: float,
    run: TrainConfig,
    config: SurveyConfig,
    before: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:
    """All measures at one burst, and its leading eigenpairs."""
    surface = surfaces[n_loops]
    w = surface.vector(weights[0])
    hessian = Hessian(surface.loss, w)
    spectrum = (
        exact_spectrum(hessian)
        if config.exact
        else lanczos_spectrum(hessian, config.lanczos_steps, config.lanczos_vectors)
    )
    k = min(config.leading, hessian.size - 1)
    values, vectors = hessian.extreme(k, tol=1e-4)
    if config.rule != "absolute" and values[0] <= 0:
        raise input_error(
            "survey", "rule", config.rule, "'absolute' where no curvature is positive", "Use it."
        )
    eps = threshold(spectrum, config.rule, config.threshold)
    found, nearby = split(spectrum, eps), sensitivity(spectrum, config.rule, config.threshold)
    point: dict[str, Any] = {
        "loss": float(surface.loss(w).detach()),
        "split": dataclasses.asdict(found),
        "sensitivity": [dataclasses.asdict(s) for s in nearby],
        "exponents": {q: exponent(nearby, q) for q in ("condition", "force", "valley", "river")},
        "leading": values.tolist(),
        "spectrum": [spectrum.values.tolist(), spectrum.counts.tolist()],
        "matrix_entropy": matrix_entropy(spectrum),
        "effective_rank": effective_rank(spectrum),
        "mutual_information": None if before is None else mutual_information(before, (values, vectors)),
        "eta_sharpness": lr * float(values[0]),
        "adam_eta_sharpness": _adam_sharpness(hessian, *moments, lr, run.optimiser.betas[1]),
        "cuts": {str(height): _cut(surface, w, vectors[:, 0], height) for height in config.heights},
        "agreement": agreement(surfaces[1], surfaces[run.model.n_loops], torch.from_numpy(weights[0])),
    }
    walls = values >= eps
    if walls.any() and len(weights) >= 3:
        gradients = np.stack([surface.gradient(surface.vector(v)).double().numpy() for v in weights])
        point["hopping"] = dataclasses.asdict(hopping(weights, gradients, values[walls], vectors[:, walls]))
    return point, (values, vectors)


def _cut(surface: LossSurface, w: torch.Tensor, direction: np.ndarray, height: float) -> dict[str, Any]:
    """The cut through the sharpest direction, as plain values."""
    u = surface.vector(direction)
    with torch.no_grad():
        found = cut(lambda x: float(surface.loss(w + x * u)), height, n_points=31)
    curves = {name: getattr(found, name).tolist() for name in ("x", "y", "u", "v")}
    return {**curves, "margin": found.margin, "shape": found.shape}


def _adam_sharpness(
    hessian: Hessian, second_moment: np.ndarray, age: int | None, lr: float, beta2: float
) -> float | None:
    """lr * l_max of P^-1/2 H P^-1/2, P = sqrt(v) + eps: to be held against 2 (1 + beta1) / (1 - beta1).

    Adaptive edge of stability: Cohen et al., arXiv 2207.14484. ``v`` is bias-corrected for its ``age`` in
    steps; None where that is 0 or not known.
    """
    if not age:
        return None
    corrected = second_moment.astype(np.float64) / (1 - beta2**age)
    scale = torch.from_numpy((np.sqrt(corrected) + 1e-8) ** -0.5).to(hessian.gradient.dtype)
    return lr * float(hessian.scaled(scale).extreme(1, tol=1e-3)[0][0])
