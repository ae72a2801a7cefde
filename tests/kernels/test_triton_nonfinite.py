"""NaN and infinity in the Triton kernels: not finite exactly where plain PyTorch is not finite.

Zero padding and other sequences in the same tile are multiplied by zeros, which must not make a NaN of an
infinity. In the interpreter, whose maximum passes a NaN on: what the hardware's does is read from the PTX
(test_triton_offline.py).
"""

import importlib.util
import itertools
import math

import pytest
import torch
from torch import nn

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from triton_interpreter import DEVICE

from shift_kernels import BlockSpec, LoopedBlock, attention, looped_block, reference
from shift_kernels.backends.triton import rows
from shift_kernels.spec import ACTIVATIONS, GATED

if DEVICE != "cpu":
    pytest.skip("the interpreter's figures; a GPU is tested in tests/gpu", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy on infinities
]

# Every option that says where a number goes, each in one of these.
BLOCKS = {
    "relu": {"activation": "relu", "norm": "none"},
    "gelu": {"activation": "gelu", "norm_placement": "post", "position": "rope"},
    "gelu_tanh": {"activation": "gelu_tanh", "norm": "rmsnorm", "causal": False, "injection": "add"},
    "swiglu": {"activation": "swiglu", "norm_placement": "sandwich", "loop_norm": True},
}


def results(backend, e, weights, spec, grad_h, **call):
    """h and the gradients of e and of all weights."""
    leaves = [x.clone().requires_grad_() for x in (e, *weights.values())]
    block = dict(zip(weights, leaves[1:], strict=True))
    if backend == "reference":
        h, _ = reference.looped_block(leaves[0], block, spec, **call)
    else:
        h = looped_block(leaves[0], block, spec, backend=backend, **call)
    return [h.detach(), *torch.autograd.grad(h, leaves, grad_h)]


def make(dtype=torch.float32, batch=3, seq_len=5, **options):
    torch.manual_seed(0)
    spec = BlockSpec(**{"d_model": 8, "n_heads": 2, "d_ff": 12, **options})
    weights = {name: w.detach() for name, w in LoopedBlock(spec).named_parameters()}
    for w in weights.values():
        nn.init.normal_(w, std=0.4)
    e, grad_h = torch.randn(2, batch, seq_len, spec.d_model).to(dtype)
    return spec, e, {name: w.to(dtype) for name, w in weights.items()}, grad_h


def assert_same_pattern(ours, plain, names, about):
    for name, a, b in zip(names, ours, plain, strict=True):
        wrong = a.isfinite() != b.isfinite()
        assert not wrong.any(), f"{about}: {name} is {a[wrong][:3]}, not {b[wrong][:3]}"


@pytest.mark.parametrize(("half", "options"), list(enumerate(BLOCKS.values())), ids=BLOCKS)
def test_what_is_not_finite_in_plain_pytorch_is_not_finite_here_and_nothing_else(half, options):
    """Planted in e, and in every second weight: each is so in two of the blocks."""
    dtype = torch.float16 if options["activation"] in ("relu", "swiglu") else torch.float32
    spec, e, weights, grad_h = make(dtype, **options)
    values = itertools.cycle((math.nan, math.inf, -math.inf))
    for target, value in zip(("e", *list(weights)[half % 2 :: 2]), values):  # noqa: B905
        planted = {name: x.clone() for name, x in (("e", e), *weights.items())}
        x = planted[target]
        x[(1, 3, 2) if target == "e" else tuple(min(3, n - 1) for n in x.shape)] = value
        call = {"n_loops": 2, "seq_lens": torch.tensor([5, 4, 2]) if target == "e" else None}
        ours, plain = (
            results(backend, planted["e"], {name: planted[name] for name in weights}, spec, grad_h, **call)
            for backend in ("triton", "reference")
        )
        assert_same_pattern(ours, plain, ["h", "e", *weights], f"{value} in {target}")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_a_gradient_that_is_not_finite_stays_with_its_sequence(value, n_layers):
    spec, e, weights, grad_h = make(n_layers=n_layers, activation="relu")
    grad_h[1, 2, 3] = value
    ours, plain = (results(b, e, weights, spec, grad_h, n_loops=2) for b in ("triton", "reference"))
    assert_same_pattern(ours, plain, ["h", "e", *weights], f"{value} in a gradient")
    assert ours[1][[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((k, torch.float32) for k in ACTIVATIONS), ("gelu", torch.float16)]
)
def test_activations_are_finite_where_pytorchs_are(kind, dtype):
    values = [math.nan, math.inf, -math.inf, -3e4, 3e4, 0.0, -2.0, 2.0]
    grid = torch.tensor(list(itertools.product(values, repeat=3 if kind in GATED else 2)), dtype=dtype)
    dg, x = grid[:, :1].contiguous(), grid[:, 1:].contiguous().requires_grad_()
    plain = reference.activate(x, kind)
    (dx,) = torch.autograd.grad(plain, x, dg)
    g, da = torch.empty_like(dg), torch.empty_like(x)
    rows.activation(x.detach(), None, kind, g)
    rows.activation_backward(x.detach(), None, kind, dg, da)
    assert_same_pattern([g, da], [plain, dx], ["g", "da"], kind)


