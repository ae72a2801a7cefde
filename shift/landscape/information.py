"""How spread out a Hessian's curvature is, how much it shares with the next one, and the phases of that.

    matrix entropy       S = -sum p log p,  p = |l| / sum |l|  (nats; von Neumann's, of |H| / tr |H|)
    effective rank       exp S: from 1, one direction has it all, to n      (Roy & Vetterli 2007)
    mutual information   I(A; B) = S(A) + S(B) - S(A o B), matrix-based (Giraldo, Rao & Principe, 2015, in
                         the limit alpha -> 1), A = |H_k| scaled to a diagonal of 1/n; o multiplies entries

That entropy and mutual information of Hessians are looked at is Gong et al.'s (arXiv 2510.10089); their
definitions could not be read, these are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shift.landscape.spectrum import Spectrum
from shift_kernels.errors import input_error


def matrix_entropy(spectrum: Spectrum) -> float:
    """S, in nats; 0 for a matrix without curvature."""
    size = np.abs(spectrum.values)
    total = float((spectrum.counts * size).sum())
    if total == 0:
        return 0.0
    p = size / total
    seen = p > 0
    return float(-(spectrum.counts[seen] * p[seen] * np.log(p[seen])).sum())


def effective_rank(spectrum: Spectrum) -> float:
    """exp S: as if so many directions shared the curvature evenly."""
    return float(np.exp(matrix_entropy(spectrum)))


def mutual_information(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """I of two Hessians given by eigenpairs, in nats, >= 0; S(A) for twice the same rank-one matrix is 0.

    With all eigenpairs it is exact; with the leading r it is that of the matrices they span, for about
    n r^4 operations. Parameters with no share in either are left out.

    Args:
        a, b: eigenvalues [r] and eigenvectors [n, r]; signs of the eigenvalues are dropped.

    Raises:
        ShiftInputError: different n.
    """
    if a[1].shape[0] != b[1].shape[0]:
        raise input_error(
            "mutual_information", "b", list(b[1].shape), f"eigenvectors of {a[1].shape[0]} entries",
            "Compare Hessians of one model.",
        )  # fmt: skip
    x, y = (vectors * np.sqrt(np.abs(values)) for values, vectors in (a, b))
    length_x, length_y = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    used = (length_x > 1e-9 * length_x.max()) & (length_y > 1e-9 * length_y.max())
    x, y = x[used] / length_x[used, None], y[used] / length_y[used, None]
    # x x^T o y y^T = z z^T, z the products of all pairs of columns.
    z = (x[:, :, None] * y[:, None, :]).reshape(len(x), -1)
    return _entropy_of_factor(x) + _entropy_of_factor(y) - _entropy_of_factor(z)


def _entropy_of_factor(x: np.ndarray) -> float:
    """S of x x^T / n, whose trace is 1; from the smaller of the two Gram matrices."""
    gram = x.T @ x if x.shape[1] < x.shape[0] else x @ x.T
    p = np.linalg.eigvalsh(gram) / len(x)
    p = p[p > 1e-15]
    return float(-(p * np.log(p)).sum())


def phases(rank: Sequence[float], change: float = 1.5, settled: float = 0.1) -> dict[str, tuple[int, int]]:
    """Collapse, diversification and stabilisation in a series of effective ranks, by a rule.

        collapse         from the start to the lowest value, if the start is at least ``change`` times that
        diversification  from the lowest value on, if a later one is at least ``change`` times that, to
                         the first that has made up all but ``settled`` of the rise
        stabilisation    from the end of these on, if at least three values remain and all of them
                         lie within ``change`` of each other

    Args:
        rank: effective ranks in the order of training.
        change: a factor > 1 that counts as a change. Ranks estimated from few random vectors scatter by a
            tenth or two: a smaller factor finds phases in noise.
        settled: share of the rise.

    Returns:
        First and last index of each phase that there is; none of the first two: the series is static.
    """
    if not change > 1:
        raise input_error("phases", "change", change, "a number > 1", "1.5 is the default.")
    found: dict[str, tuple[int, int]] = {}
    if len(rank) < 2:
        return found
    low = int(np.argmin(rank))
    end = 0
    if low > 0 and rank[0] >= change * rank[low]:
        found["collapse"] = (0, low)
        end = low
    high = max(rank[low:])
    if high >= change * rank[low]:
        enough = high - settled * (high - rank[low])
        end = next(i for i in range(low, len(rank)) if rank[i] >= enough)
        found["diversification"] = (low, end)
    rest = rank[end:]
    if len(rest) >= 3 and max(rest) < change * min(rest):
        found["stabilisation"] = (end, len(rank) - 1)
    return found
