"""The global batch of a step: the same sequences whatever the number of ranks that share it.

It is the batches of the ranks that the run began with, its *streams*, one behind the other. A run that goes
on with another number of ranks deals the same rows out anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from shift.tasks.base import Batch, Task, joined
from shift_kernels.errors import input_error


@dataclass(frozen=True)
class GlobalBatch:
    """Who has which rows.

    Args:
        batch_size: rows of a stream.
        n_streams: ranks that the run began with.
        rank, n_ranks: this process, of how many.

    Raises:
        ShiftInputError: fewer rows than ranks.
    """

    batch_size: int
    n_streams: int
    rank: int
    n_ranks: int

    def __post_init__(self) -> None:
        if self.size < self.n_ranks:
            raise input_error(
                "shift.Trainer", "world_size", self.n_ranks, f"at most {self.size}, the sequences of a step",
                "Start fewer processes.",
            )  # fmt: skip

    @property
    def size(self) -> int:
        """Rows of all ranks."""
        return self.batch_size * self.n_streams

    @property
    def own(self) -> range:
        """The rows of this rank."""
        return range(self.rank * self.size // self.n_ranks, (self.rank + 1) * self.size // self.n_ranks)

    @property
    def streams(self) -> range:
        """The streams that they are from."""
        return range(self.own[0] // self.batch_size, self.own[-1] // self.batch_size + 1)

    def part(self, task: Task, step: int) -> Batch:
        """This rank's batch."""
        parts = []
        for stream in self.streams:
            batch = task.batch(self.batch_size, step, rank=stream, n_ranks=self.n_streams)
            first = stream * self.batch_size
            start, stop = max(self.own[0] - first, 0), min(self.own[-1] + 1 - first, self.batch_size)
            parts.append(batch if stop - start == self.batch_size else batch.rows(start, stop))
        return joined(parts)
