"""What a run is: a tree of dataclasses that a TOML file can hold. The object is the API, flags are sugar.

Two runs with equal configs on equal machines write the same bytes; `differing_key` is how a resumed run
makes sure that it continues what it thinks it continues.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shift.checked import (
    MAX_COUNT,
    Checked,
    Options,
    Rule,
    as_plain,
    build,
    positive,
    real,
    ruled,
    whole,
    wholes,
    word,
)
from shift.model import INITIAL_STATES, Layout
from shift.reading import read_toml
from shift.schedules.registry import SCHEDULES
from shift_kernels import BlockSpec
from shift_kernels.errors import input_error, near_miss
from shift_kernels.spec import CHOICES, MAX_LAYERS, MAX_LOOPS, MAX_WIDTH, ONE_OVER_T

PRESETS = Path(__file__).parent / "presets"

MAX_SEED = 2**64 - 1
MAX_FLOPS = 10**30
DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")
SIZES_BY_LOOPS = re.compile(r"([1-9][0-9]{0,8}:[1-9][0-9]{0,8})(,[1-9][0-9]{0,8}:[1-9][0-9]{0,8})*")


def micro_batch_sizes(setting: int | str, batch_size: int) -> dict[int, int]:
    """What ``micro_batch`` says, "auto" apart: sequences by the most loops that they are for."""
    if isinstance(setting, int):
        return {1: setting}
    if setting == "whole":
        return {1: batch_size}
    pairs = (pair.split(":") for pair in setting.split(","))
    return {int(n_loops): int(size) for n_loops, size in pairs}


def _is_micro_batch(value: int | str) -> bool:
    if isinstance(value, int):
        return 1 <= value <= MAX_COUNT
    if value in ("whole", "auto"):
        return True
    loops = [pair.partition(":")[0] for pair in value.split(",")]
    return bool(SIZES_BY_LOOPS.fullmatch(value)) and len(set(loops)) == len(loops)


def _is_positive(value: Any) -> bool:
    return isinstance(value, float) and positive(value)


@dataclass(frozen=True)
class TaskConfig(Checked, table="task."):
    """Where the samples come from."""

    name: str = "hop"
    """A task of shift.tasks, one that an installed package declares, or module:Class."""
    seed: int = whole(0, 0, MAX_SEED)
    """Data seed; apart from the model's, so that arms can share data."""
    options: Options = field(default_factory=dict)
    """Arguments of the task."""


