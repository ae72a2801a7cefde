"""The polynomial of the kernels' GELU: log2 Phi(-a) on [0, END], so that Phi(-a) is one exponential.

    python -m benchmarks.offline.fit_gelu                  # prints its coefficients and its errors in float32

Lawson's method: least squares whose weights grow where the error is large. What counts is the error of
Phi(-a), to which that of its logarithm counts ln 2 Phi(-a) times, and times max(a, 1/2), since GELU
multiplies it by a, while its slope and small a need it as it is.
"""

from __future__ import annotations

import math

import numpy as np

END, TERMS, STEPS = 5.0, 6, 2000
"""Beyond END Phi(-a) is nothing, and the polynomial falls, as its highest term is negative."""


def tail(a: np.ndarray) -> np.ndarray:
    """Phi(-a) in float64."""
    return np.array([0.5 * math.erfc(x / math.sqrt(2)) for x in a])


def fitted() -> np.ndarray:
    """Coefficients in a, lowest power first."""
    a = END / 2 * (1 - np.cos(np.linspace(0, np.pi, 4000)))
    goal, scale = np.log2(tail(a)), math.log(2) * tail(a) * np.maximum(a, 0.5)
    basis = a[:, None] ** np.arange(TERMS)
    weights, least, best = np.full(len(a), 1 / len(a)), math.inf, np.zeros(TERMS)
    for _ in range(STEPS):
        w = np.sqrt(weights) * scale
        found = np.linalg.lstsq(basis * w[:, None], goal * w, rcond=None)[0]
        error = np.abs(basis @ found - goal) * scale
        if error.max() < least:
            least, best = error.max(), found
        weights *= error + 1e-12
        weights /= weights.sum()
    return best


def main() -> None:
    coefficients = fitted().astype(np.float32)
    a = np.linspace(0, 30, 400_001, dtype=np.float32)
    log2 = np.full_like(a, coefficients[-1])
    for c in coefficients[-2::-1]:
        log2 = log2 * a + c
    error = np.abs(np.exp2(log2) - tail(a))
    print(", ".join(map(repr, map(float, coefficients))))
    print(f"largest error of Phi {error.max():.1e}, of GELU {(error * a).max():.1e}")


if __name__ == "__main__":
    main()
