"""A core that is applied loop by loop, or compiled around, computes the same; and keeps less."""

import dataclasses
import functools

import pytest
import torch
from tiny_runs import rows, tiny

from shift.config import ModelConfig, ScheduleConfig
from shift.run.recompute import loop_by_loop
from shift.run.trainer import Trainer
from shift_kernels import BlockSpec, LoopedBlock

SPEC = BlockSpec(d_model=16, n_heads=2, d_ff=32, causal=True, injection="add", loop_norm=True)


def outputs(block, loops, **options):
    """States and gradients of a call, in float64."""
    torch.manual_seed(1)
    e = torch.randn(4, 5, 16, dtype=torch.float64, requires_grad=True)
    block.zero_grad()
    h = block(e, loops, backend="torch", **options)
    (h * torch.randn_like(h)).sum().backward()
    return [h.detach(), e.grad, *(p.grad.clone() for p in block.parameters())]


@pytest.mark.parametrize(
    "changes",
    [{}, {"injection": "none"}, {"injection": "concat"}, {"residual_scale": "1/T"}],
    ids=str,
)
@pytest.mark.parametrize("loops", [1, 4, [1, 4, 2, 3]], ids=str)
@pytest.mark.parametrize("options", [{}, {"n_grad_loops": 2}, {"return_all_loops": True}], ids=str)
def test_loops_one_by_one_are_all_loops(changes, loops, options):
    torch.manual_seed(0)
    block = LoopedBlock(dataclasses.replace(SPEC, **changes), dtype=torch.float64)
    loops = loops if isinstance(loops, int) else torch.tensor(loops)
    whole = outputs(block, loops, **options)
    loop_by_loop(block)
    for ours, theirs in zip(outputs(block, loops, **options), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def peak_bytes(block, loops):
    """The most bytes that autograd holds at a time in a forward and backward."""
    held, peak = [0], [0]

    class Held:
        def __init__(self, x):
            self.x, self.bytes = x, x.numel() * x.element_size()
            held[0] += self.bytes
            peak[0] = max(peak[0], held[0])

        def __del__(self):
            held[0] -= self.bytes

    e = torch.randn(4, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda one: one.x):
        block(e, loops, backend="torch").sum().backward()
    return peak[0]


def test_a_backward_holds_one_loop_at_a_time():
    block = LoopedBlock(SPEC)
    two, eight = (peak_bytes(block, loops) for loops in (2, 8))
    assert eight > 3 * two, "there is nothing to save"
    loop_by_loop(block)
    assert peak_bytes(block, 8) < eight / 3


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_run_with_checkpoints_in_the_core_has_the_losses_of_one_without(tmp_path, backend):
    for name, on in (("with", True), ("without", False)):
        Trainer(tiny(checkpoint_core=on, backend=backend), tmp_path / name).fit()
    ours, theirs = ([row["loss"] for row in rows(tmp_path / name, "train")] for name in ("with", "without"))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_compiled_run_has_the_losses_of_an_eager_one_and_compiles_twice_at_most_for_all_loops(
    tmp_path, monkeypatch
):
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    # Not Inductor: this is about what is traced, and when.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    config = tiny(
        schedule=ScheduleConfig("linear", {"fraction": 0.9}),
        model=ModelConfig(n_loops=6, d_model=16, n_heads=2, d_ff=32),
    )
    Trainer(dataclasses.replace(config, compile=True), tmp_path / "compiled").fit()
    Trainer(config, tmp_path / "eager").fit()
    ours, theirs = (rows(tmp_path / name, "train") for name in ("compiled", "eager"))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)
    assert len({row["n_loops"] for row in ours}) == 6
    assert len(graphs) <= 2
