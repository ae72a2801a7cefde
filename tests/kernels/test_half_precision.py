"""float16 and bfloat16 in plain PyTorch: what other backends' errors are measured by must be right."""

import pytest
import torch
import torch.nn.functional as F

from shift_kernels import BlockSpec, attention, looped_block

HALVES = (torch.float16, torch.bfloat16)


def with_gradients(f, inputs, cotangent=None):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = f(*inputs)
    return out.detach(), *torch.autograd.grad(
        out, inputs, torch.ones_like(out) if cotangent is None else cotangent
    )


@pytest.mark.parametrize("logit", [1e2, 1e4, 1e5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_attention_is_as_exact_as_torchs_at_scores_beyond_float16(dtype, causal, logit):
    torch.manual_seed(0)
    size = logit**0.5  # head_dim 64: scores are sums of 64 products, over 8
    qkv = [(s * torch.randn(2, 2, 9, 64)).to(dtype) for s in (size, size, 1.0)]
    cotangent = torch.randn(2, 2, 9, 64).to(dtype)
    assert ((qkv[0].float() @ qkv[1].float().mT) / 8).abs().max() > logit

    def ours(*x):
        return attention(*x, causal=causal)

    def torchs(*x):
        return F.scaled_dot_product_attention(*x, is_causal=causal)

    exact = with_gradients(ours, [x.double() for x in qkv], cotangent.double())
    results = (with_gradients(f, qkv, cotangent) for f in (ours, torchs))
    for truth, x, reference in zip(exact, *results, strict=True):
        error, allowed = ((y - truth).abs().max() for y in (x, reference))
        assert error <= 2 * allowed + 1e-7 * truth.abs().max()


@pytest.mark.parametrize("gain", [20, 80, 110])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_block_attends_by_scores_beyond_float16(dtype, gain):
    """Every allowed score is -8 gain^2, the same for every key: a row is the mean of what it sees."""
    eye = torch.eye(64, dtype=dtype)
    spec = BlockSpec(d_model=64, n_heads=1, d_ff=0, norm="rmsnorm", bias=False)
    weights = {
        "layers.0.self_attn.in_proj_weight": torch.cat([gain * eye, -gain * eye, eye]),
        "layers.0.self_attn.out_proj.weight": eye,
        "layers.0.norm1.weight": torch.ones(64, dtype=dtype),
    }
    e = torch.ones(1, 3, 64, dtype=dtype)
    h, *grads = with_gradients(lambda e: looped_block(e, weights, spec, 1, backend="torch"), [e])
    torch.testing.assert_close(h, 2 * e)
    assert all(g.isfinite().all() for g in grads)


def test_a_row_without_a_finite_score_is_not_a_number_as_in_a_plain_softmax():
    q = torch.full((1, 1, 3, 8), 1e30)
    assert attention(q, -q, q).isnan().all()


def test_a_nan_score_reaches_its_row_alone():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 4, 8)
    q[0, 0, 2] = torch.nan
    assert attention(q, k, v).isnan().any(-1)[0, 0].tolist() == [False, False, True, False]


def test_lengths_of_zero_leave_gradients_finite_and_twice_differentiable():
    torch.manual_seed(0)
    qkv = [torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for causal in (True, False):
        f = lambda *x: attention(*x, causal=causal, seq_lens=torch.tensor([0, 2]))  # noqa: B023, E731
        with torch.autograd.detect_anomaly(check_nan=True):
            assert torch.autograd.gradcheck(f, qkv, fast_mode=True)
            assert torch.autograd.gradgradcheck(f, qkv, fast_mode=True)
