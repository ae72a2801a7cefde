"""AdamW whose parameters, gradients and moments lie in flat tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

ALIGNMENT = 16
"""Numbers; a parameter begins at a multiple of so many, 64 bytes, as a tensor of its own does."""


class FlatAdamW(torch.optim.AdamW):
    """Fused AdamW of parameters that lie in one flat tensor, as do their gradients and both moments.

    A small model's step costs what its operations number, not what they compute: here the norm of all
    gradients, their sum over ranks, their reset and a group's update take one operation each. For everybody
    else nothing changes: parameters, ``.grad``, ``param_groups`` and ``state`` are views of these tensors.

    Fused, because its ``found_inf`` lets the device itself skip a bad step, on CPU and CUDA alike.

    Args:
        groups: of parameters of one dtype on the device where they are to stay. Their memory moves at once.
        flat: weights and gradients of these parameters, if :func:`lay_flat` has moved them already.
        options: lr, betas.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], flat: tuple[Tensor, Tensor] | None = None, **options: Any
    ) -> None:
        super().__init__(groups, fused=True, **options)
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        self.weights, self.gradients = lay_flat(self._parameters) if flat is None else flat
        first_moments, firsts = flat_like(self._parameters)
        second_moments, seconds = flat_like(self._parameters)

        steps = [torch.zeros((), device=self.weights.device) for _ in self.param_groups]
        tensors = (self.weights, self.gradients, first_moments, second_moments)
        sizes = [sum(room(p) for p in group["params"]) for group in self.param_groups]
        self._parts = list(zip(*(x.split(sizes) for x in tensors), steps, strict=True))
        steps_of = [s for s, g in zip(steps, self.param_groups, strict=True) for _ in g["params"]]
        self._states = [
            {"step": step, "exp_avg": first, "exp_avg_sq": second}
            for step, first, second in zip(steps_of, firsts, seconds, strict=True)
        ]
        self.state.update(zip(self._parameters, self._states, strict=True))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all weights; as torch's own, by ``grad_scale`` and ``found_inf`` where they are set."""
        for group, (weights, gradients, first, second, step) in zip(
            self.param_groups, self._parts, strict=True
        ):
            beta1, beta2 = group["betas"]
            adamw(
                [weights], [gradients], [first], [second], [], [step], fused=True, amsgrad=False,
                beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
                eps=group["eps"], maximize=False, grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )  # fmt: skip

    @property
    def pieces(self) -> list[Tensor]:
        """The weights, in the few tensors in which they lie."""
        return [self.weights]

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients, 0-d."""
        return torch.linalg.vector_norm(self.gradients)

    def clip_and_step(self, norm: Tensor, clip: float, skipped: Tensor) -> None:
        """:meth:`step` with gradients clipped, without a pass over them: the kernel divides on its way.

        Args:
            norm: 0-d, of all gradients.
            clip: the largest norm.
            skipped: bool, 0-d: whether to leave weights and state as they are.
        """
        self.grad_scale = (norm / clip).clamp_(min=1.0)
        self.found_inf = skipped.float()
        self.step()

    @torch.no_grad()
    def scale_moments(self, share: float) -> None:
        """Go on as if all gradients so far had been so much smaller; 0: as if there had been none."""
        for _, _, first, second, step in self._parts:
            first.mul_(share)
            second.mul_(share**2)
            if share == 0:
                step.zero_()

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Reset all gradients, which stay views."""
        self.gradients.zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` gave.

        Raises:
            ValueError: it is of other parameters or options.
        """
        options = [_options(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        if [_options(group) for group in self.param_groups] != options:
            raise ValueError("the options of another optimiser")
        for p, own in zip(self._parameters, self._states, strict=True):
            loaded = self.state[p]
            if {name: x.shape for name, x in loaded.items()} != {name: x.shape for name, x in own.items()}:
                raise ValueError("the state of other parameters")
            for name, x in loaded.items():
                own[name].copy_(x)
            self.state[p] = own


def _options(group: dict[str, Any]) -> tuple[Any, ...]:
    """What the config says of a parameter group; the learning rate is set anew at every step."""
    return tuple(group["betas"]), group["eps"], group["weight_decay"]


def lay_flat(parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Move parameters into one flat tensor, and give them gradients, zero, in another; returns the two."""
    flat_weights, weights = flat_like(parameters)
    flat_gradients, gradients = flat_like(parameters)
    for p, weight, gradient in zip(parameters, weights, gradients, strict=True):
        p.data, p.grad = weight.copy_(p.detach()), gradient
    return flat_weights, flat_gradients


def flat_like(parameters: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Zeros with room for all parameters, and each one's view."""
    parameters = list(parameters)
    sizes = [room(p) for p in parameters]
    flat = parameters[0].new_zeros(sum(sizes))
    views = [x[: p.numel()].view_as(p) for x, p in zip(flat.split(sizes), parameters, strict=True)]
    return flat, views


def room(parameter: Tensor) -> int:
    """Numbers that a parameter takes up in a flat tensor."""
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
