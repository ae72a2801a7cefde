"""A suite of language models, declared in one TOML file.

arms          by their names in shift.comparison.arms; "deep" is Single with the core's layers unrolled: as
              many FLOPs a step as Looped, and more parameters
budgets       training FLOPs of a run, from the smallest on
seeds         of weights and order of the text
tuning_seeds  others, on which every arm's learning rate is chosen
rates         that are tried, times the config's
text          megabytes of the standard library's sources; tokenizer = "bytes" or "bpe" with its vocab_size.
              Empty: shards that are given (benchmarks.gpu.lm --data)
config        of every run, but for what an arm is: its schedule, steps and learning rate
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shift.build import build_model, build_schedule, build_task
from shift.comparison.arms import Arm, make_arm, seeded
from shift.config import ScheduleConfig, TrainConfig
from shift.flops import train_step_flops
from shift.reading import read_toml
from shift.schedules import SCHEDULES
from shift_kernels.errors import input_error

SUITES = Path(__file__).parent / "suites"
DEEP = "deep"
WARMUP = 0.05
"""Share of a run's steps."""
BEYOND = 2**0.5
"""Fixed numbers of loops also run with so much less than the smallest budget, and more than the largest one:
what others are held against must reach beyond them."""
PLANNED_OVER = 1000
"""Steps over which a schedule's mean cost of a step is taken; it is given as fractions of a run."""


@dataclass(frozen=True)
class Suite:
    """See the top of this file."""

    arms: tuple[str, ...]
    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    rates: tuple[float, ...]
    text: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def fixed(self) -> tuple[str, ...]:
        """The arms of a fixed number of loops above 1: one of them is what the others are held against."""
        return tuple(name for name in self.arms if name.partition(":")[0] == "looped")

    def budgets_of(self, arm: str) -> tuple[float, ...]:
        """The budgets of an arm, in order."""
        ends = (self.budgets[0] / BEYOND, self.budgets[-1] * BEYOND) if arm in self.fixed else ()
        return tuple(sorted((*self.budgets, *ends)))


def load_suite(name_or_path: str) -> Suite:
    """Read a suite by its name or path.

    Raises:
        ShiftInputError: no such file, or keys other than a suite's.
    """
    path = Path(name_or_path)
    path = path if path.suffix == ".toml" else SUITES / f"{name_or_path}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in SUITES.glob("*.toml")))
        raise input_error("load_suite", "suite", name_or_path, f"a .toml file, or {known}", "Check it.")
    table = read_toml(path, "load_suite", "suite")
    names = {f.name for f in dataclasses.fields(Suite)}
    if table.keys() != names:
        raise input_error("load_suite", "suite", sorted(table), f"the keys {sorted(names)}", "Check them.")
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in table.items()}
    suite = Suite(**values)
    if not suite.fixed or len(suite.budgets) < 3 or list(suite.budgets) != sorted(suite.budgets):
        allowed = "an arm looped:<T> and three budgets or more, from the smallest on"
        raise input_error("load_suite", "suite", str(path), allowed, "Change it.")
    return suite


def arms_of(suite: Suite, data: Path) -> dict[str, Arm]:
    """The arms over a folder of shards.

    Raises:
        ShiftInputError: an arm, or a value, that there is not.
    """
    base = TrainConfig.from_dict(suite.config, "suite")
    task = dataclasses.replace(base.task, options={**base.task.options, "path": str(data)})
    base = dataclasses.replace(base, task=task)
    return {name: _deep(base) if name == DEEP else make_arm(name, base) for name in suite.arms}


def _deep(base: TrainConfig) -> Arm:
    model = base.model
    deeper = dataclasses.replace(model, n_layers=model.n_layers * model.n_loops, n_loops=1)
    config = dataclasses.replace(base, model=deeper, schedule=ScheduleConfig("constant"))
    return Arm(DEEP, f"Single, {model.n_loops} times as deep", config)


def step_flops(config: TrainConfig) -> float:
    """Training FLOPs of a step: the mean over those planned; the most where a criterion decides."""
    task = build_task(config)
    model = build_model(config, task)
    size = (config.batch_size, task.max_seq_len)
    if SCHEDULES[config.schedule.kind].decided_by == "criterion":
        return train_step_flops(model, *size, config.model.n_loops)
    schedule = build_schedule(dataclasses.replace(config, steps=PLANNED_OVER))
    loops = [schedule.step(step, None).n_loops for step in range(PLANNED_OVER)]
    return sum(loops.count(n) * train_step_flops(model, *size, n) for n in set(loops)) / PLANNED_OVER


def run_config(arm: Arm, budget: float, each: float, factor: float, seed: int) -> TrainConfig:
    """One run.

    Args:
        arm: what is trained.
        budget: training FLOPs; a criterion may spend fewer.
        each: :func:`step_flops` of the arm.
        factor: of the suite's learning rate.
        seed: of weights and data.
    """
    config = seeded(arm, seed)
    steps = max(1, round(budget / each))
    optimiser = dataclasses.replace(
        config.optimiser, lr=factor * config.optimiser.lr, warmup=round(WARMUP * steps)
    )
    return dataclasses.replace(config, steps=steps, optimiser=optimiser)


def tuning_budget(budgets: Sequence[float]) -> float:
    """The budget at which rates are chosen: the middle one, or the lower of the two."""
    return budgets[(len(budgets) - 1) // 2]
