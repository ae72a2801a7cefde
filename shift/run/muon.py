"""Muon for matrices and AdamW for all else, in the same flat tensors.

Muon's updates get the size of AdamW's (``match_rms_adamw``), so that both go by one learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shift.run.flat import FlatAdamW, flat_like, lay_flat, room


class FlatMuon:
    """``torch.optim.Muon`` beside :class:`FlatAdamW`, with that one's methods.

    Args:
        matrices: groups of two-dimensional parameters.
        others: groups of all other parameters.
        momentum: of Muon.
        options: lr, betas.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        momentum: float,
        **options: Any,
    ) -> None:
        own = [p for group in matrices for p in group["params"]]
        theirs = [p for group in others for p in group["params"]]
        self.weights, self.gradients = lay_flat([*own, *theirs])
        self._n = sum(map(room, own))
        flat = self.weights[self._n :], self.gradients[self._n :]
        self._adamw = FlatAdamW(others, flat, **options)
        self._muon = torch.optim.Muon(
            matrices, lr=options["lr"], momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        self._momentum, self._buffers = flat_like(own)
        self._parameters = own
        self._set_buffers()
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]

    def _set_buffers(self) -> None:
        for p, buffer in zip(self._parameters, self._buffers, strict=True):
            self._muon.state[p]["momentum_buffer"] = buffer

    @property
    def state(self) -> dict[Any, Any]:
        """The state of each parameter."""
        return {**self._muon.state, **self._adamw.state}

    @property
    def pieces(self) -> list[Tensor]:
        """See :class:`FlatAdamW`."""
        return [self.weights]

    def gradient_norm(self) -> Tensor:
        """See :class:`FlatAdamW`."""
        return torch.linalg.vector_norm(self.gradients)

    @torch.no_grad()
    def clip_and_step(self, norm: Tensor, clip: float, skipped: Tensor) -> None:
        """See :meth:`FlatAdamW.clip_and_step`. Muon cannot skip on the device: it is undone there."""
        weights, momentum = self.weights[: self._n], self._momentum
        before = weights.clone(), momentum.clone()
        self.gradients[: self._n] /= (norm / clip).clamp(min=1.0)
        self._muon.step()
        for x, old in zip((weights, momentum), before, strict=True):
            torch.where(skipped, old, x, out=x)
        self._adamw.clip_and_step(norm, clip, skipped)

    @torch.no_grad()
    def scale_moments(self, share: float) -> None:
        """See :meth:`FlatAdamW.scale_moments`."""
        self._momentum.mul_(share)
        self._adamw.scale_moments(share)

    def zero_grad(self) -> None:
        """Reset all gradients, which stay views."""
        self.gradients.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Those of both."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` gave.

        Raises:
            ValueError, KeyError: it is of other parameters or options.
        """
        settings = [_settings(group) for group in self._muon.param_groups]
        groups = self._muon.param_groups
        self._muon.load_state_dict(state_dict["muon"])
        if [_settings(group) for group in self._muon.param_groups] != settings:
            raise ValueError("the options of another optimiser")
        for p, buffer in zip(self._parameters, self._buffers, strict=True):
            loaded = self._muon.state[p]["momentum_buffer"]
            if loaded.shape != buffer.shape:
                raise ValueError("the state of other parameters")
            buffer.copy_(loaded)
        self._set_buffers()
        self._muon.param_groups = groups
        self._adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*groups, *self._adamw.param_groups]


def _settings(group: dict[str, Any]) -> tuple[Any, ...]:
    return group["momentum"], group["weight_decay"]
