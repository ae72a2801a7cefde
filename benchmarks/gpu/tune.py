"""Find tile sizes for attention and chunk sizes for the streamed layer: ``python -m benchmarks.gpu.tune``.

Prints one JSON line a measurement, fastest first within a case; ``attention.configs`` and
``layer.chunk_samples`` hold what was chosen from such lines. Never run at import.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from benchmarks.gpu import bench, table
from benchmarks.gpu.cases import ATTENTIONS, BLOCKS, Attention, Block


def tiles(seq_len: int) -> Iterator[tuple[int, int, int, int]]:
    """Rows owned, rows walked, warps, stages; no tile longer than the sequence padded."""
    longest = max(16, 1 << (seq_len - 1).bit_length())
    for own, walk, warps, stages in itertools.product(
        (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)
    ):
        if max(own, walk) <= longest and own * walk <= 128 * 128:
            yield own, walk, warps, stages


def chunks(batch: int) -> list[int]:
    """The whole batch, halves of it, quarters of it, and so on."""
    return sorted({max(1, batch >> i) for i in range(6)}, reverse=True)


def tune_attention(case: Attention) -> list[dict]:
    from shift_kernels.triton import attention

    q, k, v = (
        torch.randn(
            case.batch, case.n_heads, case.seq_len, case.head_dim, device="cuda", dtype=torch.bfloat16
        )
        for _ in range(3)
    )
    grad = torch.randn_like(q)
    o, lse = attention.attention_forward(q, k, v, True, None)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: attention.attention_forward(q, k, v, True, None),
        "backward": lambda: attention.attention_backward(grad, q, k, v, o, lse, True, None),
    }
    lines = []
    for tile in tiles(case.seq_len):
        config = attention.Config(*tile)
        with mock.patch.object(attention, "configs", lambda *_, c=config: (c, c, c)):
            for direction, call in calls.items():
                lines.append(dict(case=case.name, direction=direction, config=tile) | _time(call))
    return lines


def tune_chunks(case: Block) -> list[dict]:
    from shift_kernels.triton import layer

    lines = []
    for size in chunks(case.batch):
        with mock.patch.object(layer, "_chunk_size", lambda *_, n=size: n):
            for direction in ("forward", "both"):
                call = lambda direction=direction: bench.measure(case, "streamed", direction)[0]  # noqa: E731
                lines.append(dict(case=case.name, direction=direction, config=size) | _time(call, timed=True))
    return lines


def _time(call: Callable, timed: bool = False) -> dict:
    """Median in ms, or the error: a tile that does not fit the device is an answer, too."""
    try:
        if timed:
            return dict(ms=table.median(call()), error=None)
        call()  # compiles
        return dict(ms=table.median(bench._times(call, seconds=0.05)), error=None)
    except Exception as error:
        return dict(ms=None, error=f"{type(error).__name__}: {error}".splitlines()[0][:120])


def main() -> int:
    if not torch.cuda.is_available():
        print("No CUDA device: nothing to tune.", file=sys.stderr)
        return 0
    for case in (*ATTENTIONS, *BLOCKS):
        lines = tune_attention(case) if isinstance(case, Attention) else tune_chunks(case)
        for line in sorted(lines, key=lambda line: (line["direction"], line["ms"] or float("inf"))):
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
