"""What a run is: a tree of dataclasses that a TOML file can hold. The object is the API, flags are sugar.

Two runs with equal configs on equal machines write the same bytes; `differing_key` is how a resumed run
makes sure that it continues what it thinks it continues.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shift_kernels import BlockSpec
from shift_kernels.errors import input_error, type_error

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Options = dict[str, int | float | bool | str | list[int]]
"""A table of constructor arguments of something chosen by name."""

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class TaskConfig:
    """Where the samples come from."""

    name: str = "hop"
    """A key of shift.tasks.TASKS."""
    seed: int = 0
    """Data seed; apart from the model's, so that arms can share data."""
    options: Options = field(default_factory=dict)
    """Arguments of the task."""


@dataclass(frozen=True)
class ModelConfig:
    """The looped transformer; the fields of shift_kernels.BlockSpec say more."""

    n_loops: int = 4
    """T, the most loops a schedule may ask for."""
    d_model: int = 64
    """Width of the residual stream."""
    n_heads: int = 4
    """Attention heads."""
    n_layers: int = 1
    """Layers in one loop body."""
    d_ff: int = 256
    """Hidden width of the MLP; 0: attention only."""
    activation: str = "gelu"
    """relu, gelu, gelu_tanh or swiglu."""
    norm: str = "layernorm"
    """layernorm, rmsnorm or none."""
    norm_placement: str = "pre"
    """pre, post or sandwich."""
    injection: str = "add"
    """add: every loop reads h + e; none: h starts as e."""
    loop_norm: bool = False
    """A final norm inside every loop (Fan et al., arXiv 2409.15647)."""
    position: str = "none"
    """none or rope."""
    learned_positions: bool = True
    """Add a learned embedding of the position to e."""
    final_norm: bool = True
    """A norm between the last loop and the head."""

    def block_spec(self, causal: bool) -> BlockSpec:
        """The loop body; whether it is causal is the task's business."""
        names = {f.name for f in dataclasses.fields(BlockSpec) if f.init}
        return BlockSpec(causal=causal, **{k: v for k, v in vars(self).items() if k in names})


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with global-norm clipping."""

    lr: float = 2e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of Adam's two moments."""
    weight_decay: float = 0.01
    """Decoupled; matrices only: norms, biases and embeddings are not decayed."""
    clip: float = 1.0
    """Largest global gradient norm."""
    warmup: int = 100
    """Steps of linear warm-up."""
    lr_schedule: str = "constant"
    """After the warm-up: constant, cosine (to 0) or wsd (constant, then linearly to 0)."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Who decides the number of loops."""

    kind: str = "shift"
    """A key of shift.schedules.SCHEDULES."""
    options: Options = field(default_factory=dict)
    """Arguments of the schedule."""


