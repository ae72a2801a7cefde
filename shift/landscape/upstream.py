"""The shared upstream: do Single and Looped want the same of the weights that they share?

    agreement(p) = cos(dL_1 / dp, dL_T / dp)     p: one parameter; L_k: the loss with k loops, same weights

along Stage I, where the weights move by L_1 alone. Near 1 a step of Single is a step of Looped, at a T-th of
the cost; near 0 it does nothing for Looped; below it harms. The idea that queries and keys share their
upstream is Gong et al.'s (arXiv 2510.10089, Theorem 3 as its reviews tell of it); the measure is ours.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shift.landscape.hessian import LossSurface
from shift.landscape.recording import open_recording
from shift_kernels.errors import input_error

ROUNDING = 1e-6
"""Of float32: a gradient's part that is so much shorter than the whole has no direction."""


def agreement(single: LossSurface, looped: LossSurface, weights: Tensor) -> dict[str, float]:
    """Cosine between the two gradients at flat ``weights`` [size]: ``all``, and of each parameter.

    Queries, keys and values count as parameters of their own. 0 where a gradient is nothing but rounding, as
    that of the keys' bias, which the softmax does not see.
    """
    a, b = (s.gradient(s.vector(weights)).double() for s in (single, looped))
    a, b = a / a.norm(), b / b.norm()
    parts = {"all": slice(None), **single.slices(split_qkv=True)}
    return {name: _cosine(a[part], b[part]) for name, part in parts.items()}


def stage_one(
    run_dir: Path, samples: int = 256, dtype: torch.dtype = torch.float32
) -> dict[int, dict[str, float]]:
    """The agreement at the start of every burst that a run recorded while it ran one loop, by step.

    Args:
        run_dir: of a run with snapshots.
        samples: held-out sequences; few are noisy, and noise looks like disagreement.
        dtype: of the gradients.

    Raises:
        ShiftInputError: no snapshots, or none taken with one loop.
    """
    run = open_recording(run_dir)
    steps, found = run.steps(), run.snapshots
    starts = [b.start for b in found.bursts()]
    starts = [i for i in starts if steps.get(int(found.steps[i]), {}).get("n_loops") == 1]
    if not starts:
        raise input_error(
            "stage_one", "run_dir", str(run_dir), "bursts recorded while the run had one loop",
            "Use a run of single or shift.",
        )  # fmt: skip
    single, looped = (run.surface(k, samples, dtype) for k in (1, run.config.model.n_loops))
    return {
        int(found.steps[i]): agreement(single, looped, torch.from_numpy(found.weights[i])) for i in starts
    }


def _cosine(a: Tensor, b: Tensor) -> float:
    """Of parts of two unit vectors."""
    lengths = float(a.norm()), float(b.norm())
    return float(a @ b) / (lengths[0] * lengths[1]) if min(lengths) > ROUNDING else 0.0
