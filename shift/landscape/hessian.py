"""The loss as a function of one flat vector of weights, and its second derivatives.

    H v = d/dw (g(w) . v)                              double backward: exact, on the torch backend
        ~ (g(w + eps v) - g(w - eps v)) / (2 eps)      finite differences: any backend, |v| = 1

Eigenpairs at the spectrum's ends come from scipy's ``eigsh`` (ARPACK's implicitly restarted Lanczos).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property

import numpy as np
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from shift.model import LoopedTransformer
from shift.run.evaluate import loops_of
from shift.tasks.base import IGNORE, Batch
from shift_kernels.errors import input_error

METHODS = ("double_backward", "finite_difference")


class LossSurface:
    """Mean cross-entropy of a model over the read positions of one fixed batch, as a function of its weights.

    Args:
        model: left as it is; its parameters, in their order, make up the flat vector.
        batch: the samples that stand for the task.
        n_loops: loops to run (a sample with its own T(n) runs at most those).
        dtype: float64, or float32 for speed.
        backend: of the loop body; only ``torch`` can be differentiated twice.

    Raises:
        ShiftInputError: another dtype.
    """

    def __init__(
        self,
        model: LoopedTransformer,
        batch: Batch,
        n_loops: int,
        *,
        dtype: torch.dtype = torch.float64,
        backend: str = "torch",
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise input_error("LossSurface", "dtype", dtype, "float32 or float64", "Use float64.")
        self._model = copy.deepcopy(model).to(dtype).eval()  # a random first state must stay the same
        self._batch, self.n_loops, self.dtype, self._backend = batch, n_loops, dtype, backend
        self.names = [name for name, _ in model.named_parameters()]
        self.shapes = [p.shape for p in model.parameters()]
        self._sizes = [p.numel() for p in model.parameters()]
        self.size = sum(self._sizes)

    def vector(self, weights: Tensor | np.ndarray) -> Tensor:
        """A flat vector [size] in the surface's dtype."""
        return torch.as_tensor(weights).to(self.dtype)

    def slices(self, split_qkv: bool = False) -> dict[str, slice]:
        """Where each parameter lies in a flat vector.

        Args:
            split_qkv: name the rows of queries, keys and values of the fused input projection apart
                (``...in_proj_weight.q``).
        """
        spec = self._model.block.spec
        rows = {"q": spec.n_heads, "k": spec.n_kv_heads, "v": spec.n_kv_heads}
        found: dict[str, slice] = {}
        start = 0
        for name, n in zip(self.names, self._sizes, strict=True):
            parts = {name: n}
            if split_qkv and "in_proj_" in name:
                parts = {f"{name}.{part}": n * heads // sum(rows.values()) for part, heads in rows.items()}
            for part, size in parts.items():
                found[part] = slice(start, start + size)
                start += size
        return found

    def loss(self, weights: Tensor) -> Tensor:
        """Loss (nats, 0-d) at a flat vector [size]; differentiable."""
        parts = weights.split(self._sizes)
        values = {
            name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }
        batch = self._batch
        options = {
            "context": batch.context,
            "cu_seqlens": batch.cu_seqlens,
            "backend": self._backend,
        }
        logits = functional_call(self._model, values, (batch.tokens, loops_of(batch, self.n_loops)), options)
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)

    def gradient(self, weights: Tensor) -> Tensor:
        """Gradient [size] at a flat vector."""
        point = weights.detach().requires_grad_()
        return torch.autograd.grad(self.loss(point), point)[0]


