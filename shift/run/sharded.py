"""AdamW of sharded weights: each rank moves its shards, and all skip and clip alike.

A step of AdamW asks nothing of other shards but the norm of all gradients, so it works on the shards as plain
tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shift.run.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamW:
    """See :class:`shift.run.flat.FlatAdamW` for what each method does.

    Args:
        groups: of sharded parameters (DTensors).
        ranks: that have the other shards.
        options: lr, betas.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], ranks: Ranks, **options: Any) -> None:
        self._ranks = ranks
        self.parameters: list[DTensor] = []
        self._shards: list[torch.nn.Parameter] = []
        self._adamw = torch.optim.AdamW(self._in_shards(groups), fused=True, **options)
        for shard in self._shards:
            zeros = {key: torch.zeros_like(shard) for key in MOMENTS}
            self._adamw.state[shard] = {"step": torch.zeros((), device=shard.device), **zeros}
        self.param_groups = [
            {**group, "params": outer["params"]}
            for group, outer in zip(self._adamw.param_groups, groups, strict=True)
        ]
        self._adamw_groups = list(zip(self._adamw.param_groups, self.param_groups, strict=True))

    def _in_shards(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Take groups of parameters in; returns the same groups of this rank's shards."""
        local = []
        for group in groups:
            # The same memory as the shards', so that what is written here is what is gathered.
            shards = [torch.nn.Parameter(p.to_local().detach()) for p in group["params"]]
            self.parameters += group["params"]
            self._shards += shards
            local.append({**group, "params": shards})
        return local

    @property
    def state(self) -> dict[Any, Any]:
        """The state of each parameter: of its shard."""
        pairs = zip(self.parameters, self._shards, strict=True)
        return {p: self._adamw.state[shard] for p, shard in pairs if shard in self._adamw.state}

    @property
    def pieces(self) -> list[Tensor]:
        """The shards of this rank."""
        return [shard.detach() for shard in self._shards]

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients of all ranks, 0-d."""
        squares = torch.zeros((), device=self._shards[0].device)
        for p, shard in zip(self.parameters, self._shards, strict=True):
            shard.grad = torch.zeros_like(shard) if p.grad is None else _local(p.grad)
            squares += shard.grad.float().square().sum()
        return self._ranks.sum(squares).sqrt()

    def clip_and_step(self, norm: Tensor, clip: float, skipped: Tensor) -> None:
        """See :meth:`shift.run.flat.FlatAdamW.clip_and_step`; after :meth:`gradient_norm`."""
        for mine, theirs in self._adamw_groups:
            mine["lr"] = theirs["lr"]
        self._adamw.grad_scale = (norm / clip).clamp_(min=1.0)  # type: ignore[attr-defined]
        self._adamw.found_inf = skipped.float()  # type: ignore[attr-defined]
        self._adamw.step()

    @torch.no_grad()
    def scale_moments(self, share: float) -> None:
        """See :meth:`shift.run.flat.FlatAdamW.scale_moments`."""
        for state in self._adamw.state.values():
            state["exp_avg"].mul_(share)
            state["exp_avg_sq"].mul_(share**2)
            if share == 0:
                state["step"].zero_()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters:
            p.grad = None

    def sharded(self, shards: Sequence[Tensor]) -> dict[DTensor, DTensor]:
        """Tensors like :attr:`pieces` as the sharded tensors that they are parts of, by their parameters."""
        return {p: joined(shard, p) for p, shard in zip(self.parameters, shards, strict=True)}

    def moments(self) -> dict[str, dict[DTensor, DTensor]]:
        """Each moment, sharded, in this optimiser's memory, by the parameters that have it."""
        return {
            key: {p: joined(own[key], p) for p, own in self.state.items() if key in own} for key in MOMENTS
        }

    def whole(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Sharded tensors put together, on rank 0; called on all ranks."""
        found = []
        for x in tensors:
            full = x.full_tensor() if isinstance(x, DTensor) else x
            if self._ranks.rank == 0:
                found.append(full.detach().cpu())
        return found

    def state_dict(self) -> dict[str, Any]:
        """What no shard holds: the steps of each parameter."""
        return {"steps": [own["step"].item() for own in self._adamw.state.values()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` gave; the moments are read into :meth:`moments`.

        Raises:
            ValueError: it is of other parameters.
        """
        steps = state_dict["steps"]
        if len(steps) != len(self._adamw.state):
            raise ValueError("the state of other parameters")
        for own, step in zip(self._adamw.state.values(), steps, strict=True):
            own["step"].fill_(step)


def joined(shard: Tensor, like: DTensor) -> DTensor:
    """The sharded tensor that a shard of this rank is a part of, as a parameter's is."""
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _local(x: Tensor) -> Tensor:
    """The part of this rank."""
    assert isinstance(x, DTensor), "FSDP leaves sharded gradients"
    return x.to_local()
