"""A line for whoever watches a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TextIO

from shift.run.speed import Pace


class Console:
    """One line per report; below a bar on a terminal, plain in a log file."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        self._total = total_steps
        self._stream = stream or sys.stderr
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, file=self._stream, unit="step", dynamic_ncols=True)

    def train(self, row: Mapping[str, Any], pace: Pace) -> None:
        """The state after a step: its metrics row, and how fast the last steps went."""
        share = "unknown" if pace.flops_share is None else f"{100 * pace.flops_share:.1f}%"
        facts = (
            f"loss {_short(row['loss'])} | lr {row['lr']:.1e} | grad {_short(row['grad_norm'])} | "
            f"T {row['n_loops']} stage {row['stage']} | {pace.ms:.1f} ms | {pace.tokens_per_s:,.0f} tok/s | "
            f"MFU {share} | {pace.memory_bytes / 2**20:,.0f} MiB"
        )
        if self._bar is not None:
            self._bar.update(row["step"] - self._bar.n)
            self._bar.set_postfix_str(facts)
        else:
            eta = (self._total - row["step"]) * pace.ms / 1e3
            self.say(f"step {row['step']:5d}/{self._total} | {facts} | eta {eta:.0f} s")

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """The result of an evaluation: its metrics row."""
        bits = f" | bits/byte {_short(row['bits_per_byte'])}" if "bits_per_byte" in row else ""
        self.say(
            f"eval {row['step']:5d}/{self._total} | loss {_short(row['loss'])}{bits} | T {row['n_loops']} | "
            f"accuracy {row['accuracy']:.4f} | exact {row['exact']:.4f}"
        )

    def say(self, text: str) -> None:
        """Any other line."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
