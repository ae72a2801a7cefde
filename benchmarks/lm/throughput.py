"""How many windows a second a language model trains on, against a plain PyTorch script of the same model.

    python -m benchmarks.lm.throughput [--out benchmarks/results/lm]      # throughput.json, .md

Runners, rounds and rules are those of :mod:`benchmarks.training.throughput`. A window has 256 tokens. With
one loop the model is a GPT in nanoGPT's manner, layers from first to last, and of as many parameters.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.training.throughput import Case, run

GPT = str(Path(__file__).with_name("gpt.toml"))
ROUNDS = 8


def _case(d_model: int, n_loops: int, precision: str) -> Case:
    layers = "1 + 2 x 4 + 1 layers" if n_loops > 1 else "4 layers, no loop"
    title = f"d_model {d_model}, {layers}" + (", bf16" if precision == "bf16" else "")
    model = {"d_model": d_model, "d_ff": 4 * d_model, "n_loops": n_loops}
    return Case(GPT, title, steps=1, rounds=ROUNDS, warm_up=2, precision=precision, model=model)


CASES = tuple(
    _case(d_model, n_loops, precision)
    for d_model in (64, 128, 256)
    for n_loops in (4, 1)
    for precision in ("fp32", "bf16")
)


if __name__ == "__main__":
    run(CASES, "benchmarks.lm.throughput", __doc__, Path("benchmarks/results/lm"))
