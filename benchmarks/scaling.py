"""What a looped language model of a billion parameters asks of many GPUs: arithmetic, nothing is measured.

    python -m benchmarks.scaling            # the table of docs/scaling.md
    python -m benchmarks.scaling --gbytes-per-s 400

FLOPs are the ledger's (:mod:`shift.flops`), parameters are counted on a model that is never allocated. The
device is assumed: its peak, the share of it that is reached, and what one GPU sends a second.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shift.config import ModelConfig
from shift.flops import train_step_flops
from shift.model import LoopedTransformer
from shift.report.document import Code, Table, Text, block_markdown
from shift_kernels import LoopedBlock

MODEL = ModelConfig(
    d_model=2048,
    n_heads=16,
    n_layers=14,
    n_prelude=2,
    n_coda=2,
    d_ff=5632,
    activation="swiglu",
    norm="rmsnorm",
    position="rope",
    learned_positions=False,
    bias=False,
    tied=True,
)
VOCAB, SEQ_LEN, SEQUENCES = 50_304, 2048, 512
"""Of the tokens; of a sequence; sequences of all GPUs in a step."""
GPUS, LOOPS = (8, 64, 512), (2, 4)
GIB, GB = 2**30, 1e9
STATE = 16
"""Bytes a parameter: fp32 weight, gradient and both moments."""


@dataclass(frozen=True)
class Assumed:
    """Of one GPU: FLOP/s in bf16, the share that a step reaches, and bytes that it sends a second."""

    peak: float = 1e15
    share: float = 0.4
    bytes_per_s: float = 50e9


@dataclass(frozen=True)
class Demand:
    """What a step asks of one of ``n`` GPUs, in bytes and FLOPs."""

    n: int
    parameters: int
    in_blocks: int
    flops: dict[int, int]
    """Of all GPUs, by loops."""

    @property
    def gathered(self) -> int:
        """Weights as ``fsdp`` gathers them: blocks in bf16, the rest in fp32."""
        return 2 * self.in_blocks + 4 * (self.parameters - self.in_blocks)

    def memory(self, parallel: str) -> float:
        """Weights, gradients and moments; with shards the gathered weights and gradients at their fullest."""
        if parallel == "ddp":
            return STATE * self.parameters
        return STATE * self.parameters / self.n + self.gathered + 4 * self.parameters

    def traffic(self, parallel: str) -> float:
        """Bytes that a GPU sends a step: an average of gradients in a ring, or a gather and a scatter."""
        others = (self.n - 1) / self.n
        if parallel == "ddp":
            return 2 * others * 4 * self.parameters
        return others * (self.gathered + 4 * self.parameters)

    def compute_s(self, n_loops: int, device: Assumed) -> float:
        """Seconds of arithmetic."""
        return self.flops[n_loops] / (self.n * device.peak * device.share)


def demands() -> list[Demand]:
    """Of each number of GPUs."""
    with torch.device("meta"):
        model = LoopedTransformer(
            MODEL.block_spec(causal=True),
            vocab_size=VOCAB,
            n_classes=VOCAB,
            max_seq_len=SEQ_LEN,
            learned_positions=False,
            layout=MODEL.layout(),
        )
    parameters = sum(p.numel() for p in model.parameters())
    blocks = [module for module in model.modules() if isinstance(module, LoopedBlock)]
    in_blocks = sum(p.numel() for block in blocks for p in block.parameters())
    flops = {n_loops: train_step_flops(model, SEQUENCES, SEQ_LEN, n_loops) for n_loops in LOOPS}
    return [Demand(n, parameters, in_blocks, flops) for n in GPUS]


def table(device: Assumed) -> Table:
    """A row a number of GPUs and way to share the model."""
    header: list[Text] = [
        "GPUs",
        (Code("--parallel"),),
        "sequences each",
        "weights, gradients, moments",
        "sent a step",
    ]
    header += [f"step, T = {n_loops} (sending)" for n_loops in LOOPS]
    rows = []
    for demand in demands():
        for parallel in ("ddp", "fsdp"):
            sending = demand.traffic(parallel) / device.bytes_per_s
            row = [
                str(demand.n),
                parallel,
                f"{SEQUENCES // demand.n}",
                f"{demand.memory(parallel) / GIB:.1f} GiB",
            ]
            row.append(f"{demand.traffic(parallel) / GB:.1f} GB")
            for n_loops in LOOPS:
                seconds = demand.compute_s(n_loops, device) + sending
                row.append(f"{seconds:.2f} s ({100 * sending / seconds:.0f}%)")
            rows.append(row)
    return Table(header, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    assumed = Assumed()
    parser.add_argument("--peak-tflops", type=float, default=assumed.peak / 1e12)
    parser.add_argument("--share", type=float, default=assumed.share)
    parser.add_argument("--gbytes-per-s", type=float, default=assumed.bytes_per_s / GB)
    args = parser.parse_args(argv)
    device = Assumed(args.peak_tflops * 1e12, args.share, args.gbytes_per_s * GB)
    print(block_markdown(table(device), Path()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
