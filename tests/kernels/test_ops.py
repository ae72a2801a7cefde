"""The registered operator: its schema, its gradient, its autocast rule, and torch.compile around it."""

import pytest
import torch
from operator_arguments import ops_arguments as arguments
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from shift_kernels import (
    BackendFallbackWarning,
    BlockSpec,
    LoopedBlock,
    ShiftInputError,
    backends,
    dispatch,
)
from shift_kernels.backends import cpu as cpu_backend

LOOPED_BLOCK = torch.ops.shift_kernels.looped_block


@pytest.fixture
def block():
    torch.manual_seed(0)
    return LoopedBlock(BlockSpec(d_model=8, n_heads=2, d_ff=16, injection="add"))


@pytest.fixture
def e():
    torch.manual_seed(1)
    return torch.randn(3, 5, 8, requires_grad=True)


CALLS = {
    "plain": {},
    "no loops": {"n_loops": 0},
    "own loops": {"sample_loops": torch.tensor([2, 0, 3])},
    "ragged": {"seq_lens": torch.tensor([5, 0, 2])},
    "all loops": {"all_loops": True},
    "all of own loops": {"all_loops": True, "sample_loops": torch.tensor([2, 1, 3])},
    "truncated": {"n_loops": 3, "n_grad_loops": 1},
    "a state and scales": {
        "h0": torch.linspace(-1, 1, 120).view(3, 5, 8).requires_grad_(),
        "residual_scale": torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64),
    },
    "one scale": {"residual_scale": torch.tensor(0.5, dtype=torch.float64)},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_operator_passes_opcheck(block, e, call):
    torch.library.opcheck(LOOPED_BLOCK, arguments(e, block, **call))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_backward_operator_passes_opcheck(block, e, call):
    _, weights, *call_arguments, _, dtype, _, backend = arguments(e, block, **call)
    h = LOOPED_BLOCK(*arguments(e, block, **call))[0]
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in call_arguments]
    args = (torch.randn_like(h), e.detach(), [w.detach() for w in weights], [], *detached, dtype, backend)
    torch.library.opcheck(torch.ops.shift_kernels.looped_block_backward, args)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_operator_equals_the_reference_with_all_gradients(block, e, call):
    named = {"sample_loops": "n_loops", "all_loops": "return_all_loops"}
    call_by_name = {"n_loops": 2, **{named.get(k, k): v for k, v in call.items()}}
    expected = block(e, **call_by_name, backend="torch")
    out = LOOPED_BLOCK(*arguments(e, block, **call))[0]
    assert torch.equal(out, expected)
    cotangent = torch.randn_like(expected)
    inputs = [e, *block.parameters(), *([call["h0"]] if "h0" in call else [])]
    ours = torch.autograd.grad(out, inputs, cotangent)
    for a, b in zip(ours, torch.autograd.grad(expected, inputs, cotangent), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("trace", [lambda f, e: make_fx(f)(e), torch.jit.trace], ids=["fx", "jit"])
def test_tracers_see_the_operator(block, e, trace):
    block.requires_grad_(False)
    traced = trace(lambda e: block(e, 2), e.detach())
    other = torch.randn(3, 5, 8)
    assert torch.equal(traced(other), block(other, 2))


def test_fake_tensors_have_shapes_and_no_memory_to_read():
    with FakeTensorMode():
        block, e = LoopedBlock(BlockSpec(d_model=8, n_heads=2)), torch.randn(3, 5, 8)
        h = block(e, 2, seq_lens=torch.tensor([5, 1, 3]))
        h.sum().backward()
    assert h.shape == e.shape
    assert all(p.grad.shape == p.shape for p in block.parameters())


def test_a_wrapped_tensor_is_unwrapped_before_its_memory_is_read(block, e):
    e = e.detach()
    h = block(TwoTensor(e, 2 * e), 2)
    assert torch.equal(h.a, block(e, 2))
    assert torch.equal(h.b, block(2 * e, 2))


def test_halting_operator_returns_loops_used(block, e):
    with torch.no_grad():
        h, used, _ = LOOPED_BLOCK(*arguments(e, block, n_loops=9, halt=0.5))
        expected, expected_used = block(e, 9, halt_threshold=0.5, backend="torch")
    assert torch.equal(h, expected)
    assert torch.equal(used, expected_used)


def test_operator_obeys_autocast(block, e):
    with torch.autocast("cpu", torch.bfloat16):
        out = LOOPED_BLOCK(*arguments(e, block))[0]
        expected = block(e, 2, backend="torch")
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    assert not torch.equal(out, block(e, 2, backend="torch"))


def test_second_derivatives_through_the_operator_say_what_to_do(block, e):
    out = LOOPED_BLOCK(*arguments(e, block))[0]
    (grad,) = torch.autograd.grad(out.square().sum(), e, create_graph=True)
    with pytest.raises(ShiftInputError, match="backend='torch'"):
        grad.sum().backward()


class Model(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.inner, self.out = block, nn.Linear(8, 3)

    def forward(self, x, n_loops, **call):
        return self.out(self.inner(x.tanh(), n_loops, **call)).sin()


@pytest.fixture
def compiled(block):
    torch._dynamo.reset()
    counters.clear()
    model = Model(block)
    return model, torch.compile(model, fullgraph=True, backend="aot_eager")


def compare(model, compiled, e, *args, **call):
    for p in (e, *model.parameters()):
        p.grad = None
    out, expected = compiled(e, *args, **call), model(e, *args, **call)
    torch.testing.assert_close(out, expected)
    inputs = [e, *model.parameters()]
    ours = torch.autograd.grad(out.sum(), inputs)
    for a, b in zip(ours, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_model_is_never_recompiled_when_a_tensor_of_loops_changes(compiled, e):
    for n_loops in (1, 4, 2, 7, 1):
        compare(*compiled, e, torch.tensor(n_loops))
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_model_is_compiled_at_most_twice_for_any_ints(compiled, e):
    # torch.compile takes the first int for a constant, and makes it a variable when it changes.
    for n_loops in (1, 4, 2, 7, 1, 9):
        compare(*compiled, e, n_loops)
    assert counters["stats"]["unique_graphs"] <= 2


def test_compiled_model_takes_own_loops_lengths_and_truncation(compiled, e):
    own, lens = torch.tensor([1, 3, 2]), torch.tensor([5, 1, 3])
    compare(*compiled, e, own, seq_lens=lens, n_grad_loops=1)
    compare(*compiled, e, own.flip(0), seq_lens=lens.flip(0), n_grad_loops=1)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_graph_that_may_break_at_the_operator_is_not_traced_inside_it(block, e):
    torch._dynamo.reset()
    model = Model(block)
    compiled = torch.compile(model, backend="aot_eager")
    for n_loops in (2, 3, 2):
        compare(model, compiled, e, torch.tensor(n_loops))


@pytest.mark.skipif(backends()["cpu"] != "available", reason="torch would be the first choice")
def test_a_slow_path_is_told_while_compiling(monkeypatch, compiled):
    monkeypatch.setattr(dispatch, "_SAID", set())
    monkeypatch.setattr(cpu_backend, "_MOST_LAYERS", 0)
    with pytest.warns(BackendFallbackWarning, match="n_layers = 1 > 0") as told:
        compiled[1](torch.randn(1, 25, 8), 1)
    assert told[0].filename == __file__


def test_inductor_compiles_it(block, e):
    torch._dynamo.reset()
    model = Model(block)
    compare(model, torch.compile(model, fullgraph=True), e, torch.tensor(3))
