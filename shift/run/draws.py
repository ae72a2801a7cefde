"""What a step draws for its samples: by their places in the global batch, not by torch's generator.

So neither the number of ranks nor the micro-batch changes what a sample gets, and no two get the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def normal(seed: int, step: int, rows: Iterable[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal numbers, float32 [rows, *shape].

    Args:
        seed: of the run.
        step: steps done before.
        rows: of the global batch.
        shape: of what a row gets.
        device: to draw on.
    """
    generator = torch.Generator(device)
    of_rows = []
    for row in rows:
        own = np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)
        generator.manual_seed(int(own[0]))
        of_rows.append(torch.empty(shape, device=device).normal_(generator=generator))
    return torch.stack(of_rows)
