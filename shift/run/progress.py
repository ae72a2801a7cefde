"""What a run has done so far: its ledger, which is part of every checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shift.reading import is_count, is_number


@dataclass
class Progress:
    """Counters start at 0. Steps are optimiser steps; times are in seconds, of all sittings of the run."""

    step: int = 0
    flops: float = 0
    block_applications: float = 0.0
    switch_step: int | None = None
    skipped_steps: int = 0
    skips_in_row: int = 0
    train_s: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    initial_weights_sha256: str = ""
    last_eval: dict[str, Any] = dataclasses.field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Progress:
        """The inverse of :meth:`state_dict`; older checkpoints hold more.

        Raises:
            ValueError, TypeError: not a state of this kind.
        """
        fields = dataclasses.fields(Progress)
        progress = Progress(**{f.name: state[f.name] for f in fields if f.name in state})
        for field in fields:
            if not _HOLDS[field.type](getattr(progress, field.name)):  # type: ignore[index]
                raise ValueError(f"progress.{field.name} = {getattr(progress, field.name)!r:.50}")
        if progress.last_eval and not is_count(progress.last_eval["n_loops"]):
            raise ValueError("progress.last_eval.n_loops is not a count")
        return progress

    def enter(self, mean_loops: float, flops: float) -> None:
        """Enter a step.

        Args:
            mean_loops: that the samples ran, on average.
            flops: of all ranks.
        """
        self.step += 1
        self.block_applications += mean_loops
        self.flops += flops

    def enter_skip(self, skipped: bool) -> None:
        """Enter whether a step was skipped; steps come in order."""
        self.skipped_steps += skipped
        self.skips_in_row = self.skips_in_row + 1 if skipped else 0

    def costs(self) -> dict[str, Any]:
        """What a row of metrics says about compute."""
        return {"flops": self.flops, "block_applications": self.block_applications}


def _is_amount(value: Any) -> bool:
    return is_number(value) and value >= 0


_HOLDS = {
    "int": is_count,
    "float": _is_amount,
    "int | None": lambda value: value is None or is_count(value),
    "str": lambda value: isinstance(value, str),
    "dict[str, Any]": lambda value: isinstance(value, dict),
}
"""By the type that a field declares: whether a decoded value is one."""
