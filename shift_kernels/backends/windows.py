"""What resident GPU backends do around launches: tensors of a forward, windows of loops of a backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from shift_kernels.backends.device import refuse_in_capture
from shift_kernels.call import CallOptions, without_pads
from shift_kernels.spec import BlockSpec

_FOREVER = 2**31 - 1  # more loops than any sample asks for: its own number decides


@dataclasses.dataclass
class Forward:
    """Tensors of one forward launch, on e's device.

    Args:
        own_loops: each sample's T, int64 [batch]; None where all have the same.
        most: T, or no less than any sample's.
        used: loops used, int64 [batch]; with halting for the kernel to write.
        h: for h_T, or with return_all_loops for all h_t.
    """

    own_loops: Tensor | None
    most: int
    used: Tensor
    h: Tensor

    @classmethod
    def of(cls, e: Tensor, options: CallOptions, for_backward: bool) -> Forward:
        """For a call. Waits for the device only where the number of states to return or keep is needed."""
        known = not isinstance(options.n_loops, Tensor) or options.return_all_loops or for_backward
        refuse_in_capture(e, options, asks_for_loops=known)
        own = options.sample_loops(e.device)
        most = options.max_loops() if known else _FOREVER
        used = torch.full((e.shape[0],), most, device=e.device) if own is None else own
        if own is not None and options.halt_threshold is not None:
            used = own.clone()
        shape = (most, *e.shape) if options.return_all_loops else e.shape
        return cls(own, most, used, torch.empty(shape, dtype=e.dtype, device=e.device))


def seq_lens_on(e: Tensor, options: CallOptions) -> Tensor | None:
    """The lengths, int64 [batch], on e's device."""
    return None if options.seq_lens is None else options.seq_lens.to(e.device, torch.int64).contiguous()


@dataclasses.dataclass
class Window:
    """One launch of a backward: the loops low + 1 .. high, and what goes from launch to launch.

    Args:
        dh: gradient of h_high, becomes that of h_low; float32 like e.
        de: with injection gradient of e so far; else dh itself.
        operands: where the kernel writes the weight gradients' operands.
    """

    low: int
    high: int
    dh: Tensor
    de: Tensor
    operands: Any


class OperandGradients(Protocol):
    """Sums weight gradients from the operands that launches write."""

    def loops_per_launch(self, tokens: int) -> int:
        """How many loops' operands may be alive at once."""

    def operands(self, rows: int, *, untouched: bool) -> Any:
        """Room for a launch to write to; zeros where it may leave a sample's loops ``untouched``."""

    def add(self, operands: Any) -> None:
        """Add what a launch wrote."""


def backward_through_windows(
    grad_h: Tensor,
    e: Tensor,
    spec: BlockSpec,
    options: CallOptions,
    n_states: int,
    gradients: OperandGradients,
    launch: Callable[[Window], None],
) -> Tensor:
    """Gradient of e, in e's dtype: launches over windows of loops, the last loops first.

    Args:
        grad_h: gradient of what the forward returned.
        n_states: loops of which the forward kept states.
        gradients: where the weight gradients are summed.
        launch: runs the kernel for a window.
    """
    tokens, per_sample = e.shape[0] * e.shape[1], isinstance(options.n_loops, Tensor)
    if options.return_all_loops:
        dh = torch.zeros(e.shape, dtype=torch.float32, device=e.device)
    else:
        dh = without_pads(grad_h, options.seq_lens).to(torch.float32, copy=True)
    de = torch.zeros_like(dh) if spec.injection == "add" else dh
    # Where samples have loops of their own, the host does not know which are the last k of each.
    all_carry = per_sample or options.n_grad_loops is None
    end = 0 if all_carry else max(n_states - options.n_grad_loops, 0)  # type: ignore[operator]
    step = gradients.loops_per_launch(tokens)
    for high in range(n_states, end, -step):
        low = max(high - step, end)
        operands = gradients.operands((high - low) * tokens, untouched=per_sample)
        launch(Window(low, high, dh, de, operands))
        gradients.add(operands)
        del operands  # before the next window's are made
    if end > 0 and spec.injection != "add":  # every sample's first loops carry no gradient
        de = torch.zeros_like(de)
    return de.to(e.dtype)
