"""The ``torch_graph`` backend with a recorder that runs on the CPU: what is recorded, kept and used when."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shift_kernels import BlockSpec, LoopedBlock, ShiftInputError, dispatch, explain, looped_block
from shift_kernels.backends import torch_graph
from shift_kernels.backends.base import LOOPED_BLOCK, UNVERIFIED, Kind
from shift_kernels.backends.torch import TORCH
from shift_kernels.backends.torch_graph import TORCH_GRAPH, TorchGraphBackend
from shift_kernels.call import CallOptions, Problem

SPEC = BlockSpec(d_model=16, n_heads=2, d_ff=32, injection="add", position="rope")


class OnTheCpu:
    """Replays by running the step again, into the memory of its first results, as a graph does."""

    def __init__(self):
        self.records = self.replays = self.inside = 0

    @contextlib.contextmanager
    def alone(self, device):
        assert not self.inside
        self.inside += 1
        yield
        self.inside -= 1

    def record(self, step, device):
        assert self.inside
        self.records += 1
        results = step()

        def replay():
            assert self.inside
            self.replays += 1
            for kept, x in zip(results, step(), strict=True):
                kept.copy_(x)

        return replay, results


class ForCpuTensors(TorchGraphBackend):
    def why_not(self, problem):
        return None if problem is None else UNVERIFIED


@pytest.fixture
def recorder(monkeypatch):
    found = OnTheCpu()
    LOOPED_BLOCK.remove("torch_graph")
    LOOPED_BLOCK.register(ForCpuTensors(found))
    dispatch.forget()
    yield found
    LOOPED_BLOCK.remove("torch_graph")
    LOOPED_BLOCK.register(TORCH_GRAPH)
    dispatch.forget()


def make(seed, requires_grad=True):
    torch.manual_seed(seed)
    weights = {
        name: nn.init.normal_(w.detach().clone(), std=0.2) for name, w in LoopedBlock(SPEC).weights().items()
    }
    e = torch.randn(3, 5, 16)
    return e.requires_grad_(requires_grad), {k: w.requires_grad_(requires_grad) for k, w in weights.items()}


def gradients(h, e, weights):
    return torch.autograd.grad((h * torch.linspace(-1, 1, 16)).sum(), [e, *weights.values()])


def test_calls_of_one_shape_share_a_recording_in_any_order(recorder):
    """A second forward comes before the first's backward, and nothing is held by one call for another."""
    calls = [make(seed) for seed in range(3)]
    ours = [looped_block(e, w, SPEC, 2, backend="torch_graph") for e, w in calls]
    plain = [looped_block(e, w, SPEC, 2, backend="torch") for e, w in calls]
    for i in (1, 0, 2):
        assert torch.equal(ours[i], plain[i])
        for a, b in zip(gradients(ours[i], *calls[i]), gradients(plain[i], *calls[i]), strict=True):
            torch.testing.assert_close(a, b)
    assert (recorder.records, recorder.replays) == (2, 6)  # forward and backward


@pytest.mark.parametrize(
    "changed", [{"n_loops": 3}, {"return_all_loops": True}, {"n_grad_loops": 1}], ids=str
)
def test_another_call_is_another_recording(recorder, changed):
    e, weights = make(0, requires_grad=False)
    for call in ({"n_loops": 2}, {"n_loops": 2, **changed}):
        for _ in range(2):
            h = looped_block(e, weights, SPEC, **call, backend="torch_graph")
            torch.testing.assert_close(h, looped_block(e, weights, SPEC, **call, backend="torch"))
    assert (recorder.records, recorder.replays) == (2, 4)


@pytest.mark.parametrize("call", [{"n_loops": [2, 0, 1]}, {"n_loops": 2, "seq_lens": [5, 0, 3]}], ids=str)
def test_what_is_data_is_not_recorded(recorder, call):
    e, weights = make(0)
    call = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in call.items()}
    ours, plain = (looped_block(e, weights, SPEC, **call, backend=b) for b in ("torch_graph", "torch"))
    for a, b in zip(gradients(ours, e, weights), gradients(plain, e, weights), strict=True):
        torch.testing.assert_close(a, b)
    assert recorder.records == 0


def test_nothing_is_recorded_within_a_callers_own_capture(recorder, monkeypatch):
    monkeypatch.setattr(torch_graph, "capturing", lambda device: True)
    e, weights = make(0, requires_grad=False)
    looped_block(e, weights, SPEC, 2, backend="torch_graph")
    assert recorder.records == 0


