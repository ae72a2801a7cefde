"""Muon for sharded matrices, AdamW for all other shards.

Weights and momentum stay in shards. What Muon makes orthogonal is a whole matrix, so the updates of all ranks
are gathered, one matrix after another; every rank computes the direction, and takes its own rows of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from shift.run.ranks import Ranks
from shift.run.sharded import ShardedAdamW, joined

MOMENTUM = "momentum_buffer"


class ShardedMuon(ShardedAdamW):
    """The steps of :class:`shift.run.muon.FlatMuon`, in shards.

    Args:
        matrices: groups of sharded two-dimensional parameters.
        others: groups of all other sharded parameters.
        momentum: of Muon.
        ranks: that have the other shards.
        options: lr, betas.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        momentum: float,
        ranks: Ranks,
        **options: Any,
    ) -> None:
        super().__init__(others, ranks, **options)
        self._factor = momentum
        self._matrices = [{**group, "lr": options["lr"]} for group in matrices]
        self._shard_of = {
            p: shard
            for group, local in zip(matrices, self._in_shards(matrices), strict=True)
            for p, shard in zip(group["params"], local["params"], strict=True)
        }
        self._momentum = {p: torch.zeros_like(shard) for p, shard in self._shard_of.items()}
        self.param_groups = [*self._matrices, *self.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """See :class:`ShardedAdamW`."""
        return {**super().state, **{p: {MOMENTUM: buffer} for p, buffer in self._momentum.items()}}

    @torch.no_grad()
    def clip_and_step(self, norm: Tensor, clip: float, skipped: Tensor) -> None:
        """See :meth:`ShardedAdamW.clip_and_step`."""
        share = (norm / clip).clamp(min=1.0)
        for group in self._matrices:
            for p in group["params"]:
                shard, momentum = self._shard_of[p], self._momentum[p]
                gradient = shard.grad / share
                after = momentum.lerp(gradient, 1 - self._factor)
                moved = _direction(joined(gradient.lerp(after, self._factor), p), group["lr"])
                decayed = shard * (1 - group["lr"] * group["weight_decay"])
                for x, new in ((momentum, after), (shard, decayed + moved)):
                    torch.where(skipped, x, new, out=x)
        super().clip_and_step(norm, clip, skipped)

    @torch.no_grad()
    def scale_moments(self, share: float) -> None:
        """See :meth:`ShardedAdamW.scale_moments`."""
        for momentum in self._momentum.values():
            momentum.mul_(share)
        super().scale_moments(share)

    def moments(self) -> dict[str, dict[DTensor, DTensor]]:
        """See :class:`ShardedAdamW`."""
        return {**super().moments(), MOMENTUM: {p: joined(x, p) for p, x in self._momentum.items()}}


def _direction(update: DTensor, lr: float) -> Tensor:
    """This rank's part of the step that ``torch.optim.Muon`` makes of an update."""
    step = torch.nn.Parameter(torch.zeros(update.shape, device=update.device))
    step.grad = update.full_tensor()
    options: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    torch.optim.Muon([step], lr=lr, **options).step()
    # All ranks have computed the same, so that nothing is sent.
    own = distribute_tensor(step.detach(), update.device_mesh, update.placements, src_data_rank=None)
    return own.to_local()