class Hessian:
    """The Hessian of a differentiable function at one point, as an operator.

    Args:
        function: of a flat vector, to a 0-d tensor.
        point: float32 or float64 [n].
        method: ``double_backward``, or ``finite_difference`` where a kernel has no double backward.

    Raises:
        ShiftInputError: an unknown method.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], point: Tensor, method: str = "double_backward"
    ) -> None:
        if method not in METHODS:
            raise input_error("Hessian", "method", method, " or ".join(map(repr, METHODS)), "Choose one.")
        self._function, self.size, self.method = function, point.numel(), method
        self._point = point.detach().clone().requires_grad_()

    @cached_property
    def gradient(self) -> Tensor:
        """Gradient at the point [n]; its graph is kept, so that every product is one backward pass."""
        twice = self.method == "double_backward"
        return torch.autograd.grad(self._function(self._point), self._point, create_graph=twice)[0]

    def matvec(self, v: Tensor) -> Tensor:
        """H v, [n], for v [n]."""
        v = v.to(self._point.dtype)
        if self.method == "double_backward":
            return torch.autograd.grad(self.gradient, self._point, v, retain_graph=True)[0]
        length = v.norm()
        if length == 0:
            return torch.zeros_like(v)
        # Cube root of the precision: where the error of the quotient and that of rounding meet.
        scale = max(1.0, float(self._point.detach().norm()) / self.size**0.5)
        step = torch.finfo(v.dtype).eps ** (1 / 3) * scale * v / length
        return (self._gradient_at(step) - self._gradient_at(-step)) * (length / (2 * step.norm()))

    def scaled(self, scale: Tensor) -> Hessian:
        """D H D with D = diag(``scale`` [n]): the Hessian in the coordinates w = D x."""
        point = self._point.detach()
        return Hessian(lambda x: self._function(point + scale * x), torch.zeros_like(point), self.method)

    def dense(self, chunk: int = 64) -> np.ndarray:
        """The matrix, float64 [n, n], symmetrised; ``chunk`` products at a time."""
        rows = []
        for start in range(0, self.size, chunk):
            basis = torch.zeros(min(chunk, self.size - start), self.size, dtype=self._point.dtype)
            basis[torch.arange(len(basis)), start + torch.arange(len(basis))] = 1
            if self.method == "double_backward":
                options = {"retain_graph": True, "is_grads_batched": True}
                rows.append(torch.autograd.grad(self.gradient, self._point, basis, **options)[0])
            else:
                rows.append(torch.stack([self.matvec(v) for v in basis]))
        matrix = torch.cat(rows).detach().double().numpy()
        return (matrix + matrix.T) / 2

    def extreme(
        self, k: int, end: str = "top", seed: int = 0, tol: float = 1e-6
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k algebraically largest (``top``) or smallest (``bottom``) eigenvalues and their eigenvectors.

        Args:
            k: 1 .. n - 1.
            end: "top" or "bottom".
            seed: of the first Lanczos vector.
            tol: relative accuracy of the eigenvalues.

        Returns:
            Eigenvalues float64 [k], the outermost first, and orthonormal columns float64 [n, k].

        Raises:
            ShiftInputError: k or end outside these.
        """
        if not 1 <= k < self.size:
            raise input_error("Hessian.extreme", "k", k, f"an int in 1 .. {self.size - 1}", "Change it.")
        if end not in ("top", "bottom"):
            raise input_error("Hessian.extreme", "end", end, "'top' or 'bottom'", "Choose one.")

        def matvec(v: np.ndarray) -> np.ndarray:
            return self.matvec(torch.from_numpy(v.reshape(-1))).detach().double().numpy()

        operator = scipy.sparse.linalg.LinearOperator((self.size, self.size), matvec, dtype=np.float64)
        first = np.random.default_rng(seed).standard_normal(self.size)
        which = "LA" if end == "top" else "SA"
        values, vectors = scipy.sparse.linalg.eigsh(operator, k, which=which, v0=first, tol=tol)
        order = np.argsort(-values if end == "top" else values)
        return values[order], vectors[:, order]

    def _gradient_at(self, step: Tensor) -> Tensor:
        point = (self._point + step).detach().requires_grad_()
        return torch.autograd.grad(self._function(point), point)[0]
