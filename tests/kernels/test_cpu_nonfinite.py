"""NaN and infinity on the C++ backend: it is not finite where plain PyTorch of the same dtypes is not.

And nowhere else: padding to whole vectors multiplies by zeros, which must not make a NaN of an infinity.
"""

import itertools
import math

import pytest
import torch
from test_cpu_backend import (
    AUTOCAST,
    FLOAT32,
    ISAS,
    in_dtypes,
    make,
    native,
    needs_library,
    normal,
    on_cpu_backend,
    skip_without,
)

from shift_kernels.backends import cpu as cpu_backend
from shift_kernels.spec import ACTIVATIONS

ATTENTION = (
    {"position": "rope", "head_dim": 4},
    {"causal": False, "head_dim": 5, "injection": "add", "n_layers": 2},
    {"head_dim": 5, "n_heads": 4, "n_kv_heads": 2},
)
NORMS = (
    {"norm": "layernorm", "norm_placement": "pre", "loop_norm": True},
    {"norm": "layernorm", "norm_placement": "sandwich"},
    {"norm": "rmsnorm", "norm_placement": "pre"},
    {"norm": "rmsnorm", "norm_placement": "post"},
    {"norm": "none", "injection": "diagonal"},
    {"norm": "layernorm", "norm_placement": "sandwich_post", "injection": "concat"},
    {"norm": "rmsnorm", "norm_weight": "one_plus", "injection": "norm_add", "qk_norm": True},
)
# No whole vectors, and odd: half a pair of bfloat16.
WIDTHS = ({"d_model": 20, "d_ff": 23}, {"d_model": 21, "d_ff": 16})


def isas():
    """What this processor has."""
    return ISAS[: 1 + ISAS.index(native.best_isa())]


@needs_library
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: "-".join(map(str, n.values())))
def test_what_is_not_finite_in_plain_pytorch_is_not_finite_here(activation, norm):
    seed = ACTIVATIONS.index(activation) + NORMS.index(norm)
    options = {**ATTENTION[seed % 3], **WIDTHS[seed % 2], **norm}
    block, e = make(2, 19, seed, activation=activation, **options)
    planted = zip(("e", *block.weights()), itertools.cycle((math.nan, math.inf, -math.inf)))
    for (name, value), dtypes in itertools.product(planted, (FLOAT32, AUTOCAST)):
        memory = (e if name == "e" else block.weights()[name]).detach().view(-1)
        where = int(torch.randint(18 * e.shape[-1] if name == "e" else len(memory), ()))
        clean, memory[where] = memory[where].item(), value
        # Plain PyTorch computes pads too, and a weight's infinity may come out of one: no pads then.
        call = {"n_loops": 2} | ({"seq_lens": torch.tensor([19, 18])} if name == "e" else {})
        plain = in_dtypes(block, e, normal, dict(call), dtypes)
        for isa in isas():
            ours = on_cpu_backend(block, e, normal, dict(call), isa, dtypes)
            for of, a, b in zip(["h", "e", *block.weights()], ours, plain, strict=True):
                wrong = a.isfinite() != b.isfinite()
                assert not wrong.any(), (
                    f"{isa}, {dtypes[1]}, {value} in {name}: {of} is {a[wrong][:3]}, not {b[wrong][:3]}"
                )
        memory[where] = clean


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_relu_passes_a_nan_and_stops_an_infinite_gradient(isa):
    """A block of which only x + relu(x) is left, and of its gradient 1 + slope."""
    skip_without(isa)
    block, _ = make(d_model=16, d_ff=16, norm="none", bias=False, activation="relu")
    weights = {name: torch.zeros_like(w) for name, w in block.weights().items()}
    weights["layers.0.linear1.weight"] = weights["layers.0.linear2.weight"] = torch.eye(16)
    e = torch.tensor([math.nan, -1.0, 2.0, 0.0])[:, None, None].expand(4, 1, 16).contiguous()
    call_options = cpu_backend.CallOptions(n_loops=1, compute_dtype=torch.float32)
    h, _, saved = cpu_backend.CPU.forward(e, weights, block.spec, call_options, for_backward=True, isa=isa)
    assert h[0].isnan().all()
    assert h[1:, 0, 0].tolist() == [-1.0, 4.0, 0.0]
    grad_h = torch.full_like(h, math.inf)
    grad_e, _ = cpu_backend.CPU.backward(grad_h, e, weights, block.spec, call_options, saved, isa=isa)
    assert not grad_e.isfinite().any()


def huge_scores(magnitude, signs):
    """A block without norms, and 20 tokens whose scores are of this magnitude, with the signs of the keys."""
    block, _ = make(d_model=16, n_heads=1, d_ff=0, norm="none", bias=False)
    weights = {name: torch.zeros_like(w) for name, w in block.weights().items()}
    root = math.sqrt(magnitude)  # every query and key, in their first number
    weights["layers.0.self_attn.in_proj_weight"][0, 0] = root * 2
    weights["layers.0.self_attn.in_proj_weight"][16, 1] = root * 2
    weights["layers.0.self_attn.in_proj_weight"][32:] = torch.eye(16)
    weights["layers.0.self_attn.out_proj.weight"] = torch.eye(16)
    block.load_state_dict(weights)
    e = torch.randn(1, 20, 16)
    e[..., 0] = 1
    e[..., 1] = signs
    return block, e


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("magnitude", [1e29, 1e31, 1e35, 1e37])
@pytest.mark.parametrize(
    "signs", [torch.full((20,), -1.0), torch.linspace(-1, 1, 20), torch.linspace(1, -1, 20)]
)
def test_the_past_cannot_see_the_future_however_large_the_scores(isa, magnitude, signs):
    skip_without(isa)
    block, e = huge_scores(magnitude, signs)
    changed = e.clone()
    changed[:, 13:, 2:] = 5
    changed[:, 13:, 1] = e[:, 13:, 1].flip(1).abs()
    last = lambda h: torch.zeros_like(h).index_fill_(1, torch.tensor([12]), 1)  # noqa: E731
    (h, grad_e, *_), (h_changed, *_) = (
        on_cpu_backend(block, x, last, {"n_loops": 1}, isa) for x in (e, changed)
    )
    assert torch.equal(h[:, :13], h_changed[:, :13])
    assert not grad_e[:, 13:].any()
    plain = in_dtypes(block, e, last, {"n_loops": 1}, FLOAT32)
    torch.testing.assert_close(h, plain[0])
    assert grad_e[..., 2:].isfinite().all()
