"""All eigenvalues of a Hessian: exactly, or as a stochastic Lanczos density.

m Lanczos steps from a random unit vector v give a tridiagonal matrix whose eigenvalues and squared first
components are nodes and weights of the Gauss quadrature of v's spectral measure (Golub & Welsch 1969;
Ubaru, Chen & Saad 2017; for neural networks Ghorbani, Krishnan & Xiao, arXiv 1901.10159). Averaged over
vectors and times n that estimates how many eigenvalues lie where. scipy's Lanczos keeps its coefficients to
itself, hence the loop here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch

from shift.landscape.hessian import Hessian
from shift_kernels.errors import input_error


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and how many there are of each: 1 where the spectrum is exact, estimates where it isn't.

    Args:
        values: float64 [k], falling.
        counts: float64 [k], >= 0; they sum to n, the number of parameters.
    """

    values: np.ndarray
    counts: np.ndarray

    @property
    def size(self) -> float:
        """n."""
        return float(self.counts.sum())

    def count(self, where: np.ndarray) -> float:
        """How many eigenvalues a mask over ``values`` holds."""
        return float(self.counts[where].sum())


def exact_spectrum(hessian: Hessian | np.ndarray) -> Spectrum:
    """Every eigenvalue, of the dense matrix: n products and n^3 operations; for n up to about 5,000."""
    matrix = hessian if isinstance(hessian, np.ndarray) else hessian.dense()
    values = scipy.linalg.eigvalsh(matrix)[::-1]
    return Spectrum(values, np.ones(len(values)))


def lanczos_spectrum(hessian: Hessian, n_steps: int = 80, n_vectors: int = 2, seed: int = 0) -> Spectrum:
    """The stochastic Lanczos density, in ``n_steps * n_vectors`` products.

    Nodes at the ends converge to eigenvalues; in the bulk a node stands for its neighbourhood.

    Raises:
        ShiftInputError: fewer than one step or vector.
    """
    for name, value in (("n_steps", n_steps), ("n_vectors", n_vectors)):
        if value < 1:
            raise input_error("lanczos_spectrum", name, value, "an int >= 1", "Choose a larger one.")
    rng = np.random.default_rng(seed)
    values, counts = [], []
    for _ in range(n_vectors):
        nodes, weights = _quadrature(hessian, rng.standard_normal(hessian.size), n_steps)
        values.append(nodes)
        counts.append(weights * hessian.size / n_vectors)
    all_values, all_counts = np.concatenate(values), np.concatenate(counts)
    order = np.argsort(-all_values)
    return Spectrum(all_values[order], all_counts[order])


def _quadrature(hessian: Hessian, start: np.ndarray, n_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights (which sum to 1) of one vector's spectral measure."""
    basis = torch.zeros(min(n_steps, hessian.size), hessian.size, dtype=torch.float64)
    basis[0] = torch.from_numpy(start / np.linalg.norm(start))
    diagonal: list[float] = []
    beside: list[float] = []
    for i in range(len(basis)):
        w = hessian.matvec(basis[i]).detach().double()
        diagonal.append(float(w @ basis[i]))
        for _ in range(2):  # twice: once leaves what cancellation left of the earlier vectors
            w -= basis[: i + 1].T @ (basis[: i + 1] @ w)
        length = float(w.norm())
        # Nothing new is left once the Krylov space is invariant.
        if i + 1 == len(basis) or length <= 1e-10 * max(map(abs, diagonal), default=0.0):
            break
        beside.append(length)
        basis[i + 1] = w / length
    nodes, vectors = scipy.linalg.eigh_tridiagonal(diagonal, beside)
    return nodes, vectors[0] ** 2
