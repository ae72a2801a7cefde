"""Several processes compute what one does on their joined batches: every preset, and what could differ."""

import dataclasses
import json
import os
import shutil
import socket

import pytest
import torch
import torch.distributed as dist
from tiny_runs import Replaced, processes, rows, tiny

from shift.build import build_task
from shift.config import PRESETS, ModelConfig, ScheduleConfig, load_config
from shift.run.checkpoint import digest
from shift.run.ranks import OtherRankFailed
from shift.run.trainer import Trainer
from shift.tasks.base import IGNORE
from shift.train import main
from shift_kernels import ShiftInputError

PER_RANK = 4
TASKS = {
    "hop": {"n_nodes": 6, "max_hops": 2},
    "markov": {"vocab": 4, "length": 8},
    "parity": {"max_length": 3, "curriculum_interval": 2},
}
# Every look after the first is a hit, so SCP fires at step 6; all ranks must go back to the same weights.
SOON = {"interval": 3, "patience": 1, "delta_1": 1e3, "delta_2": 1e3, "keep": 0.5}


def small(preset):
    """A preset, with numbers that train in a fraction of a second and a criterion that fires."""
    config = load_config(preset)
    model = dataclasses.replace(
        config.model, d_model=16, n_heads=2, d_ff=min(config.model.d_ff, 32), n_loops=3
    )
    return dataclasses.replace(
        config,
        task=dataclasses.replace(config.task, options=TASKS[config.task.name]),
        model=model,
        schedule=ScheduleConfig("shift", SOON) if config.schedule.kind == "shift" else config.schedule,
        steps=10,
        batch_size=PER_RANK,
        eval_every=0,
        eval_samples=8,
        log_every=4,
        checkpoint_every=0,
        device="cpu",
    )


CASES = {path.stem: small(path.stem) for path in sorted(PRESETS.glob("*.toml"))}
# In truncated looped steps without injection no gradient reaches the embeddings, in the first stage it does.
CASES["embeddings without gradient"] = tiny(
    batch_size=PER_RANK,
    model=ModelConfig(n_loops=3, d_model=16, n_heads=2, d_ff=32, injection="none"),
    n_grad_loops=1,
    backend="torch",
)
CASES["random first state"] = tiny(
    batch_size=PER_RANK,
    model=ModelConfig(n_loops=3, d_model=16, n_heads=2, d_ff=32, initial_state="random"),
    backend="torch",
)


def uneven(batch):
    """Where every position is read: only as many as the first token says, so that ranks differ."""
    if (batch.targets == IGNORE).any():
        return batch
    beyond = torch.arange(batch.targets.shape[1]) > batch.tokens[:, :1]
    return dataclasses.replace(batch, targets=batch.targets.masked_fill(beyond, IGNORE))


def train_on_rank(rank, folder, store):
    """Child process: train all cases; write down the loops of every step."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, config in CASES.items():
        trainer = Trainer(config, folder / name)
        trainer.task = Replaced(trainer.task, uneven)
        asked, ask = [], trainer.schedule.step

        def spy(step, signals, asked=asked, ask=ask):
            decision = ask(step, signals)
            asked.append(decision.n_loops)
            return decision

        trainer.schedule.step = spy
        trainer.fit()
        (folder / f"{name} {rank}.json").write_text(json.dumps(asked))
    dist.destroy_process_group()


def run_together(ranks):
    """Exit codes of processes that wait for each other."""
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]


class BothRanks:
    """One process's view of the global batch: the ranks' batches, one behind the other."""

    def __init__(self, task):
        self._task = task

    def __getattr__(self, name):
        return getattr(self._task, name)

    def batch(self, batch_size, step, *, split="train", rank=0, n_ranks=1):
        if split != "train":
            return self._task.batch(PER_RANK, step, split=split)
        parts = [vars(uneven(self._task.batch(PER_RANK, step, rank=rank))) for rank in (0, 1)]
        joined = {k: None if v is None else torch.cat([v, parts[1][k]]) for k, v in parts[0].items()}
        return dataclasses.replace(self._task.batch(1, 0), **joined)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes trained all cases."""
    folder = tmp_path_factory.mktemp("two")
    ranks = [
        processes().Process(target=train_on_rank, args=(rank, folder, folder / "store")) for rank in (0, 1)
    ]
    assert run_together(ranks) == [0, 0]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does_on_their_joined_batches(two, tmp_path, name):
    alone = Trainer(dataclasses.replace(CASES[name], batch_size=2 * PER_RANK), tmp_path)
    alone.task = BothRanks(alone.task)
    alone.fit()
    theirs, ours = rows(two / name, "train"), rows(tmp_path, "train")
    assert len(theirs) == CASES[name].steps
    for key in ("loss", "grad_norm", "flops", "block_applications", "n_loops"):
        assert [row[key] for row in theirs] == pytest.approx([row[key] for row in ours], rel=1e-4), key


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_switch_at_the_same_step(two, name):
    first, second = (json.loads((two / f"{name} {rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    if CASES[name].schedule.kind != "constant":
        assert len(set(first)) == 2, "no switch to compare"


def test_ranks_differ_in_their_own_loops():
    """Or the first test would not notice a ledger that holds one rank's."""
    config = CASES["fan_parity"]
    task = build_task(config)
    first, second = (
        [task.batch(PER_RANK, step, rank=rank).n_loops.sum() for step in range(config.steps)]
        for rank in (0, 1)
    )
    assert first != second


def shift_train(rank, port, *argv):
    """Child process: what torchrun starts."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    raise SystemExit(main(argv))


def test_the_command_trains_in_the_processes_of_torchrun(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = ["--run-dir", str(tmp_path / "run"), "--config", "demo", "--steps", "2", "--device", "cpu"]
    ranks = [processes().Process(target=shift_train, args=(rank, port, *argv)) for rank in (0, 1)]
    assert run_together(ranks) == [0, 0]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["world_size"], result["steps"]) == (2, 2)


def resume_on_rank(rank, folder, store, difference):
    """Child process: resume the run of this rank's own disk, and say at which step, or what was wrong."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    config = CASES["demo"]
    try:
        if difference == "config" and rank == 1:
            config = dataclasses.replace(config, seed=7)
        trainer = Trainer(config, folder / str(rank), resume=True)
        answer = [
            trainer.progress.step,
            digest(trainer.optimizer.state_dict()),
            digest(trainer.model.state_dict()),
        ]
    except (ShiftInputError, OtherRankFailed) as error:
        answer = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(answer))
    dist.destroy_process_group()


@pytest.mark.parametrize("difference", ["step", "config", "damage on rank 0"])
def test_ranks_resume_from_one_checkpoint_or_all_refuse(two, tmp_path, difference):
    for rank in (0, 1):  # as on two machines, each with a disk of its own
        shutil.copytree(two / "demo", tmp_path / str(rank))
    if difference == "step":
        shutil.rmtree(tmp_path / "1" / "checkpoints")
    if difference == "damage on rank 0":
        (tmp_path / "0" / "metrics.jsonl").write_bytes(b"")
    arguments = (tmp_path, tmp_path / "store", difference)
    ranks = [processes().Process(target=resume_on_rank, args=(rank, *arguments)) for rank in (0, 1)]
    assert run_together(ranks) == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    if difference == "step":
        assert first == second
        assert first[0] == CASES["demo"].steps
    else:
        word = {"config": "'seed' = 7", "damage on rank 0": "metrics.jsonl"}[difference]
        assert word in first
        assert word in second