@dataclass(frozen=True)
class ModelConfig(Checked, table="model."):
    """The looped transformer; the fields of shift_kernels.BlockSpec say more."""

    n_loops: int = whole(4, 1, MAX_LOOPS)
    """T, the most loops a schedule may ask for."""
    d_model: int = whole(64, 1, MAX_WIDTH)
    """Width of the residual stream."""
    n_heads: int = whole(4, 1, MAX_WIDTH)
    """Attention heads."""
    n_layers: int = whole(1, 1, MAX_LAYERS)
    """Layers in one loop body."""
    d_ff: int = whole(256, 0, MAX_WIDTH)
    """Hidden width of the MLP; 0: attention only."""
    activation: str = word("gelu", CHOICES["activation"], "Of the MLP")
    norm: str = word("layernorm", CHOICES["norm"], "Of the layers")
    norm_placement: str = word("pre", CHOICES["norm_placement"], "Where branches meet the norms")
    injection: str = word("add", CHOICES["injection"], "How every loop reads the input e")
    loop_norm: bool = False
    """A final norm inside every loop (Fan et al., arXiv 2409.15647)."""
    position: str = word("none", CHOICES["position"], "How attention knows the positions")
    learned_positions: bool = True
    """Add a learned embedding of the position to e."""
    final_norm: bool = True
    """A norm between the last loop and the head."""
    n_prelude: int = whole(0, 0, MAX_LAYERS)
    """Layers before the loop, of its kind; run once."""
    n_coda: int = whole(0, 0, MAX_LAYERS)
    """Layers after the loop; run once."""
    initial_state: str = word("default", INITIAL_STATES)
    """h_0: default (that of the injection), learned (a vector) or random (drawn at every call)."""
    n_kv_heads: int | None = whole(None, 1, MAX_WIDTH)
    """Key and value heads; default: n_heads."""
    bias: bool = True
    """Biases in the block's linear maps and layernorms."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values; default: bias."""
    norm_weight: str = word("scale", CHOICES["norm_weight"], "What a norm multiplies by")
    qk_norm: bool = False
    """A norm of every query and key head."""
    rope_theta: float = real(10000.0, "a finite float > 0", positive)
    """Base of the rotary frequencies."""
    window: int | None = whole(None, 1, MAX_LOOPS)
    """Positions that attention sees, its own included; default: all."""
    softcap: float | None = real(None, "a finite float > 0", positive)
    """c of attention scores c tanh(s / c)."""
    residual_scale: float | str = ruled(
        1.0, Rule(f"a finite float > 0, or {ONE_OVER_T!r}", lambda x: x == ONE_OVER_T or _is_positive(x))
    )
    """Factor of what a branch adds to the residual stream; 1/T: one over the loops of the step."""
    tied: bool = False
    """The read-out's weights are the token embedding's."""
    logit_softcap: float | None = real(None, "a finite float > 0", positive)
    """c of logits c tanh(z / c)."""
    depth_init: bool = False
    """Maps into the residual stream start smaller, by the layers that add to it: prelude + T core + coda."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.block_spec(causal=True)  # refuses what does not go together, such as heads of unequal width

    def block_spec(self, causal: bool) -> BlockSpec:
        """The loop body; whether it is causal is the task's business."""
        names = {f.name for f in dataclasses.fields(BlockSpec) if f.init}
        return BlockSpec(causal=causal, **{k: v for k, v in vars(self).items() if k in names})

    def layout(self) -> Layout:
        """What stands around the loop body."""
        return Layout(
            n_prelude=self.n_prelude,
            n_coda=self.n_coda,
            initial_state=self.initial_state,
            tied=self.tied,
            logit_softcap=self.logit_softcap,
            init_loops=self.n_loops if self.depth_init else None,
        )


DECAYED = {"matrices": 1.0, "head": 1.0, "embeddings": 0.0, "vectors": 0.0}
"""Kind of a parameter -> its weight decay over the config's, where the config does not say. The kinds are the
matrices of blocks, the read-out, embeddings, and norms and biases."""


