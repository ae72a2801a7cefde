"""Sharded weights, and runs that go on with another number of ranks: the losses are those of one process."""

import dataclasses
import itertools
import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta

import pytest
import tomli_w
import torch
import torch.distributed as dist
from tiny_runs import Replaced, processes, rows, tiny
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

from shift.build import build_model, build_task
from shift.config import LandscapeConfig, ModelConfig, OptimiserConfig, ScheduleConfig, TrainConfig
from shift.run import process
from shift.run import trainer as training
from shift.run.checkpoint import digest, newest_valid
from shift.run.evaluate import evaluate
from shift.run.global_batch import GlobalBatch
from shift.run.step import TrainStep
from shift.run.trainer import Trainer, TrainingInterrupted
from shift.tasks.base import IGNORE
from shift.train import main
from shift_kernels import ShiftInputError

# Widths that four ranks do not share evenly: 6 tokens, 2 contexts.
BASE = tiny(
    batch_size=8,
    eval_every=6,
    model=ModelConfig(n_loops=3, d_model=12, n_heads=2, d_ff=20),
    optimiser=OptimiserConfig(warmup=4, ema=0.9, keep_moments=0.5),
)
PACKED = dataclasses.replace(BASE, micro_batch=3, optimiser=OptimiserConfig(warmup=4))
MUON = dataclasses.replace(BASE, optimiser=OptimiserConfig(kind="muon", warmup=4, ema=0.9, keep_moments=0.5))
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
    for child in ranks:
        child.start()
    for child in ranks:
        child.join(180)
    assert [child.exitcode for child in ranks] == [0] * size


def result(run_dir):
    return json.loads((run_dir / "result of rank 0.json").read_text())


def sharded(config):
    return dataclasses.replace(config, parallel="fsdp")


def assert_same_numbers(run_dir, other, first=0):
    for kind, keys in (("train", ("loss", "grad_norm", "flops", "n_loops")), ("eval", ("loss", "accuracy"))):
        ours, theirs = rows(run_dir, kind)[first:], rows(other, kind)[first:]
        for key in keys:
            assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=5e-4), key


def assert_same_numbers_of_training(run_dir, other):
    for key in ("loss", "grad_norm"):
        ours, theirs = ([row[key] for row in rows(path, "train")][:6] for path in (run_dir, other))
        assert ours == pytest.approx(theirs, rel=5e-4), key


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
        (dataclasses.replace(sharded(BASE), checkpoint_core=True), folder / "fsdp with checkpoints"),
        (BASE, folder / "ddp"),
        (sharded(MUON), folder / "fsdp muon"),
        (sharded(MUON), folder / "fsdp muon resumed", 6),
        (sharded(MUON), folder / "fsdp muon resumed"),
        (sharded(BASE), folder / "fsdp 2 to 1", 6),
        (BASE, folder / "ddp 2 to 1", 6),
    )
    return folder


@pytest.mark.parametrize("name", ["fsdp", "fsdp with checkpoints"])
def test_shards_give_the_losses_of_whole_models(runs, name):
    assert_same_numbers(runs / name, runs / "ddp")


def test_micro_batches_of_shards_give_the_losses_of_whole_batches(runs):
    assert_same_numbers_of_training(runs / "fsdp in micro-batches", runs / "ddp")


@pytest.mark.parametrize("name", ["fsdp", "fsdp muon"])
def test_a_sharded_run_that_was_stopped_goes_on_exactly(runs, name):
    resumed, whole = result(runs / f"{name} resumed"), result(runs / name)
    assert [resumed[key] for key in SAME] == [whole[key] for key in SAME]


@pytest.mark.parametrize("name", ["fsdp 2 to 1", "ddp 2 to 1"])
def test_one_process_goes_on_with_the_batches_of_two(runs, name):
    parallel = name.split()[0]
    together(1, runs / f"store of {name}", (dataclasses.replace(BASE, parallel=parallel), runs / name))
    assert_same_numbers(runs / name, runs / parallel)
    assert result(runs / name)["world_size"] == 2