def test_gelu_for_narrow_operands_is_as_near_as_stated():
    x = torch.linspace(-12, 12, 24_001).half()[:, None]
    y, dx, ones = (torch.empty(x.shape), torch.empty(x.shape), torch.ones(x.shape))
    rows.activation(x, None, "gelu", y)
    rows.activation_backward(x, None, "gelu", ones, dx)
    exact = x.double().requires_grad_()
    gelu = nn.functional.gelu(exact)
    (slope,) = torch.autograd.grad(gelu.sum(), exact)
    assert (y - gelu).abs().max() <= 1e-6
    assert (dx - slope).abs().max() <= 2e-6


@pytest.mark.parametrize("magnitude", [1e29, 1e31, 1e37])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_masked_key_has_weight_however_small_the_scores_are(magnitude, sign):
    """Scores of about -magnitude, and a future and pads that only their mask keeps away."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 20, 4)
    q[..., 0], k[..., 0] = magnitude**0.5, -(magnitude**0.5) * torch.linspace(1, 1 + sign * 0.5, 20)
    lens = torch.tensor([18])
    for causal in (True, False):
        call = {"causal": causal, "seq_lens": lens}
        o = attention(q, k, v, **call, backend="triton")
        torch.testing.assert_close(o, attention(q, k, v, **call, backend="torch"))
        other = [x.clone() for x in (q, k, v)]
        for x in other:
            x[:, :, 18:] = 5  # pads
            if causal:
                x[:, :, 13:] = 5
        seen = 13 if causal else 18
        assert torch.equal(attention(*other, **call, backend="triton")[:, :, :seen], o[:, :, :seen])


def test_a_row_of_which_all_scores_overflow_is_not_a_number_and_pads_stay_zero():
    q = torch.full((1, 1, 3, 8), 1e30)
    o = attention(q, -q, q, seq_lens=torch.tensor([2]), backend="triton")
    assert o[0, 0, :2].isnan().all()
    assert not o[0, 0, 2].any()


def test_scores_of_infinity_and_nan_reach_output_and_gradients():
    torch.manual_seed(0)
    for value in (math.nan, math.inf, -math.inf):
        qkv = [x.requires_grad_() for x in torch.randn(3, 1, 1, 6, 4)]
        planted = torch.zeros_like(qkv[0])
        planted[0, 0, 2, 1] = value

        def run(f, value=planted, qkv=qkv):
            o = f(qkv[0] + value, *qkv[1:])
            return [o, *torch.autograd.grad(o.sum(), qkv)]

        ours = run(lambda *x: attention(*x, causal=False, backend="triton"))
        plain = run(lambda *x: reference.attention(*x, causal=False))
        assert_same_pattern(ours, plain, ["o", "dq", "dk", "dv"], f"{value} in q")
