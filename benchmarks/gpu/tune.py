"""Find the fastest configurations on this device.

    python -m benchmarks.gpu.tune resident     # writes shift_kernels/backends/triton/tuned.json
    python -m benchmarks.gpu.tune              # attention's tiles, the streamed layer's chunks

Prints one JSON line a measurement, fastest first within a case; ``attention.configs`` and
``layer.chunk_samples`` hold what was chosen from such lines. Never run at import.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from benchmarks.gpu import bench, table
from benchmarks.gpu.cases import ATTENTIONS, BLOCKS, Attention, Block
from shift_kernels import BlockSpec

RESIDENT = tuple(case for case in BLOCKS if case.seq_len * case.d_model <= 64 * 256)


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
    from shift_kernels.backends.triton import attention

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
    from shift_kernels.backends.triton import streamed as layer

    lines = []
    for size in chunks(case.batch):
        with mock.patch.object(layer, "_chunk_size", lambda *_, n=size: n):
            for direction in ("forward", "both"):
                call = lambda direction=direction: bench.measure(case, "streamed", direction)[0]  # noqa: E731
                lines.append(dict(case=case.name, direction=direction, config=size) | _time(call, timed=True))
    return lines


def tune_resident(case: Block) -> list[dict]:
    """Time every configuration of both kernels, forward first, and write the fastest into the table."""
    from shift_kernels.backends.triton import resident_plan, tuned

    capability = torch.cuda.get_device_capability()[0]
    spec = BlockSpec(d_model=case.d_model, n_heads=case.n_heads, injection="add")

    def shape(grad: bool) -> tuple[int, int, int]:  # rows grow where short sequences share a tile
        tile = resident_plan.tile(
            spec,
            case.seq_len,
            case.batch,
            itemsize=2,
            pack=True,
            precision="tf32",
            grad=grad,
            capability=capability,
        )
        return tile.rows, tile.d_pad, 2

    chosen = {grad: tuned.config(*shape(grad), grad=grad, capability=capability) for grad in (False, True)}
    lines: list[dict] = []
    for grad, direction in ((False, "forward"), (True, "both")):
        name = tuned.shape_class(*shape(grad), grad=grad)
        found = []
        for config in itertools.starmap(tuned.Config, itertools.product((4, 8), (16, 32, 64), (1, 2, 3))):
            trial = chosen | {grad: config}
            with mock.patch.object(tuned, "config", lambda *_, grad, t=trial, **__: t[grad]):
                time = _time(lambda d=direction: bench.measure(case, "triton", d)[0], timed=True)
            found.append(dict(case=case.name, direction=name, config=config) | time)
        lines += found
        best = min(found, key=lambda line: line["ms"] or float("inf"))
        if best["ms"] is not None:
            chosen[grad] = best["config"]
            _write(tuned.TABLE, tuned.family(capability), name, best)
    return lines


def _write(path: Path, family: str, shape: str, best: dict) -> None:
    table = json.loads(path.read_text())
    entry = best["config"]._asdict() | {"chosen_by": torch.cuda.get_device_name(), "ms": best["ms"]}
    table.setdefault(family, {})[shape] = entry
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


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
    resident = sys.argv[1:] == ["resident"]
    for case in RESIDENT if resident else (*ATTENTIONS, *BLOCKS):
        if isinstance(case, Attention):
            lines = tune_attention(case)
        else:
            lines = tune_resident(case) if resident else tune_chunks(case)
        for line in sorted(lines, key=lambda line: (line["direction"], line["ms"] or float("inf"))):
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