def test_other_numbers_of_ranks_go_on_with_the_batches_of_one(runs, tmp_path):
    jobs = {"ddp": BASE, "fsdp": sharded(BASE), "fsdp muon": sharded(MUON)}
    together(1, tmp_path / "1", *((config, tmp_path / name, 6) for name, config in jobs.items()))
    fit(BASE, tmp_path / "adamw alone")
    fit(MUON, tmp_path / "muon alone")
    together(4, tmp_path / "4", *((config, tmp_path / name) for name, config in jobs.items()))
    for name in jobs:  # of four ranks two have no part of the contexts: the embedding has two rows
        alone = "muon alone" if "muon" in name else "adamw alone"
        assert_same_numbers(tmp_path / name, tmp_path / alone)


def skip_a_step(store, run_dir):
    """Child process: two steps of Muon on shards; the gradients of the second are not finite."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    trainer = Trainer(sharded(MUON), run_dir)
    step, optimizer = trainer._step, trainer.optimizer
    for factor, skips in ((1.0, False), (float("nan"), True)):
        loss = step.backward(trainer.task.batch(8, 0), 2) * factor
        for p in optimizer.parameters:
            p.grad = None if p.grad is None else p.grad * factor
        before = digest([optimizer.pieces, *optimizer.state.values()])
        _, skipped = step.update(loss, lr=0.1)
        assert bool(skipped) == skips
        assert (digest([optimizer.pieces, *optimizer.state.values()]) == before) == skips
    dist.destroy_process_group()


def test_muon_on_shards_skips_a_step_that_is_not_finite(tmp_path):
    child = processes().Process(target=skip_a_step, args=(tmp_path / "store", tmp_path / "run"))
    child.start()
    child.join(60)
    assert child.exitcode == 0


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


def die_on_rank(rank, store, run_dir):
    """Child process: resume; SIGKILL after step 10, which comes after the save of step 8."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    trainer = Trainer(sharded(BASE), run_dir, resume=True)
    trainer.task = Replaced(trainer.task, uneven)
    trainer.fit(lambda done, _: os.kill(os.getpid(), signal.SIGKILL) if done == 10 else None)


def test_a_sharded_run_that_was_killed_goes_on_exactly(runs, tmp_path):
    ranks = [
        processes().Process(target=die_on_rank, args=(rank, tmp_path / "1", tmp_path / "run"))
        for rank in (0, 1)
    ]
    for child in ranks:
        child.start()
    for child in ranks:
        child.join(120)
    assert -signal.SIGKILL in [child.exitcode for child in ranks]  # the first one takes the other along
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == ["step-00000004", "step-00000008"]
    together(2, tmp_path / "2", (sharded(BASE), tmp_path / "run"))
    assert [result(tmp_path / "run")[key] for key in SAME] == [result(runs / "fsdp")[key] for key in SAME]


# --- what a rank that is gone does to the others -----------------------------------------------------------


