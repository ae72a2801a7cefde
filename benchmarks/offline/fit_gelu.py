"""The polynomial of backends/triton/activation.py: least largest error of Phi(-a) on [0, END].

    python -m benchmarks.offline.fit_gelu                  # prints its coefficients and its errors in float32

Lawson's method: least squares whose weights grow where the error is large. Weighted by max(a, 1/2), since
GELU multiplies it by a, while its slope and small a need it as it is.
"""

from __future__ import annotations

import math

import numpy as np

END, TERMS, STEPS = 4.5, 10, 2000


def tail(a: np.ndarray) -> np.ndarray:
    """Phi(-a) in float64."""
    return np.array([0.5 * math.erfc(x / math.sqrt(2)) for x in a])


def fitted() -> np.ndarray:
    """Coefficients in s = a - END / 2, lowest power first. Powers of a would cancel in float32."""
    s = -END / 2 * np.cos(np.linspace(0, np.pi, 4000))
    basis = np.polynomial.chebyshev.chebvander(2 * s / END, TERMS - 1)
    goal, scale = tail(s + END / 2), np.maximum(s + END / 2, 0.5)
    weights, least, best = np.full(len(s), 1 / len(s)), math.inf, np.zeros(TERMS)
    for _ in range(STEPS):
        w = np.sqrt(weights) * scale
        found = np.linalg.lstsq(basis * w[:, None], goal * w, rcond=None)[0]
        error = np.abs(basis @ found - goal) * scale
        if error.max() < least:
            least, best = error.max(), found
        weights *= error + 1e-12
        weights /= weights.sum()
    powers = np.polynomial.chebyshev.Chebyshev(best, domain=[-END / 2, END / 2])
    return powers.convert(kind=np.polynomial.Polynomial).coef


def main() -> None:
    coefficients = fitted().astype(np.float32)
    a = np.linspace(0, END, 400_001, dtype=np.float32)
    s, q = a - np.float32(END / 2), np.full_like(a, coefficients[-1])
    for c in coefficients[-2::-1]:
        q = q * s + c
    error = np.abs(q - tail(a))
    print(", ".join(map(repr, map(float, coefficients))))
    print(f"largest error of Phi {error.max():.1e}, of GELU {(error * a).max():.1e}")


if __name__ == "__main__":
    main()
