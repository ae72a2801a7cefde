"""``shift-bench``: our kernels beside eager PyTorch and ``torch.compile``, on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shift_kernels.accuracy import ALLOWED, error_ratio
from shift_kernels.bench import timing
from shift_kernels.bench.cases import LIBRARY, OURS, Case, full, quick
from shift_kernels.console import command
from shift_kernels.info import report
from shift_kernels.machine import device_name

BUSY = 0.5
"""Processes a core beyond which other people's work shows in the times."""
ROUNDS = {"cpu": 9, "cuda": 50}


@dataclasses.dataclass
class Measured:
    """One case.

    Args:
        case: its name.
        ms: milliseconds of each round, by runner.
        error: by runner of ours: the largest :func:`error_ratio` of the output and of all gradients. The
            results match if it is at most :data:`ALLOWED`.
        missing: by runner that could not run: why, in a line.
    """

    case: str
    ms: dict[str, list[float]]
    error: dict[str, float]
    missing: dict[str, str]

    @property
    def row(self) -> list[str]:
        """Case, times of ours and of the library, speed-up over the faster of these, whether ours matched."""
        ours = min(self.error, key=lambda name: statistics.median(self.ms[name]), default=None)
        others = [name for name in LIBRARY if name in self.ms]
        wrong = [name for name, error in self.error.items() if error > ALLOWED]
        return [
            self.case,
            f"{ours} {timing.spread(self.ms[ours])}" if ours else "-",
            *(timing.spread(self.ms[name]) if name in self.ms else "-" for name in LIBRARY),
            f"{timing.speedup(self.ms, ours, others):.2f}x" if ours else "-",
            f"NO: {', '.join(wrong)}" if wrong else "yes" if ours else "-",
        ]


def measure(case: Case, device: str, rounds: int, warm_up: int = 2) -> Measured:
    """Time a case, and hold our results against float64.

    Args:
        case: what to run.
        device: ``cpu`` or ``cuda``.
        rounds, warm_up: as :func:`timing.interleave` takes them.
    """
    names = (*OURS[device], *LIBRARY)
    calls = case.calls((*names, "exact"), device)
    exact = calls.pop("exact")()
    results: dict[str, list[Tensor]] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            results[name] = calls[name]()
        except Exception as failure:  # whatever one runner lacks, the others are measured
            missing[name] = in_a_line(failure)
            del calls[name]
    error = {
        name: max(map(error_ratio, results[name], results["eager"], exact))
        for name in OURS[device]
        if name in results
    }
    return Measured(case.name, timing.interleave(calls, rounds, warm_up, device), error, missing)


def in_a_line(error: Exception) -> str:
    """An error's first line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _load() -> float:
    """Running processes a core over the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0


HEADER = ("case", "ours, ms", "eager, ms", "torch.compile, ms", "speed-up", "matched")


def table(measured: Sequence[Measured]) -> str:
    """Markdown, columns aligned."""
    rows = [list(HEADER), *(m.row for m in measured)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


@command("shift-bench")
def main(argv: Sequence[str] | None = None) -> int:
    """``shift-bench``; exit code 1 if a result of ours does not match."""
    parser = argparse.ArgumentParser(
        "shift-bench", description="Our kernels beside eager PyTorch and torch.compile, on this machine."
    )
    parser.add_argument("--quick", action="store_true", help="a few cases, about a minute")
    parser.add_argument(
        "--device", choices=list(OURS), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--rounds", type=int, help="timed rounds; default: 9 on a CPU, 50 on a GPU")
    parser.add_argument("--json", type=Path, help="also write every time to this file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    for name, least in (("threads", 1), ("rounds", 2)):  # quartiles need two
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} {getattr(args, name)}: at least {least}")
    if args.threads:
        torch.set_num_threads(args.threads)
    rounds = args.rounds or ROUNDS[args.device]
    print(f"{device_name(torch.device(args.device))}\n{report()}\n", flush=True)
    started, load, measured = time.monotonic(), _load(), []
    for case in (quick if args.quick else full)(args.device):
        print(f"measuring {case.name}", file=sys.stderr, flush=True)
        measured.append(measure(case, args.device, rounds))
    print(table(measured))
    took = time.monotonic() - started
    print(f"\nMedians (quartiles) of {rounds} rounds in which all take turns; {took:.0f} s in all.")
    print("Speed-up: over the faster of eager and torch.compile. Matched: the error of output and gradients")
    print(f"against float64 is at most {ALLOWED:g} times that of eager PyTorch in the same dtype.")
    if load > BUSY:
        print(f"The machine was busy ({load:.1f} processes a core at the start): do not trust the times.")
    for name, why in {n: why for m in measured for n, why in m.missing.items()}.items():
        print(f"Not measured: {name}: {why}")
    if args.json:
        data = {"device": device_name(torch.device(args.device)), "report": report(), "rounds": rounds}
        rows = [dataclasses.asdict(m) for m in measured]
        args.json.write_text(json.dumps(data | {"cases": rows}, indent=1) + "\n")
    return int(any(e > ALLOWED for m in measured for e in m.error.values()))


if __name__ == "__main__":
    sys.exit(main())