def exit_code_beside_a_lost_rank(survivor, target, *arguments):
    """How the survivor of two ranks ends, within a minute; the other is killed."""
    ranks = [processes().Process(target=target, args=(rank, *arguments)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    ranks[survivor].join(60)
    code = ranks[survivor].exitcode
    for rank in ranks:
        rank.kill()
        rank.join()
    return code


def fail_at_step(rank, port, how, folder, argv):
    """Child process: what torchrun starts; rank 1 is gone at its third step. Errors go to a file."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process.PATIENCE = timedelta(seconds=5)  # enough for a slow start
    real, calls = TrainStep.backward, iter(range(1, 100))

    def backward(*args, **options):
        if next(calls) == 3 and rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return real(*args, **options)

    TrainStep.backward = backward
    with open(folder / f"{rank}.txt", "w") as sys.stderr:
        raise SystemExit(main(argv))


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_rank_that_is_gone_ends_the_others_with_a_message(tmp_path, how):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(tiny(eval_every=0).to_dict()))
    argv = ["--run-dir", str(tmp_path / "run"), "--config", str(tmp_path / "tiny.toml")]
    assert exit_code_beside_a_lost_rank(0, fail_at_step, port, how, tmp_path, argv) == 1
    last = (tmp_path / "0.txt").read_text().splitlines()[-1]
    assert last.startswith("shift-train: rank 0: another rank has died, or has not answered for 5 s")
    assert "--resume auto" in last


def hang_in_the_second_evaluation(rank, port, folder, argv):
    """Child process: what torchrun starts; the first evaluation takes longer than the hang timeout."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    real, calls = evaluate, iter(range(1, 100))

    def slow(*args, progress, **options):
        if next(calls) == 2:
            (folder / "began to hang").touch()
            time.sleep(600)
        for _ in range(9):
            time.sleep(0.5)
            progress()
        return real(*args, **options)

    training.evaluate = slow
    with open(folder / f"{rank}.txt", "w") as sys.stderr:
        raise SystemExit(main(argv))


def test_a_rank_that_hangs_while_others_wait_ends_them_but_a_long_evaluation_does_not(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = ["--run-dir", str(tmp_path / "run"), "--config", "demo", "--steps", "2", "--eval-every", "1"]
    argv += ["--batch-size", "2", "--eval-samples", "4", "--device", "cpu", "--hang-timeout", "3"]
    assert exit_code_beside_a_lost_rank(1, hang_in_the_second_evaluation, port, tmp_path, argv) == 1
    assert (tmp_path / "began to hang").exists()
    assert "or 3 s (hang_timeout)" in (tmp_path / "1.txt").read_text().splitlines()[-1]


# --- what is gathered -------------------------------------------------------------------------------------


def count_gathers(rank, folder, loops):
    """Child process: the weights that FSDP gathers in each step of a run in bf16 and micro-batches."""
    store = f"file://{folder}/store of {loops}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    gathered, real = [], group.foreach_all_gather

    def spy(fsdp_params, *args):
        gathered.append(sum(p.sharded_param.numel() for p in fsdp_params))  # of a DTensor: of all ranks
        return real(fsdp_params, *args)

    group.foreach_all_gather = spy
    config = tiny(
        parallel="fsdp",
        precision="bf16",
        micro_batch=3,
        eval_every=0,
        schedule=ScheduleConfig("constant", {"n_loops": loops}),
    )
    trainer = Trainer(config, folder / f"{loops} loops")
    marks, dtypes = [], set()
    trainer.model.block.register_forward_pre_hook(
        lambda block, _: dtypes.update(str(p.dtype) for p in block.parameters())
    )
    trainer.fit(lambda *_: marks.append(len(gathered)))
    steps = [gathered[a:b] for a, b in itertools.pairwise(marks)]
    if rank == 0:
        (folder / "gathered.json").write_text(json.dumps([steps, sorted(dtypes)]))
    dist.destroy_process_group()


def test_all_weights_are_gathered_once_a_step_whatever_the_loops(tmp_path):
    model = build_model(tiny(), build_task(tiny()))
    total = sum(p.numel() for p in model.parameters())
    ranks = [processes().Process(target=count_gathers, args=(rank, tmp_path, 3)) for rank in (0, 1)]
    for child in ranks:
        child.start()
    for child in ranks:
        child.join(120)
    steps, dtypes = json.loads((tmp_path / "gathered.json").read_text())
    assert [sum(step) for step in steps[:-1]] == [total] * 10  # the last one evaluates, too
    assert dtypes == ["torch.bfloat16"]
    losses = [row["loss"] for row in rows(tmp_path / "3 loops", "train")]
    assert losses[-1] < losses[0]


# --- the global batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_streams", "n_ranks"), [(1, 3), (2, 1), (3, 2), (4, 4), (2, 8)])
def test_ranks_share_the_rows_of_the_streams_in_order(n_streams, n_ranks):
    task = build_task(tiny())
    parts = [GlobalBatch(4, n_streams, rank, n_ranks).part(task, 5) for rank in range(n_ranks)]
    streams = [task.batch(4, 5, rank=stream) for stream in range(n_streams)]
    for name in ("tokens", "targets", "group", "context"):
        ours, theirs = (torch.cat([getattr(b, name) for b in batches]) for batches in (parts, streams))
        assert torch.equal(ours, theirs), name


def test_more_ranks_than_sequences_are_refused():
    with pytest.raises(ShiftInputError, match="at most 4, the sequences of a step"):
        GlobalBatch(4, 1, 0, 5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"landscape": LandscapeConfig(every=5)}, "parallel"),
        ({"micro_batch": "auto"}, "micro_batch"),
    ],
)
def test_what_shards_cannot_do_is_said_at_once(changes, named):
    with pytest.raises(ShiftInputError, match=f"'{named}'"):
        TrainConfig(parallel="fsdp", **changes)


def test_shards_without_a_process_group_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(ShiftInputError, match="torchrun"):
        Trainer(tiny(parallel="fsdp"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