@dataclass(frozen=True)
class OptimiserConfig(Checked, table="optimiser."):
    """AdamW, or Muon for the matrices of blocks, with global-norm clipping."""

    lr: float = real(2e-3, "a finite float > 0", positive)
    """Peak learning rate."""
    betas: tuple[float, float] = real((0.9, 0.99), "two floats from 0 to below 1", lambda x: 0 <= x < 1)
    """Decay of Adam's two moments."""
    weight_decay: float = real(0.01, "a finite float >= 0", lambda x: 0 <= x < math.inf)
    """Decoupled; matrices only: norms, biases and embeddings are not decayed."""
    clip: float = real(1.0, "a float > 0; inf never clips", lambda x: x > 0)
    """Largest global gradient norm; inf never clips."""
    warmup: int = whole(100, 0)
    """Steps of linear warm-up."""
    lr_schedule: str = word("constant", ("constant", "cosine", "wsd"))
    """After the warm-up: constant, cosine (to 0) or wsd (constant, then linearly to 0)."""
    kind: str = word("adamw", ("adamw", "muon"))
    """adamw; muon: Muon for the matrices of blocks, its updates of AdamW's size, and AdamW for the rest."""
    momentum: float = real(0.95, "a float from 0 to below 1", lambda x: 0 <= x < 1)
    """Of Muon."""
    lr_factors: Options = field(default_factory=dict)
    """The learning rate over lr of matrices (of blocks), head, embeddings, vectors (norms and biases)."""
    decay_factors: Options = field(default_factory=dict)
    """The decay over weight_decay of the same; where nothing is said 1 for matrices and head, 0 else."""
    ema: float = real(0.0, "a float from 0 to below 1", lambda x: 0 <= x < 1)
    """Decay a step of an average of the weights, which is then what is evaluated; 0: none."""
    rewarm: int = whole(0, 0)
    """Steps over which the rate rises from 0 again after each switch of the schedule."""
    keep_moments: float = real(1.0, "a float from 0 to 1", lambda x: 0 <= x <= 1)
    """What the gradients so far count for after a switch: 1 keeps the moments, 0 clears them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr_factors", "decay_factors"):
            for kind, factor in getattr(self, name).items():
                where = f"{self._table}{name}"
                if kind not in DECAYED:
                    raise input_error(
                        "OptimiserConfig", where, kind, "the kinds " + ", ".join(DECAYED),
                        near_miss(kind, DECAYED, "Check the spelling."),
                    )  # fmt: skip
                number = as_plain(float, factor)
                if number is None or not 0 <= number < math.inf:
                    raise input_error(
                        "OptimiserConfig", f"{where}.{kind}", factor, "a finite number >= 0", "Change it."
                    )


@dataclass(frozen=True)
class ScheduleConfig(Checked, table="schedule."):
    """Who decides the number of loops."""

    kind: str = word("shift", tuple(SCHEDULES), "The schedule")
    options: Options = field(default_factory=dict)
    """Arguments of the schedule."""


@dataclass(frozen=True)
class LandscapeConfig(Checked, table="landscape."):
    """What to record for ``shift-landscape``; see shift.run.snapshots."""

    every: int = whole(0, 0)
    """Steps from one burst of recorded weights to the next; 0: record nothing."""
    burst: int = whole(9, 1)
    """Successive states in a burst; one more than the steps between them."""


@dataclass(frozen=True)
class TrainConfig(Checked):
    """Everything that decides what a training run computes, and how often it reports."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    landscape: LandscapeConfig = field(default_factory=LandscapeConfig)
    steps: int = whole(800, 1)
    """Optimiser steps."""
    min_flops: int = whole(0, 0, MAX_FLOPS)
    """Training FLOPs: a run that has spent fewer after its steps goes on until it has spent as many."""
    batch_size: int = whole(64, 1)
    """Sequences a step, on each rank."""
    micro_batch: int | str = ruled(
        "whole",
        Rule("an int >= 1, whole, auto, or sizes by loops such as 1:64,4:16", _is_micro_batch),
    )
    """Sequences that go through the model at once: whole (all), a number, numbers by loops ("1:64,4:16": 64
    with one loop, 16 with two to four or more), or auto (found before the first step). No gradient depends on
    it, but for the order of sums."""
    seed: int = whole(0, 0, MAX_SEED)
    """Seed of the initial weights (and of whatever else draws from torch's generator)."""
    precision: str = word("fp32", ("fp32", "bf16"))
    """fp32, or bf16: autocast around fp32 weights."""
    n_grad_loops: int | None = whole(None, 1, MAX_LOOPS)
    """Back-propagate through the last k loops only."""
    loop_loss: tuple[float, ...] = real((), "floats >= 0, the last one above 0", lambda x: 0 <= x < math.inf)
    """Weights of the losses after loop 1, 2, ..; the last one holds for further loops. Empty: the loss after
    the last loop alone."""
    parallel: str = word("ddp", ("ddp", "fsdp"))
    """How ranks share the model: ddp (whole on each) or fsdp (in shards, gathered once a step)."""
    hang_timeout: float = real(300.0, "a finite float > 0", positive)
    """Seconds without a sign of life after which ranks give up one that works alone: evaluates, say."""
    compile: bool = False
    """torch.compile around the training forward: what is not the loop body gets fused."""
    checkpoint_core: bool = False
    """Apply the core loop by loop, so that its backward holds the activations of one loop alone."""
    backend: str = "auto"
    """Backend of the loop body; shift_kernels.backends() lists them."""
    device: str = ruled(
        "auto", Rule("auto, cpu, cuda, cuda:0, cuda:1, ...", lambda name: bool(DEVICE.fullmatch(name)))
    )
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    eval_every: int = whole(50, 0)
    """Steps between evaluations; 0: only before and after training."""
    eval_samples: int = whole(512, 1)
    """Held-out sequences an evaluation reads."""
    sweep_loops: tuple[int, ...] = wholes((), 1, MAX_LOOPS)
    """Numbers of loops that the finished model is evaluated with, for result.json."""
    log_every: int = whole(10, 1)
    """Steps between two reads of the metrics off the device."""
    checkpoint_every: int = whole(200, 0)
    """Steps between checkpoints; 0: only at the end."""
    keep: int = whole(2, 1)
    """Checkpoints kept on disk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loop_loss and not self.loop_loss[-1]:
            raise input_error(
                "TrainConfig", "loop_loss", self.loop_loss, "weights of which the last one is above 0",
                "It is the one of the last loop.",
            )  # fmt: skip
        if self.min_flops and (self.landscape.every or self.optimiser.lr_schedule != "constant"):
            raise input_error(
                "TrainConfig", "min_flops", self.min_flops,
                "0 where the learning rate decays towards the last step, or landscape.every is not 0",
                "Set optimiser.lr_schedule = 'constant' and landscape.every = 0, or give more steps.",
            )  # fmt: skip

        if self.parallel == "fsdp" and self.micro_batch == "auto":
            raise input_error(
                "TrainConfig", "micro_batch", "auto", "sizes with parallel = 'fsdp'",
                "Ranks that try sizes would wait for each other: give a number, or numbers by loops.",
            )  # fmt: skip
        if self.parallel == "fsdp" and self.landscape.every:
            raise input_error(
                "TrainConfig", "parallel", self.parallel, "ddp where landscape.every is not 0",
                "Snapshots are of all weights, which no rank has: set landscape.every = 0.",
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
        return build(TrainConfig, table, source, "")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``: tables are merged, but for a task, which is another one altogether."""
    both = dict(base)
    for key, value in changes.items():
        merge = isinstance(value, Mapping) and key != "task"
        both[key] = merged(base.get(key, {}), value) if merge else value
    return both


