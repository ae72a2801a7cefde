"""Does a run hop from wall to wall? Its steps and gradients, seen in the valley and along the river.

For successive weights w_0 .. w_b, the noise-free gradients g_t of one fixed batch, and orthonormal valley
directions u_1 .. u_k (eigenvectors of the Hessian at w_0) with eigenvalues l_i:

    crossings       share of (t, i) where u_i . g_t changes sign to t + 1: the floor lies in between
    step turns      share of (t, i) where u_i . (w_{t+1} - w_t) changes sign
    valley cosine   mean cosine of successive valley gradients U^T g_t, U^T g_{t+1}; below 0: it bounces
    river progress  length of the net displacement out of the valley directions, per step
    bounce height   sum_i l_i var_t(u_i . w_t) / 2 about a straight line in t: how high on the walls the run
                    is on average, in nats

*Hops* is the z-score of the crossings: how far they lie above those of random k-dimensional subspaces out
of the valley, in their standard deviations. So the null asks: is it in the valley, more than elsewhere, that
the gradient turns? (Directions drawn from the whole space would be no null: where the valley holds most of
the gradient, each of them sees it.) All definitions are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shift_kernels.errors import input_error


@dataclass(frozen=True)
class Hopping:
    """See the module. Shares are in [0, 1]; ``river_progress`` has the unit of weights, ``bounce_height``
    that of the loss. ``p_value``: share of random subspaces that cross at least as often (plus one, over
    plus one); ``null_mean`` and ``null_std`` are of their crossings."""

    crossings: float
    step_turns: float
    valley_cosine: float
    river_progress: float
    bounce_height: float
    hops: float
    p_value: float
    null_mean: float
    null_std: float


def hopping(
    weights: np.ndarray,
    gradients: np.ndarray,
    values: np.ndarray,
    vectors: np.ndarray,
    n_random: int = 200,
    seed: int = 0,
) -> Hopping:
    """Measure a stretch of trajectory.

    Args:
        weights: [b + 1, n], b >= 2 successive steps.
        gradients: [b + 1, n] at these weights, all of the same batch.
        values, vectors: eigenvalues [k] and orthonormal columns [n, k] of the valley.
        n_random: subspaces of the null distribution.
        seed: of those.

    Raises:
        ShiftInputError: fewer than three weights, or shapes that do not fit.
    """
    if len(weights) < 3 or weights.shape != gradients.shape:
        raise input_error(
            "hopping", "weights", list(weights.shape), "[b + 1, n] with b >= 2, as the gradients",
            "Record bursts of at least two steps.",
        )  # fmt: skip
    if vectors.shape != (weights.shape[1], len(values)) or not len(values):
        raise input_error(
            "hopping", "vectors", list(vectors.shape), f"[{weights.shape[1]}, k] with k = len(values) >= 1",
            "Pass the eigenpairs of the valley.",
        )  # fmt: skip
    # From here on relative to the start, or rounding would count as movement.
    moved = weights.astype(np.float64) - weights[0]
    place, force = moved @ vectors, gradients @ vectors
    crossings = _turns(force)
    rng = np.random.default_rng(seed)
    elsewhere = gradients - force @ vectors.T
    null = np.array([_turns(r) for r in _random_projections(elsewhere, len(values), n_random, rng)])
    out_of_valley = moved[-1] - vectors @ place[-1]
    return Hopping(
        crossings=crossings,
        step_turns=_turns(np.diff(place, axis=0)),
        valley_cosine=_cosine(force),
        river_progress=float(np.linalg.norm(out_of_valley)) / (len(weights) - 1),
        bounce_height=float((values * _about_a_line(place)).sum() / 2),
        hops=float((crossings - null.mean()) / max(null.std(), 1 / (len(weights) * len(values)))),
        p_value=float((1 + (null >= crossings).sum()) / (1 + n_random)),
        null_mean=float(null.mean()),
        null_std=float(null.std()),
    )


def _random_projections(gradients: np.ndarray, k: int, n_random: int, rng: np.random.Generator) -> np.ndarray:
    """Gradients projected on Gaussian directions: [n_random, b + 1, k], exact in distribution.

    For a Gaussian r, g_t . r is Gaussian in t with covariance g_s . g_t, so the directions are never made.
    """
    gram = gradients.astype(np.float64) @ gradients.T.astype(np.float64)
    values, vectors = np.linalg.eigh(gram)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    return root @ rng.standard_normal((n_random, len(gram), k))


def _turns(series: np.ndarray) -> float:
    """Share of sign changes between successive rows; a zero has no sign to change."""
    return float((series[1:] * series[:-1] < 0).mean())


def _about_a_line(series: np.ndarray) -> np.ndarray:
    """Variance of each column about its least-squares line."""
    t = np.arange(len(series))
    line = np.polynomial.polynomial.polyfit(t, series, 1)
    return (series - line[0] - np.outer(t, line[1])).var(axis=0)


def _cosine(series: np.ndarray) -> float:
    a, b = series[:-1], series[1:]
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / np.where(lengths > 0, lengths, 1)).mean())