@dataclass(frozen=True)
class LandscapeConfig:
    """What to record for ``shift-landscape``; see shift.run.snapshots."""

    every: int = 0
    """Steps from one burst of recorded weights to the next; 0: record nothing."""
    burst: int = 9
    """Successive states in a burst; one more than the steps between them."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a training run computes, and how often it reports."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    landscape: LandscapeConfig = field(default_factory=LandscapeConfig)
    steps: int = 800
    """Optimiser steps."""
    min_flops: int = 0
    """Training FLOPs: a run that has spent fewer after its steps goes on until it has spent as many."""
    batch_size: int = 64
    """Sequences a step, on each rank."""
    seed: int = 0
    """Seed of the initial weights (and of whatever else draws from torch's generator)."""
    precision: str = "fp32"
    """fp32, or bf16: autocast around fp32 weights."""
    n_grad_loops: int | None = None
    """Back-propagate through the last k loops only."""
    backend: str = "auto"
    """Backend of the loop body; shift_kernels.backends() lists them."""
    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    eval_every: int = 50
    """Steps between evaluations; 0: only before and after training."""
    eval_samples: int = 512
    """Held-out sequences an evaluation reads."""
    log_every: int = 10
    """Steps between two reads of the metrics off the device."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Checkpoints kept on disk."""

    def __post_init__(self) -> None:
        low = {"steps": 1, "batch_size": 1, "eval_every": 0, "eval_samples": 1, "log_every": 1}
        low |= {"checkpoint_every": 0, "keep": 1, "min_flops": 0}
        for name, least in low.items():
            _check_least(name, getattr(self, name), least)
        _check_least("model.n_loops", self.model.n_loops, 1)
        _check_least("landscape.every", self.landscape.every, 0)
        _check_least("landscape.burst", self.landscape.burst, 1)
        _check_least("optimiser.warmup", self.optimiser.warmup, 0)
        if self.n_grad_loops is not None:
            _check_least("n_grad_loops", self.n_grad_loops, 1)
        _check_choice("precision", self.precision, ("fp32", "bf16"))
        _check_choice("optimiser.lr_schedule", self.optimiser.lr_schedule, ("constant", "cosine", "wsd"))
        if self.min_flops and (self.landscape.every or self.optimiser.lr_schedule != "constant"):
            raise input_error(
                "TrainConfig", "min_flops", self.min_flops,
                "0 where the learning rate decays towards the last step, or landscape.every is not 0",
                "Set optimiser.lr_schedule = 'constant' and landscape.every = 0, or give more steps.",
            )  # fmt: skip
        for name in ("lr", "clip"):
            if not getattr(self.optimiser, name) > 0:
                raise input_error(
                    "TrainConfig", f"optimiser.{name}", getattr(self.optimiser, name), "a float > 0",
                    "Choose a positive number; clip = inf never clips.",
                )  # fmt: skip

        if not all(0 <= beta < 1 for beta in self.optimiser.betas):
            raise input_error(
                "TrainConfig", "optimiser.betas", self.optimiser.betas, "two floats from 0 to below 1",
                "Choose others.",
            )  # fmt: skip
        if not 0 <= self.optimiser.weight_decay < math.inf:
            raise input_error(
                "TrainConfig", "optimiser.weight_decay", self.optimiser.weight_decay, "a finite float >= 0",
                "Choose another.",
            )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values; what is None is left out, as TOML has no null."""
        return _without_none(dataclasses.asdict(self))

    @staticmethod
    def from_dict(table: Mapping[str, Any], source: str = "TrainConfig") -> TrainConfig:
        """The inverse of :meth:`to_dict`; keys left out take their defaults.

        Raises:
            ShiftInputError: an unknown key or a wrong type; ``source`` names the file it came from.
        """
        return _build(TrainConfig, table, source, "")


RESULT_FREE = (
    "log_every",
    "checkpoint_every",
    "keep",
    "device",
    "landscape.every",
    "landscape.burst",
    "min_flops",
)
"""Keys that a resumed run may change: they decide what is seen and stored, and how long a run goes on after
its steps, not what is computed up to there."""


def differing_key(ours: TrainConfig, theirs: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first key (dotted) whose value differs, with our and their value; None when the runs are one."""
    a, b = _flat(ours.to_dict()), _flat(theirs)
    for key in sorted(a.keys() | b.keys()):
        if key not in RESULT_FREE and a.get(key) != b.get(key):
            return key, a.get(key), b.get(key)
    return None


def load_config(name_or_path: str | Path) -> TrainConfig:
    """Read a TOML file, or a preset by its name.

    Raises:
        ShiftInputError: no such preset or file, broken TOML, an unknown key, a value of the wrong type.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = PRESETS / f"{name_or_path}.toml"
    if not path.is_file():
        presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.toml")))
        raise input_error(
            "load_config", "config", str(name_or_path), f"a .toml file or a preset: {presets}",
            "Check the spelling.",
        )  # fmt: skip
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise input_error("load_config", "config", str(path), "a TOML file", f"Mend it: {error}.") from error
    return TrainConfig.from_dict(table, source=str(path))


def _build(cls: type, table: Mapping[str, Any], source: str, prefix: str) -> Any:
    """An instance of a config dataclass from a TOML table."""
    fields = typing.get_type_hints(cls)
    values = {}
    for key, value in table.items():
        if key not in fields:
            raise input_error(
                source, prefix + key, value, "the keys " + ", ".join(prefix + f for f in fields),
                "Check the spelling, and the [table] it stands in.",
            )  # fmt: skip
        values[key] = _convert(fields[key], value, source, prefix + key)
    return cls(**values)


def _convert(kind: Any, value: Any, source: str, name: str) -> Any:
    """A TOML value as the type a field declares. TOML writes 1 for 1.0 and arrays for tuples."""
    inner = [t for t in typing.get_args(kind) if t is not types.NoneType]
    if isinstance(kind, types.UnionType):
        kind = inner[0]
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _build(typing.cast(type, kind), value, source, name + ".")
    if kind == Options and isinstance(value, Mapping):
        for key, option in value.items():
            if not isinstance(option, (int, float, str, list)):
                allowed = "a number, bool, string or list"
                raise type_error(source, f"{name}.{key}", option, allowed, "Change it.")
        return dict(value)
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)) and len(value) == len(inner):
        return tuple(_convert(t, v, source, name) for t, v in zip(inner, value, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    words = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)
    raise type_error(source, name, value, f"a value of type {words}", "Change the value.")


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return list(value) if isinstance(value, tuple) else value


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise input_error("TrainConfig", name, value, f"an int >= {least}", "Choose a larger one.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise input_error("TrainConfig", name, value, " or ".join(choices), "Check the spelling.")
