"""What the Triton kernels should take on an H100, by arithmetic from compiled figures: a prediction, no time.

    python -m benchmarks.offline.predict                   # -> benchmarks/results/offline/predicted.json

A launch takes the longest of: its warp instructions at half of all issue slots, the weights that programs
read from L2, what it moves to and from device memory; and what starting it takes. The rivals' figures are
floors: the memory traffic of eager PyTorch and of a compiler that fuses every elementwise step, launches left
out. A first run on hardware is to be held against this, and against the goal.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from benchmarks.offline.compile_triton import RESULTS

OUT = RESULTS.with_name("predicted.json")
# An H100 SXM: multiprocessors, clock under load (Hz), bytes a second of device memory and (assumed) of L2.
N_SMS, CLOCK, MEMORY, L2 = 132, 1.755e9, 3.0e12, 5.5e12
SCHEDULERS = 4  # warp instructions that a multiprocessor may start in a cycle
ISSUED = 0.5  # assumed share of the issue slots that are used
LAUNCH = 5e-6  # assumed seconds
LAUNCHES = {"forward": 3, "backward": 8}
PASSES = {
    "eager": 38,
    "fused": 22,
}  # of [tokens, d_model] in 2 bytes, a loop's forward; its backward twice that


class Case(NamedTuple):
    """A shape that is timed, with heads of 16 (d_model 64) or 32, gelu, an MLP of 4 d_model, bf16; and the
    goal: times faster, forward and backward, than the best other."""

    batch: int
    seq_len: int
    d_model: int
    n_loops: int
    goal: float
    rows: int = 64


CASES = (
    Case(1024, 32, 64, 20, 2.0, rows=32),
    Case(512, 64, 128, 12, 1.5),
    Case(256, 64, 256, 12, 1.15),
    Case(64, 64, 256, 12, 2.0),
)


def predicted(case: Case, instructions: dict[str, int]) -> dict[str, Any]:
    """Milliseconds of each limit and of all, and what rivals need at least."""
    d, tokens = case.d_model, case.batch * case.seq_len
    programs, token_loops = tokens // case.rows, tokens * case.n_loops
    weights = 2 * d * d * programs * case.n_loops  # bytes of L2 for each d_model x d_model matrix
    state, operands = 2 * d * token_loops, (12 + 4) * 2 * d * token_loops
    limits = {
        "forward": {"L2": 12 * weights / L2, "memory": 2 * state / MEMORY},
        # Backward: q, k, v and linear1 are read twice; states and operands once, by another launch again.
        "backward": {"L2": 19 * weights / L2, "memory": (2 * state + operands) / MEMORY},
    }
    found: dict[str, Any] = case._asdict()
    ours = 0.0
    for direction, limit in limits.items():
        sms = min(N_SMS, programs)
        limit["issue"] = instructions[direction] * token_loops / (sms * SCHEDULERS * CLOCK * ISSUED)
        found |= {f"{direction}_{name}_ms": round(1e3 * t, 3) for name, t in limit.items()}
        ours += max(limit.values()) + LAUNCHES[direction] * LAUNCH
    ours += operands / MEMORY
    found["forward_and_backward_ms"] = round(1e3 * ours, 3)
    for rival, passes in PASSES.items():
        floor = 3 * passes * state / MEMORY
        found[f"{rival}_floor_ms"] = round(1e3 * floor, 3)
        found[f"times_{rival}_floor"] = round(floor / ours, 2)
    return found


def main() -> None:
    rows = json.loads(RESULTS.read_text())["rows"]

    def instructions(case: Case) -> dict[str, int]:
        name = f"block {case.rows}x{case.d_model} bf16"
        own = {row["kernel"]: row for row in rows if row["case"] == name and row["sm"] == 90}
        return {d: own[f"resident_{d}"]["instructions"] for d in LAUNCHES}

    found = [predicted(case, instructions(case)) for case in CASES]
    about = "predicted from compiled figures for an H100; nothing here was timed"
    OUT.write_text(json.dumps({"about": about, "cases": found}, indent=1) + "\n")
    for case in found:
        print(json.dumps(case))


if __name__ == "__main__":
    main()
