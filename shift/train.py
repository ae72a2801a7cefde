"""``shift-train``: one training run. Also ``python -m shift.train`` and ``torchrun ... -m shift.train``.

    shift-train --run-dir runs/first --config demo --schedule.kind shift --schedule.options patience=3
    shift-train --run-dir runs/first --resume auto
    shift-train --run-dir runs/first --resume auto --steps 2000    # 2000 in all

Flags win over the TOML file or preset of ``--config``, which wins over the defaults; a resumed run starts
from its own ``config.toml``. What was resolved is written there.

Exit codes: 0 done; 1 failed; 2 unusable input; 75 interrupted by SIGTERM or Ctrl-C: a checkpoint was saved,
start again with ``--resume auto``. (``torchrun`` has codes of its own; the checkpoint is there all the same.)
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import tyro

from shift.build import with_absolute_paths
from shift.checked import Options
from shift.config import TrainConfig, load_config
from shift.reading import tomllib
from shift.run.logs import Log
from shift.run.process import run
from shift.run.ranks import OtherRankFailed
from shift.run.shapes import When
from shift.run.trainer import TrainingDiverged, TrainingInterrupted
from shift_kernels.console import INTERRUPTED, command


@dataclass(frozen=True)
class Command:
    """Train a looped transformer."""

    run_dir: Path
    """Where the run is written."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    config: str | None = None
    """A TOML file, or the name of a preset."""
    resume: Literal["no", "auto"] = "no"
    """auto: go on from the newest valid checkpoint in run_dir, to more steps if --steps says so."""
    log: tuple[Log, ...] = ()
    """Who is told besides the console and the run directory (extra log)."""
    calibrate: When = "auto"
    """auto: before training on a GPU, verify and time the backends for shapes not measured there yet."""


@command("shift-train")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return _train(parse(sys.argv[1:] if argv is None else list(argv)))


def parse(argv: Sequence[str]) -> Command:
    """The command of these arguments. Prints help or usage errors and exits as ``argparse`` does.

    Raises:
        ShiftInputError: an unusable config file.
    """
    base = _base_config(argv)
    no_options = dataclasses.replace(
        base,
        task=dataclasses.replace(base.task, options={}),
        schedule=dataclasses.replace(base.schedule, options={}),
    )
    command = tyro.cli(
        Command,
        args=argv,
        default=Command(tyro.MISSING, no_options),
        registry=_registry(),
        prog="shift-train",
    )
    given = command.train
    task_options = _merged(base.task.name == given.task.name, base.task.options, given.task.options)
    schedule_options = _merged(
        base.schedule.kind == given.schedule.kind, base.schedule.options, given.schedule.options
    )
    train = dataclasses.replace(
        given,
        task=dataclasses.replace(given.task, options=task_options),
        schedule=dataclasses.replace(given.schedule, options=schedule_options),
    )
    return dataclasses.replace(command, train=with_absolute_paths(train))


def _base_config(argv: Sequence[str]) -> TrainConfig:
    """What the flags start from: ``--config``, else the config of the run to resume, else the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("config", "run-dir", "resume"):
        parser.add_argument(f"--{flag}", f"--{flag.replace('-', '_')}", nargs="?")
    known, _ = parser.parse_known_args(argv)
    if known.config is not None:
        return load_config(known.config)
    own = Path(known.run_dir or "") / "config.toml"
    return load_config(own) if known.resume == "auto" and own.is_file() else TrainConfig()


def _merged(same: bool, base: Options, given: Options) -> Options:
    """Options given as flags join those of the file, unless they belong to another task or schedule."""
    return {**base, **given} if same else given


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Tells tyro to read option tables as ``key=value`` words, the values as in TOML."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def options(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if get_origin(info.type) is not dict:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="KEY=VALUE",
            instance_from_str=lambda words: dict(_option(word) for word in words),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [f"{k}={v}" for k, v in value.items()],
        )

    return registry


def _option(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals:
        raise ValueError(f"{word!r} is not of the form KEY=VALUE")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text  # words need no quotes on a command line


def _train(command: Command) -> int:
    try:
        run(
            command.train,
            command.run_dir,
            resume=command.resume == "auto",
            calibrate=command.calibrate,
            logs=command.log,
        )
    except TrainingInterrupted as interruption:
        print(f"shift-train: {interruption} (--resume auto)", file=sys.stderr)
        return INTERRUPTED
    except (TrainingDiverged, OtherRankFailed, MemoryError) as error:
        print(f"shift-train: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
