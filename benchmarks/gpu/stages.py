"""The stages of the GPU run, in their order. A new one is a module, and a line here.

groups() -> list[Group]         its cases; a case that has a row is left out of a later call
run(case) -> Finding            in a process of its own; or run_batch(cases, report) for all of a batch
finish(rows)                    optional: what is to be made of all its rows, in the parent
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage.

    Args:
        module: where it is.
        what: in a line.
        by_name: it takes too long for what it says to be run unasked.
    """

    module: str
    what: str
    by_name: bool = False


STAGES = {
    "build": Stage(
        "benchmarks.gpu.build", "the compiled parts, for this device; comes first, asked for or not"
    ),
    "smoke": Stage("benchmarks.gpu.smoke", "every backend and shape once, held against float64"),
    "contract": Stage("benchmarks.gpu.contract", "the tests with marker gpu"),
    "bench": Stage("benchmarks.gpu.bench", "times, beside eager, compiled, graphed and flex"),
    "tune": Stage("benchmarks.gpu.tune", "fastest configurations; the table that auto chooses by"),
    "sanitize": Stage("benchmarks.gpu.sanitize", "compute-sanitizer over few small cases"),
    "training": Stage("benchmarks.gpu.training", "a language model's sizes, the demo, Fan's tasks"),
    "lm": Stage("benchmarks.gpu.lm", "language models: loops held against each other, by compute and time"),
    "autotune": Stage(
        "benchmarks.gpu.autotune", "times of torch.compile's max-autotune; where asked for", by_name=True
    ),
}
