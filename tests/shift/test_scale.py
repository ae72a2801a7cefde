"""Sharded weights, and runs that go on with another number of ranks: the losses are those of one process."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from tiny_runs import Replaced, processes, rows, tiny

from shift.build import build_model, build_task
from shift.config import ModelConfig, OptimiserConfig
from shift.run.checkpoint import newest_valid
from shift.run.evaluate import evaluate
from shift.run.trainer import Trainer, TrainingInterrupted
from shift.tasks.base import IGNORE

# Widths that four ranks do not share evenly: 6 tokens, 2 contexts.
BASE = tiny(
    batch_size=8,
    eval_every=6,
    model=ModelConfig(n_loops=3, d_model=12, n_heads=2, d_ff=20),
    optimiser=OptimiserConfig(warmup=4, ema=0.9, keep_moments=0.5),
)
PACKED = dataclasses.replace(BASE, micro_batch=3, optimiser=OptimiserConfig(warmup=4))
SAME = ("weights_sha256", "optimizer_sha256", "metrics_sha256")


def uneven(batch):
    """Read positions that differ widely between samples, and so between ranks."""
    few = torch.arange(batch.targets.shape[1]) > torch.arange(len(batch.tokens))[:, None] % 3
    return dataclasses.replace(batch, targets=batch.targets.masked_fill(few, IGNORE))


def fit(config, run_dir, stop_after=None):
    """Train on this rank, from where the run is; the result of rank 0 goes to a file."""
    trainer = Trainer(config, run_dir, resume=True)
    trainer.task = Replaced(trainer.task, uneven)
    try:
        result = trainer.fit(lambda done, _: trainer.stop() if done == stop_after else None)
    except TrainingInterrupted:
        return None
    if result:
        (run_dir / "result of rank 0.json").write_text(json.dumps(result))
    return result


def on_rank(rank, size, store, jobs):
    """Child process: run each (config, run directory, step to stop after)."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for job in jobs:
        fit(*job)
    dist.destroy_process_group()


def together(size, store, *jobs):
    """Train in ``size`` processes."""
    ranks = [processes().Process(target=on_rank, args=(rank, size, store, jobs)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(180)
    assert [process.exitcode for process in ranks] == [0] * size


def result(run_dir):
    return json.loads((run_dir / "result of rank 0.json").read_text())


def sharded(config):
    return dataclasses.replace(config, parallel="fsdp")


def assert_same_numbers(run_dir, other, first=0):
    for kind, keys in (("train", ("loss", "grad_norm", "flops", "n_loops")), ("eval", ("loss", "accuracy"))):
        ours, theirs = rows(run_dir, kind)[first:], rows(other, kind)[first:]
        for key in keys:
            assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=1e-4), key


def assert_same_numbers_of_training(run_dir, other):
    for key in ("loss", "grad_norm"):
        ours, theirs = ([row[key] for row in rows(path, "train")][:6] for path in (run_dir, other))
        assert ours == pytest.approx(theirs, rel=1e-4), key


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two processes: replicated and in shards, whole and stopped half-way, and of one process."""
    folder = tmp_path_factory.mktemp("runs")
    together(
        2,
        folder / "store of 2",
        (sharded(BASE), folder / "fsdp"),
        (sharded(BASE), folder / "fsdp resumed", 6),
        (sharded(BASE), folder / "fsdp resumed"),
        (sharded(PACKED), folder / "fsdp in micro-batches"),
        (BASE, folder / "ddp"),
        (sharded(BASE), folder / "fsdp 2 to 1", 6),
        (BASE, folder / "ddp 2 to 1", 6),
    )
    return folder


def test_shards_give_the_losses_of_whole_models(runs):
    assert_same_numbers(runs / "fsdp", runs / "ddp")


def test_micro_batches_of_shards_give_the_losses_of_whole_batches(runs):
    assert_same_numbers_of_training(runs / "fsdp in micro-batches", runs / "ddp")


def test_a_sharded_run_that_was_stopped_goes_on_exactly(runs):
    assert [result(runs / "fsdp resumed")[key] for key in SAME] == [
        result(runs / "fsdp")[key] for key in SAME
    ]


@pytest.mark.parametrize("name", ["fsdp 2 to 1", "ddp 2 to 1"])
def test_one_process_goes_on_with_the_batches_of_two(runs, name):
    parallel = name.split()[0]
    together(1, runs / f"store of {name}", (dataclasses.replace(BASE, parallel=parallel), runs / name))
    assert_same_numbers(runs / name, runs / parallel)
    assert result(runs / name)["world_size"] == 2


def test_other_numbers_of_ranks_go_on_with_the_batches_of_one(runs, tmp_path):
    jobs = {name: dataclasses.replace(BASE, parallel=name) for name in ("ddp", "fsdp")}
    together(1, tmp_path / "1", *((config, tmp_path / name, 6) for name, config in jobs.items()))
    fit(BASE, tmp_path / "whole")
    together(4, tmp_path / "4", *((config, tmp_path / name) for name, config in jobs.items()))
    for name in jobs:  # of four ranks two have no part of the contexts: the embedding has two rows
        assert_same_numbers(tmp_path / name, tmp_path / "whole")


def test_a_process_without_shards_reads_the_averaged_weights_that_were_evaluated(runs):
    found, damaged = newest_valid(runs / "fsdp" / "checkpoints")
    assert (found.sharded, damaged) == (True, [])
    task = build_task(BASE)
    model = build_model(BASE, task)
    found.restore_weights(model)
    scores = evaluate(model, Replaced(task, uneven), n_loops=3, n_samples=16, batch_size=8)
    assert scores["loss"] == pytest.approx(rows(runs / "fsdp", "eval")[-1]["loss"], rel=1e-6)


def test_a_damaged_shard_is_found_before_it_is_read(runs, tmp_path):
    path = max((runs / "fsdp" / "checkpoints").glob("step-*"))
    shard = max(path.glob("shard-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"x")
    try:
        found, damaged = newest_valid(runs / "fsdp" / "checkpoints")
    finally:
        shard.write_bytes(content)
    assert found.path != path
    assert [(p, shard.name in reason) for p, reason in damaged] == [(path, True)]
