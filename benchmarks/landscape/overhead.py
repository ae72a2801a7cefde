"""What recording with ``--landscape.every`` costs the toy, by paired runs in turns.

    python -m benchmarks.landscape.overhead --every 50 --out benchmarks/results/landscape/overhead.json

A pair is the same run with and without recording, in turns first; timed is one period of the recording, from
half-way between two bursts to half-way between the next two, with the writing of one burst. Evaluations and
checkpoints are left out. A median of many short pairs outlives what else the machine does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.landscape.study import config_of, tasks
from shift.config import LandscapeConfig
from shift.run.files import replace_atomically
from shift.run.summary import environment
from shift.run.trainer import Trainer


def ms_per_step(record: bool, every: int, path: Path) -> float:
    """Wall time of a step with T loops, over one period."""
    config = config_of(tasks()["markov"], "looped", 0)
    config = dataclasses.replace(
        config,
        steps=every // 2 + every + 1,
        eval_every=0,
        eval_samples=1,
        log_every=every,
        landscape=LandscapeConfig(every=every if record else 0),
    )
    times = {}
    Trainer(config, path).fit(lambda done, _: times.update({done: time.perf_counter()}))
    return 1e3 * (times[every // 2 + every] - times[every // 2]) / every


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, nargs="+", default=[50])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        ms_per_step(True, 50, Path(folder) / "warm-up")
        for every in args.every:
            pairs = []
            for i in range(args.pairs):
                order = (True, False) if i % 2 else (False, True)
                pair = {on: ms_per_step(on, every, Path(folder) / f"{every}-{i}-{on}") for on in order}
                pairs.append((pair[False], pair[True]))
            without, with_it = (statistics.median(ms) for ms in zip(*pairs, strict=True))
            added = statistics.quantiles([b / a - 1 for a, b in pairs], n=4)
            measured.append(
                {
                    "every": every,
                    "burst": LandscapeConfig().burst,
                    "pairs": len(pairs),
                    "median_ms_without": without,
                    "median_ms_with": with_it,
                    "added_quartiles": added,
                }
            )
            print(f"every {every}: {without:.2f} and {with_it:.2f} ms a step; added by pair: "
                  f"{added[0]:+.1%}, {added[1]:+.1%}, {added[2]:+.1%} (quartiles)", flush=True)  # fmt: skip
    about = environment(torch.device("cpu")) | {"measured": measured}
    replace_atomically(args.out, json.dumps(about, indent=1).encode())


if __name__ == "__main__":
    main()
