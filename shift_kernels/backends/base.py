"""What a backend is, and the registries that ``auto`` chooses from. A third party registers its own:

class Mine:                          # no base class: the methods of Backend are the contract
    name, saves = "mine", False
    def why_not(self, problem): ...
    ...

shift_kernels.register(Mine())       # from now on a candidate of looped_block(backend="auto" or "mine")
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from shift_kernels.cache import Step
from shift_kernels.call import AttentionProblem, CallOptions, Problem
from shift_kernels.errors import type_error
from shift_kernels.spec import BlockSpec


class Kind(enum.Enum):
    """The kinds of no, which ``auto`` treats differently."""

    ABSENT = "cannot run on this machine"
    FOREIGN = "is for other tensors"
    UNSERVED = "does not serve a problem of its own kind: a slow path that the user is told of"
    UNVERIFIED = "serves it, but only by name or once it was verified on this device"
    SLOWER = "serves it, but a later backend was measured to be faster: only by name, or by measurement"


class WhyNot(NamedTuple):
    """Why a backend does not serve a problem."""

    kind: Kind
    words: str

    @classmethod
    def of(cls, kind: Kind, words: str | None) -> WhyNot | None:
        """None where there are no words."""
        return None if words is None else cls(kind, words)

    @property
    def runs(self) -> bool:
        """Whether the backend can run the problem, if it is named."""
        return self.kind in (Kind.UNVERIFIED, Kind.SLOWER)


UNVERIFIED = WhyNot(Kind.UNVERIFIED, "not verified on this device: run shift-calibrate, or name it to try it")


@dataclasses.dataclass(frozen=True)
class Served:
    """The options that a backend serves. What is not listed it refuses by name, and so whatever is new.

    Args:
        block: by field of :class:`BlockSpec`, the values that it serves; a type stands for all of its own.
        call: names of :data:`shift_kernels.call.OWN_OPTIONS`.
    """

    block: Mapping[str, Collection[object]]
    call: Collection[str] = ()

    def refusal(self, problem: Problem) -> str | None:
        """Why the backend does not serve a problem's options, in words; None where it does."""
        for name, default in _DEFAULTS.items():
            value = getattr(problem.spec, name)
            if value != default and not self.serves(name, value):
                return f"{name}={value!r} is not served"
        return next((f"{name}= is not served" for name in problem.options if name not in self.call), None)

    def serves(self, name: str, value: object) -> bool:
        """Whether a field of the block may have a value other than its default."""
        served = self.block.get(name, ())
        return value in served or type(value) in served


SERVED_BY_ALL: Mapping[str, Collection[object]] = {
    "activation": ("relu", "gelu", "gelu_tanh", "swiglu", "relu2"),
    "norm": ("layernorm", "rmsnorm", "none"),
    "norm_placement": ("pre", "post", "sandwich"),
    "norm_eps": (float,),
    "bias": (bool,),
    "causal": (bool,),
    "position": ("none", "rope"),
    "rope_theta": (float,),
    "injection": ("none", "add"),
    "loop_norm": (bool,),
    "residual_scale": (float,),
}
"""By field, the values that every backend serves; of a field that is not listed, the default alone."""
_SIZES = ("d_model", "n_heads", "n_kv_heads", "head_dim", "n_layers", "d_ff")
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(BlockSpec) if f.init and f.name not in _SIZES}


class Backend(Protocol):
    """Runs looped blocks.

    Attributes:
        name: what ``backend=`` takes.
        saves: whether ``forward`` keeps tensors for ``backward``.
    """

    name: str
    saves: bool

    def why_not(self, problem: Problem | None) -> WhyNot | None:
        """Why the backend does not serve a problem; None where it does.

        Asked with None it speaks of the machine alone. ``UNVERIFIED`` only if nothing else is in the way.
        """

    def describe(self, problem: Problem) -> str:
        """How it would run a problem, in a phrase."""

    def saved_bytes(self, problem: Problem) -> int:
        """Bytes kept for the backward pass, per loop."""

    def saved_like(
        self, e: Tensor, spec: BlockSpec, n_loops: int, compute_dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Empty tensors shaped as what ``forward`` saves; e's sizes and n_loops may be symbolic."""

    def forward(
        self, e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, for_backward: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """h_T (or all h_t), the loops used int64 [batch], and what ``backward`` needs beside the inputs."""

    def backward(
        self,
        grad_h: Tensor,
        e: Tensor,
        weights: dict[str, Tensor],
        spec: BlockSpec,
        options: CallOptions,
        saved: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of e and of the weights, in the order of ``weights``; behind them, where the options hold
        an h0, its gradient."""


@runtime_checkable
class ExtendsCache(Protocol):
    """A backend that serves calls with a cache, too."""

    def extend(
        self, e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, step: Step
    ) -> Tensor:
        """h_T (or all h_t) of the tokens e, which see those in the step's cache and are appended to it."""


@runtime_checkable
class Prepares(Protocol):
    """A backend that compiles something for a problem before it is measured."""

    def prepare(self, problem: Problem, say: Callable[[str], object]) -> None:
        """Get ready to run the problem; ``say`` gets a line of progress."""


class AttentionBackend(Protocol):
    """Runs :func:`shift_kernels.attention`."""

    name: str

    def why_not(self, problem: AttentionProblem | None) -> WhyNot | None:
        """As :meth:`Backend.why_not`."""

    def describe(self, problem: AttentionProblem) -> str:
        """How it would run a problem, in a phrase."""

    @property
    def attention(self) -> Callable[..., Tensor]:
        """``attention(q, k, v, *, causal, seq_lens, **own)``: of checked arguments, differentiable; ``own``:
        what ``problem.options`` named."""


B = TypeVar("B", Backend, AttentionBackend)


class Registry(Generic[B]):
    """The backends of one function, in the order in which ``auto`` asks them; the last one serves everything.

    Args:
        function: its name, as the user calls it.
        contract: the methods that a backend must have.
    """

    def __init__(self, function: str, contract: type) -> None:
        self.function, self._contract = function, contract
        self._backends: list[B] = []

    def __iter__(self) -> Iterator[B]:
        return iter(self._backends)

    def names(self) -> list[str]:
        """In order."""
        return [b.name for b in self]

    def get(self, name: str) -> B:
        """The backend of this name, which must be one of :meth:`names`."""
        return next(b for b in self if b.name == name)

    def register(self, backend: B) -> None:
        """Let ``auto`` ask this backend first; an earlier one of the same name is replaced.

        Raises:
            ShiftTypeError: it lacks a method or attribute of the contract.
        """
        needed = [n for n in (*self._contract.__annotations__, *vars(self._contract)) if n[0] != "_"]
        missing = [name for name in needed if not hasattr(backend, name)]
        if missing:
            raise type_error(
                "shift_kernels.register",
                "backend",
                type(backend).__name__,
                f"an object with {', '.join(needed)}",
                f"Add {', '.join(missing)}.",
            )
        self.remove(backend.name)
        self._backends.insert(0, backend)

    def remove(self, name: str) -> None:
        """Take a backend out, if it is there."""
        self._backends = [b for b in self._backends if b.name != name]


LOOPED_BLOCK: Registry[Backend] = Registry("shift_kernels.looped_block", Backend)
ATTENTION: Registry[AttentionBackend] = Registry("shift_kernels.attention", AttentionBackend)