def test_a_recording_of_inference_mode_serves_outside_of_it_too(recorder):
    e, weights = make(0, requires_grad=False)
    with torch.inference_mode():
        first = looped_block(e, weights, SPEC, 2, backend="torch_graph")
    assert torch.equal(looped_block(e, weights, SPEC, 2, backend="torch_graph"), first)
    assert recorder.records == 1


def test_a_switch_of_torch_makes_another_recording(recorder):
    e, weights = make(0, requires_grad=False)
    looped_block(e, weights, SPEC, 2, backend="torch_graph")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        looped_block(e, weights, SPEC, 2, backend="torch_graph")
    assert recorder.records == 2


def test_only_the_last_used_recordings_are_kept(recorder, monkeypatch):
    monkeypatch.setattr(torch_graph, "MOST_RECORDINGS", 2)
    e, weights = make(0, requires_grad=False)
    for n_loops in (1, 2, 1, 3, 1):  # 2 goes for 3
        looped_block(e, weights, SPEC, n_loops, backend="torch_graph")
    assert recorder.records == 3
    looped_block(e, weights, SPEC, 2, backend="torch_graph")
    assert recorder.records == 4


def test_second_derivatives_are_refused(recorder):
    e, weights = make(0)
    h = looped_block(e, weights, SPEC, 2, backend="torch_graph")
    with pytest.raises(ShiftInputError, match="second derivatives"):
        torch.autograd.grad(h.sum(), e, create_graph=True)


SERVED = (
    {"injection": "concat", "position": "rope", "norm_placement": "sandwich_post", "residual_scale": "1/T"},
    {"injection": "diagonal", "window": 2, "softcap": 4.0, "norm": "rmsnorm", "norm_weight": "one_plus"},
    {
        "injection": "norm_add",
        "causal": False,
        "qk_norm": True,
        "attn_scale": 0.1,
        "activation": "geglu_tanh",
    },
)


class AsksTheHost(TorchDispatchMode):
    """Names operators that a capture would not survive: copies between host and device, values read back."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in (*args, result) if isinstance(x, torch.Tensor)}
        if len(devices) > 1 or func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero"):
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("options", SERVED, ids=str)
def test_what_is_recorded_never_asks_the_host(options):
    spec = BlockSpec(16, 2, d_ff=32, **options)
    assert all(TORCH_GRAPH.served.serves(name, value) for name, value in options.items())
    weights = {name: w.detach().to("meta") for name, w in LoopedBlock(spec).weights().items()}
    e = torch.empty(3, 5, 16, device="meta")
    options = CallOptions(2, e.dtype)
    with AsksTheHost() as asked:
        h, _, saved = TORCH.forward(e, weights, spec, options, for_backward=True)
        TORCH.backward(h, e, weights, spec, options, saved)
    assert asked.found == []
    with AsksTheHost() as asked:
        torch.arange(3, device="cpu").to("meta")
    assert asked.found


def test_auto_takes_it_by_measurement_alone(monkeypatch):
    monkeypatch.setattr(torch_graph, "no_device", lambda emulated: None)
    problem = Problem(SPEC, 3, 5, torch.float32, torch.float32, torch.device("cuda"), True, n_loops=2)
    dispatch.forget()
    assert TORCH_GRAPH.why_not(problem).kind is Kind.UNVERIFIED
    assert "torch_graph" in dispatch.candidates(problem)
    assert dispatch.plan(problem).backend == "torch"
    assert "not       torch_graph: not verified" in explain(SPEC, 3, 5, device="cuda", n_loops=2)
    dispatch.forget()


@pytest.mark.parametrize(
    "changed",
    [
        dict(halting=True),
        dict(options=("h0",)),
        dict(cache_dtype=torch.float32),
        dict(device=torch.device("cpu")),
    ],
    ids=str,
)
def test_what_no_graph_holds_is_for_others(monkeypatch, changed):
    monkeypatch.setattr(torch_graph, "no_device", lambda emulated: None)
    fields = dict(dtype=torch.float32, compute_dtype=torch.float32, device=torch.device("cuda"), grad=False)
    assert TORCH_GRAPH.why_not(Problem(SPEC, 3, 5, **{**fields, **changed})).kind is Kind.FOREIGN
