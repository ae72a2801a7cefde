"""Steps of training: ``Trainer.fit``, and a plain PyTorch loop over the same model."""

import dataclasses

import pytest

from benchmarks.training.throughput import CASES, Case, config_of, plain_loop
from shift.run.trainer import Trainer
from shift_kernels.bench.cases import LIBRARY
from shift_kernels.bench.compare import in_a_line

ROUNDS = 5


@pytest.mark.parametrize("runner", ["ours", *LIBRARY])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.preset}-{case.precision}")
def test_training(benchmark, tmp_path_factory, case: Case, runner: str):
    steps = case.steps
    config = dataclasses.replace(config_of(case), steps=steps)
    benchmark.group = f"{case.title}: {steps} steps"
    benchmark.extra_info["samples"] = steps * config.batch_size
    if runner == "ours":

        def new_run():
            return (Trainer(config, tmp_path_factory.mktemp("run")),), {}

        benchmark.pedantic(Trainer.fit, setup=new_run, rounds=ROUNDS, warmup_rounds=1)
        return
    trainer = Trainer(config, tmp_path_factory.mktemp("run"))
    step = plain_loop(trainer.model, trainer.task, config, compiled=runner == "compile")
    try:
        step(0)
    except RuntimeError as error:
        if runner != "compile":
            raise
        pytest.skip(f"torch.compile: {in_a_line(error)}")
    benchmark.pedantic(lambda: [step(i) for i in range(steps)], rounds=ROUNDS)