RESULT_FREE = (
    "sweep_loops",
    "log_every",
    "checkpoint_every",
    "keep",
    "device",
    "hang_timeout",
    "landscape.every",
    "landscape.burst",
    "min_flops",
)
"""Keys that a resumed run may change: they decide what is seen and stored, and how long a run goes on after
its steps, not what is computed up to there."""


def differing_key(
    ours: TrainConfig, theirs: Mapping[str, Any], free: Sequence[str] = RESULT_FREE
) -> tuple[str, Any, Any] | None:
    """The first key (dotted) whose value differs, with our and their value; None when the runs are one.

    Args:
        ours: a config.
        theirs: :meth:`TrainConfig.to_dict` of another.
        free: keys that may differ.
    """
    a = flat_keys(ours.to_dict())
    b = flat_keys(TrainConfig().to_dict()) | flat_keys(theirs)  # older runs hold fewer
    for key in sorted(a.keys() | b.keys()):
        if key not in free and a.get(key) != b.get(key):
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
    if not path.exists():
        presets = sorted(p.stem for p in PRESETS.glob("*.toml"))
        if path.parent != PRESETS:
            remedy = "There is no such file."
        else:
            remedy = near_miss(name_or_path, presets, "There is no such preset.")
        allowed = f"a .toml file or a preset: {', '.join(presets)}"
        raise input_error("load_config", "config", str(name_or_path), allowed, remedy)
    return TrainConfig.from_dict(read_toml(path, "load_config", "config"), source=str(path))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return list(value) if isinstance(value, tuple) else value


def flat_keys(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested table as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flat_keys(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
