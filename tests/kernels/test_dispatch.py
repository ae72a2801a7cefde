"""Who runs a block, and whether users are told."""

import dataclasses
import os
import subprocess
import sys
import warnings

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
    register,
)
from shift_kernels.backends.base import LOOPED_BLOCK, Kind, WhyNot
from shift_kernels.backends.cpu import CPU
from shift_kernels.call import Problem

SPEC = BlockSpec(d_model=8, n_heads=2)
PROBLEM = Problem(SPEC, 2, 3, torch.float32, torch.float32, torch.device("cpu"), True)


class Toy:
    """A third party's backend: registered, not derived from anything of ours."""

    name, saves = "toy", False

    def __init__(self, no=None):
        self.no = no

    def why_not(self, problem):
        return self.no

    def describe(self, problem):
        return "in one go"

    def saved_bytes(self, problem):
        return 7

    def saved_like(self, e, spec, n_loops, compute_dtype=None):
        return []

    def forward(self, e, weights, spec, options, for_backward):
        return e + options.n_loops, torch.full((len(e),), options.n_loops), []

    def backward(self, grad_h, e, weights, spec, options, saved):
        return 2 * grad_h, [torch.zeros_like(w) for w in weights.values()]


@pytest.fixture
def with_toy(monkeypatch):
    monkeypatch.setattr(dispatch, "_SAID", set())
    monkeypatch.delenv("SHIFT_KERNELS_STRICT", raising=False)
    yield lambda *no: register(Toy(WhyNot(*no) if no else None))
    LOOPED_BLOCK.remove("toy")
    dispatch.forget()


def test_torch_backend_serves_on_every_machine():
    assert backends()["torch"] == "available"
    assert dispatch.plan(PROBLEM, "torch").backend == "torch"


def test_a_registered_backend_is_asked_first_and_runs_in_both_directions(with_toy):
    with_toy()
    assert backends()["toy"] == "available"
    assert "in one go" in explain(SPEC, 2, 3)
    e = torch.zeros(2, 3, 8, requires_grad=True)
    h = LoopedBlock(SPEC)(e, 5)
    h.sum().backward()
    assert (h == 5).all()
    assert (e.grad == 2).all()


def test_what_is_no_backend_is_refused_with_what_it_lacks():
    with pytest.raises(ShiftInputError, match="describe"):
        register(object())


NO = [
    (Kind.ABSENT, "no compiler"),
    (Kind.UNSERVED, "d_model > 4"),
    (Kind.FOREIGN, "float32 only"),
    (Kind.UNVERIFIED, "not verified"),
    (Kind.SLOWER, "does not pay"),
]


@pytest.mark.parametrize("no", NO, ids=lambda no: no[0].name)
def test_auto_falls_back_and_says_why_in_the_plan(with_toy, no):
    with_toy(*no)
    chosen = dispatch.plan(PROBLEM)
    assert chosen.backend != "toy"
    assert chosen.refused[0] == ("toy", no)


@pytest.mark.parametrize("no", NO[:3], ids=lambda no: no[0].name)
def test_a_named_backend_never_falls_back(with_toy, no):
    with_toy(*no)
    with pytest.raises(ShiftInputError, match=no[1]):
        dispatch.plan(PROBLEM, "toy")


@pytest.mark.parametrize("no", NO[3:], ids=lambda no: no[0].name)
def test_a_backend_that_is_not_verified_or_slower_runs_by_name(with_toy, no):
    with_toy(*no)
    assert dispatch.plan(PROBLEM, "toy").backend == "toy"
    assert "toy" in dispatch.candidates(PROBLEM)


def test_a_slow_path_is_told_once(with_toy):
    with_toy(Kind.UNSERVED, "d_model > 4")
    block, e = LoopedBlock(SPEC), torch.randn(2, 3, 8)
    with pytest.warns(BackendFallbackWarning, match="d_model > 4") as told:
        block(e, 1)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(e, 1)


@pytest.mark.parametrize("kind", [Kind.ABSENT, Kind.FOREIGN, Kind.SLOWER])
def test_a_backend_that_is_not_for_this_is_no_news(with_toy, kind):
    with_toy(kind, "not for this")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoopedBlock(SPEC)(torch.randn(2, 3, 8), 1)


def test_an_unmeasured_shape_names_the_command_that_measures_it(with_toy):
    with_toy(Kind.UNVERIFIED, "not verified")
    with pytest.warns(BackendFallbackWarning, match="shift-calibrate"):
        dispatch.plan_and_warn(dataclasses.replace(PROBLEM, device=torch.device("cuda")), "auto")


def test_strict_mode_makes_the_slow_path_an_error(with_toy, monkeypatch):
    with_toy(Kind.UNSERVED, "d_model > 4")
    monkeypatch.setenv("SHIFT_KERNELS_STRICT", "1")
    with pytest.raises(ShiftInputError, match="SHIFT_KERNELS_STRICT"):
        LoopedBlock(SPEC)(torch.randn(2, 3, 8), 1)


@pytest.mark.parametrize("why_not", [(), (Kind.UNSERVED, "d_model > 4")], ids=["fast", "slow"])
def test_a_word_that_strict_mode_does_not_know_is_refused(with_toy, monkeypatch, why_not):
    with_toy(*why_not)
    monkeypatch.setenv("SHIFT_KERNELS_STRICT", "yes")
    with pytest.raises(ShiftInputError, match=r"'SHIFT_KERNELS_STRICT' = 'yes'.*allowed: one of '0', '1'"):
        LoopedBlock(SPEC)(torch.randn(2, 3, 8), 1)


@pytest.mark.skipif(CPU.why_not(None) is not None, reason="the library reads it")
def test_an_unknown_instruction_set_is_refused_in_a_line_by_a_command():
    environment = {**os.environ, "SHIFT_KERNELS_CPU_ISA": "AVX2"}
    code = [sys.executable, "-m", "shift_kernels"]
    done = subprocess.run(code, env=environment, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    assert "'SHIFT_KERNELS_CPU_ISA' = 'AVX2'" in line
    assert "'portable', 'avx2', 'avx512', 'avx512bf16'" in line
    assert "Perhaps 'avx2' is meant." in line
    assert done.returncode == 2


def test_explain_names_backend_reason_memory_and_refusals(with_toy):
    with_toy(Kind.UNSERVED, "d_model > 4")
    text = explain(SPEC, batch=64, seq_len=32, n_loops=4)
    assert "not       toy: d_model > 4" in text
    assert "MiB" in text
    assert "MiB" not in explain(SPEC, batch=64, seq_len=32, grad=False)


def test_explain_needs_no_such_device():
    assert "on cuda" in explain(SPEC, batch=1, seq_len=1, dtype=torch.bfloat16, device="cuda")
