"""FSDP2: the model in shards. Imported only where it is asked for, as torch takes seconds to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shift.config import TrainConfig
from shift.run import checkpoint
from shift.run.average import WeightAverage
from shift.run.optim import for_muon, parameter_groups
from shift.run.ranks import Ranks
from shift.run.sharded import ShardedAdamW
from shift.run.sharded_muon import ShardedMuon
from shift.run.shards import tensors_of
from shift_kernels import LoopedBlock
from shift_kernels.errors import input_error


class Sharded:
    """A part of each tensor on every rank. Of a block all is gathered once a step, whatever its loops.

    Gathered weights stay until the backward of the last micro-batch. In bf16 blocks are gathered as bf16;
    shards, gradients and the residual stream are fp32.

    Args:
        model, config, ranks: as of :class:`shift.run.parallel.Replicated`. The model is equal on all ranks.

    Raises:
        ShiftInputError: there is no process group.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, ranks: Ranks) -> None:
        if not dist.is_initialized():
            raise input_error(
                "shift.Trainer", "parallel", "fsdp", "a process group",
                "Start with torchrun or shift-train, or call torch.distributed.init_process_group.",
            )  # fmt: skip
        groups = parameter_groups(model, config.optimiser)
        names = {id(p): name for name, p in model.named_parameters()}
        named = [[names[id(p)] for p in group["params"]] for group in groups]
        device = next(model.parameters()).device
        mesh = init_device_mesh(device.type, (ranks.size,))
        compute = torch.bfloat16 if config.precision == "bf16" else None
        policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
        for module in model.modules():
            if isinstance(module, LoopedBlock):
                fully_shard(module, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        self._model, self._ranks = model, ranks
        shards = dict(model.named_parameters())
        groups = [
            {**group, "params": [shards[name] for name in own]}
            for group, own in zip(groups, named, strict=True)
        ]
        optimiser = config.optimiser
        options: dict[str, Any] = {"lr": optimiser.lr, "betas": optimiser.betas}
        self.optimizer: ShardedAdamW
        if optimiser.kind == "muon":
            matrices, others = for_muon(model, groups)
            self.optimizer = ShardedMuon(matrices, others, optimiser.momentum, ranks, **options)
        else:
            self.optimizer = ShardedAdamW(groups, ranks, **options)

    def begin_micro_batch(self, last: bool) -> None:
        """See :class:`shift.run.parallel.Parallel`."""
        for module in self._modules():
            module.set_requires_gradient_sync(last, recurse=False)
            module.set_reshard_after_backward(last, recurse=False)

    def average_gradients(self) -> None:
        """Nothing is left to do: FSDP has averaged them in the backward."""

    def gather(self) -> None:
        """See :class:`shift.run.parallel.Parallel`."""
        for module in self._modules():
            module.unshard()

    def release(self) -> None:
        """See :class:`shift.run.parallel.Parallel`."""
        for module in self._modules():
            module.reshard()

    def save(
        self,
        directory: Path,
        step: int,
        model: nn.Module,
        average: WeightAverage | None,
        state: dict[str, Any],
        keep: int,
    ) -> None:
        """See :class:`shift.run.parallel.Parallel`."""
        tensors = tensors_of(model, self.optimizer, average)
        state = state | {"optimizer": self.optimizer.state_dict()}
        checkpoint.save_shards(directory, step, tensors, state, keep, self._ranks)

    def digests(self, model: nn.Module) -> dict[str, str]:
        """See :class:`shift.run.parallel.Parallel`."""
        names = [name for name, _ in model.named_parameters()]
        whole = self.optimizer.whole([p for _, p in model.named_parameters()])
        weights = dict(zip(names, whole, strict=True)) if whole else {}
        moments = self.optimizer.moments()
        state: Any = {key: self.optimizer.whole(of.values()) for key, of in moments.items()}
        state["state"] = self.optimizer.state_dict()
        return {"weights_sha256": checkpoint.digest(weights), "optimizer_sha256": checkpoint.digest(state)}

    def _modules(self) -> list[FSDPModule]:
        return [module for module in self._model.modules() if isinstance(module, FSDPModule)]
