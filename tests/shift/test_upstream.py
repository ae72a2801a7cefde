"""Whether Single's and Looped's gradients agree, and where that is asked."""

import dataclasses

import pytest
import torch
from tiny_runs import tiny

from shift.config import LandscapeConfig, ModelConfig, ScheduleConfig, TaskConfig
from shift.landscape.recording import open_recording
from shift.landscape.upstream import agreement, stage_one
from shift.run.trainer import Trainer
from shift_kernels import ShiftInputError

CONFIG = tiny(
    task=TaskConfig("markov", options={"vocab": 4, "length": 6}),
    model=ModelConfig(n_loops=3, d_model=4, n_heads=2, d_ff=0, injection="none"),
    landscape=LandscapeConfig(every=4, burst=3),
)


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
    """A run of 12 steps with the switch after 6."""
    path = tmp_path_factory.mktemp("switched")
    Trainer(CONFIG, path).fit()
    return path


def test_agreement_is_the_cosine_of_the_two_losses_gradients(switched):
    run = open_recording(switched)
    single, looped = (run.surface(k, 8, torch.float64) for k in (1, 3))
    w = torch.from_numpy(run.snapshots.weights[-1])
    a, b = (s.gradient(s.vector(w)) for s in (single, looped))
    found, slices = agreement(single, looped, w), single.slices(split_qkv=True)
    assert found.keys() == {"all", *slices}
    unseen = {name for name in slices if "in_proj_bias.k" in name}
    for name, part in {"all": slice(None), **slices}.items():
        cosine = torch.cosine_similarity(a[part], b[part], dim=0).item()
        assert found[name] == (0 if name in unseen else pytest.approx(cosine))
    assert {name for name, c in agreement(looped, looped, w).items() if c != pytest.approx(1)} == unseen


def test_stage_one_ends_at_the_switch(switched):
    assert list(stage_one(switched, samples=4)) == [0, 4]


def test_a_run_that_was_never_single_has_no_stage_one(tmp_path):
    constant = dataclasses.replace(CONFIG, schedule=ScheduleConfig("constant"), steps=4)
    Trainer(constant, tmp_path).fit()
    with pytest.raises(ShiftInputError, match="one loop"):
        stage_one(tmp_path)
