"""A checkpoint is complete and what was saved, or it is refused before anything in it is decoded."""

import contextlib
import errno
import os
import random

import pytest
import torch
from torch import nn

from shift.run import checkpoint
from shift.run.checkpoint import DamagedCheckpoint, digest, newest_valid, read, save

FILES = ("model.safetensors", "optimizer.pt", "state.json", "MANIFEST.json")


def make(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimiser with two steps of history."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        model(torch.tensor([0, 3])).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.fixture
def saved(tmp_path):
    """Two checkpoints, of steps 1 and 2, with different weights."""
    for step in (1, 2):
        save(tmp_path, step, *make(step), {"note": step}, keep=2)
    return tmp_path


def test_restore_brings_back_every_bit_of_weights_optimiser_and_generator(tmp_path):
    model, optimizer = make()
    path = save(tmp_path, 7, model, optimizer, {"x": 0.1}, keep=1)
    draws = torch.rand(3)
    other_model, other_optimizer = make(seed=1)
    found = read(path)
    found.restore(other_model, other_optimizer)
    assert torch.equal(torch.rand(3), draws)
    assert digest(other_model.state_dict()) == digest(model.state_dict())
    assert digest(other_optimizer.state_dict()) == digest(optimizer.state_dict())
    assert (found.state["step"], found.state["x"]) == (7, 0.1)


def test_only_the_newest_are_kept_and_nothing_temporary_remains(tmp_path):
    for step in (8, 9, 10, 11):
        save(tmp_path, step, *make(), {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


def test_a_directory_that_is_no_checkpoint_is_left(tmp_path):
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-5" / "weights.bin").write_text("somebody's")
    save(tmp_path, 9, *make(), {}, keep=1)
    assert (tmp_path / "step-5" / "weights.bin").read_text() == "somebody's"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut in half", "one byte short", "one byte more"])
def test_a_file_of_another_length_is_noticed(saved, name, damage):
    path = saved / "step-00000002" / name
    data = path.read_bytes()
    cut = {"empty": b"", "cut in half": data[: len(data) // 2], "one byte short": data[:-1]}
    path.unlink() if damage == "missing" else path.write_bytes(cut.get(damage, data + b"}"))
    with pytest.raises(DamagedCheckpoint, match=name):
        read(path.parent)


@pytest.mark.parametrize("name", FILES[:3])
def test_any_flipped_bit_is_noticed(saved, name):
    path = saved / "step-00000002" / name
    data = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        bit = rng.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedCheckpoint, match=name):
            read(path.parent)


def test_a_flipped_bit_in_the_manifest_is_noticed_or_harmless(saved):
    whole = read(saved / "step-00000002").files
    path = saved / "step-00000002" / "MANIFEST.json"
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 3):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with contextlib.suppress(DamagedCheckpoint):
            assert read(path.parent).files == whole  # in white space, say


def test_the_newest_valid_one_is_found_and_the_damaged_ones_are_named(saved):
    (saved / "step-00000002" / "optimizer.pt").write_bytes(b"")
    found, damaged = newest_valid(saved)
    assert found.state["note"] == 1
    ((path, reason),) = damaged
    assert path.name == "step-00000002"
    assert "optimizer.pt" in reason


def test_without_a_valid_checkpoint_there_is_none_to_find(tmp_path):
    assert newest_valid(tmp_path / "nowhere") == (None, [])
    (tmp_path / "step-00000001").mkdir()
    found, damaged = newest_valid(tmp_path)
    assert found is None
    assert len(damaged) == 1


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    model, optimizer = make()
    monkeypatch.setattr(optimizer, "state_dict", lambda: {"state": Hostile()})
    path = save(tmp_path, 1, model, optimizer, {}, keep=1)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        read(path).restore(*make())
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("nth", range(1, 7))
def test_a_full_disk_names_the_path_and_leaves_the_older_checkpoint(saved, monkeypatch, nth):
    calls = iter(range(1, 100))

    def full(real):
        def call(*args):
            if next(calls) == nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        return call

    for name in ("write_synced", "sync_directory"):
        monkeypatch.setattr(checkpoint, name, full(getattr(checkpoint, name)))
    with pytest.raises(OSError, match=r"No space left .*[0-9]+ bytes.*step-00000003") as error:
        save(saved, 3, *make(3), {"note": 3}, keep=1)
    assert error.value.errno == errno.ENOSPC
    found, damaged = newest_valid(saved)
    assert found.state["note"] in (2, 3)  # 3 when all but the last wait for the disk succeeded
    assert not damaged


def test_equal_content_has_one_digest_and_any_change_another():
    a = {"x": torch.tensor([1.0, -0.0]), "y": [1, "s"]}
    assert digest(a) == digest({"y": [1, "s"], "x": a["x"].clone()})
    others = [
        {"x": torch.tensor([1.0, 0.0]), "y": [1, "s"]},
        {"x": torch.tensor([1.0, -0.0], dtype=torch.float64), "y": [1, "s"]},
        {"x": torch.tensor([[1.0, -0.0]]), "y": [1, "s"]},
        {"x": a["x"], "y": [1, "t"]},
        {"x": a["x"], "y": [[1], "s"]},
        {"x": a["x"], "z": [1, "s"]},
    ]
    assert len({digest(tree) for tree in [a, *others]}) == 7
    assert digest(torch.tensor([1.0], dtype=torch.bfloat16)) != digest(torch.tensor([1.0]))
