"""Sharded tensors in files: safetensors written by ``torch.distributed.checkpoint``, a file a rank.

They hold where each part belongs, so any number of ranks reads them, or one process without any.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from shift.run.average import WeightAverage
from shift.run.sharded import ShardedAdamW

WEIGHTS, AVERAGE = "weights", "average"


def tensors_of(model: nn.Module, optimizer: ShardedAdamW, average: WeightAverage | None) -> dict[str, Tensor]:
    """All that is in shards, by the names in the files, in the memory of its owners."""
    names = {id(p): name for name, p in model.named_parameters()}
    parts = {WEIGHTS: {p: p for p in optimizer.parameters}, **optimizer.moments()}
    if average is not None:
        parts[AVERAGE] = optimizer.sharded(average.pieces)
    return {f"{part}.{names[id(p)]}": x.detach() for part, of in parts.items() for p, x in of.items()}


def write(tensors: Mapping[str, Tensor], folder: Path, group: Any) -> None:
    """Write them into a folder that is there; called on all ranks of ``group``.

    Raises:
        OSError: a rank could not.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except dcp.api.CheckpointException as error:
        reason = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
        raise OSError(None, f"shards not written ({reason})", str(folder)) from error


def read(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Read into tensors, sharded or whole; each rank by itself.

    Raises:
        Exception: of many kinds; the files are not those of such tensors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
