"""Who runs a block, and whether users are told."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from shift_kernels import (
    BackendFallbackWarning,
    BlockSpec,
    LoopedBlock,
    ShiftInputError,
    backends,
    dispatch,
    explain,
)
from shift_kernels.problem import Problem

SPEC = BlockSpec(d_model=8, n_heads=2)
PROBLEM = Problem(SPEC, 2, 3, torch.float32, torch.float32, torch.device("cpu"), True)


def fast_backend(missing=None, refuses=None, other_kind=None):
    return SimpleNamespace(
        NAME="fast",
        ONLY_BY_NAME=None,
        meant_for=lambda p: other_kind,
        SAVES=False,
        unavailable=lambda: missing,
        refusal=lambda p: refuses,
        how=lambda p: "in one go",
        saved_bytes=lambda p: 7,
    )


@pytest.fixture
def with_fast(monkeypatch):
    def install(**how):
        rows = (fast_backend(**how), dispatch.BACKENDS[-1])
        monkeypatch.setattr(dispatch, "BACKENDS", rows)
        monkeypatch.setattr(dispatch, "_SAID", set())
        monkeypatch.delenv("SHIFT_KERNELS_STRICT", raising=False)

    return install


def test_torch_backend_serves_on_every_machine():
    assert backends()["torch"] == "available"
    assert dispatch.plan(PROBLEM, "torch").backend == "torch"


def test_auto_takes_the_first_backend_that_serves(with_fast):
    with_fast()
    assert dispatch.plan(PROBLEM).backend == "fast"


HOWS = [{"missing": "no compiler"}, {"refuses": "d_model > 4"}, {"other_kind": "float32 only"}]


@pytest.mark.parametrize("how", HOWS)
def test_auto_falls_back_and_says_why_in_the_plan(with_fast, how):
    with_fast(**how)
    chosen = dispatch.plan(PROBLEM)
    assert chosen.backend == "torch"
    assert chosen.refused == (("fast", *how.values()),)


@pytest.mark.parametrize("how", HOWS)
def test_a_named_backend_never_falls_back(with_fast, how):
    with_fast(**how)
    with pytest.raises(ShiftInputError, match=next(iter(how.values()))):
        dispatch.plan(PROBLEM, "fast")


def test_a_slow_path_is_told_once(with_fast):
    with_fast(refuses="d_model > 4")
    block, e = LoopedBlock(SPEC), torch.randn(2, 3, 8)
    with pytest.warns(BackendFallbackWarning, match="d_model > 4") as told:
        block(e, 1)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(e, 1)


@pytest.mark.parametrize("how", [{"missing": "no compiler"}, {"other_kind": "float32 only"}])
def test_a_backend_that_is_not_for_this_is_no_news(with_fast, how):
    with_fast(**how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoopedBlock(SPEC)(torch.randn(2, 3, 8), 1)


def test_strict_mode_makes_the_slow_path_an_error(with_fast, monkeypatch):
    with_fast(refuses="d_model > 4")
    monkeypatch.setenv("SHIFT_KERNELS_STRICT", "1")
    with pytest.raises(ShiftInputError, match="SHIFT_KERNELS_STRICT"):
        LoopedBlock(SPEC)(torch.randn(2, 3, 8), 1)


def test_explain_names_backend_reason_memory_and_refusals(with_fast):
    with_fast(refuses="d_model > 4")
    text = explain(SPEC, batch=64, seq_len=32, n_loops=4)
    assert "torch" in text
    assert "not       fast: d_model > 4" in text
    assert "MiB" in text
    assert "MiB" not in explain(SPEC, batch=64, seq_len=32, grad=False)


def test_explain_needs_no_such_device():
    assert "on cuda" in explain(SPEC, batch=1, seq_len=1, dtype=torch.bfloat16, device="cuda")
