"""attention(): queries and keys that differ in number, lengths of both, windows and soft-caps."""

import pytest
import torch

from shift_kernels import ShiftInputError, attention, explain_attention
from shift_kernels.backends import ATTENTION

CASES = {
    "decode": {"q_len": 1, "k_len": 9},
    "several": {"q_len": 3, "k_len": 9},
    "cross": {"q_len": 4, "k_len": 9, "causal": False},
    "more queries than keys": {"q_len": 6, "k_len": 4},
    "ragged keys": {"q_len": 3, "k_len": 9, "k_seq_lens": torch.tensor([9, 2, 0])},
    "ragged both": {
        "q_len": 4,
        "k_len": 9,
        "seq_lens": torch.tensor([4, 1, 3]),
        "k_seq_lens": torch.tensor([7, 9, 2]),
    },
    "ragged, as many": {"q_len": 7, "k_len": 7, "seq_lens": torch.tensor([7, 0, 3])},
    "window": {"q_len": 5, "k_len": 9, "window": 2},
    "window, cross": {"q_len": 9, "k_len": 4, "window": 3, "causal": False},
    "soft-cap and scale": {"q_len": 7, "k_len": 7, "softcap": 0.5, "scale": 0.9},
    "blocks": {"q_len": 150, "k_len": 290, "window": 140, "seq_lens": torch.tensor([150, 33, 1])},
}


def plainly(q, k, v, causal=True, seq_lens=None, k_seq_lens=None, window=None, softcap=None, scale=None):
    """One query after the other; not seen by anyone else."""
    batch, n_heads, q_len, head_dim = q.shape
    if k_seq_lens is None and k.shape[2] == q_len:
        k_seq_lens = seq_lens
    o = torch.zeros_like(q)
    for b in range(batch):
        n = q_len if seq_lens is None else int(seq_lens[b])
        m = k.shape[2] if k_seq_lens is None else int(k_seq_lens[b])
        for i in range(n):
            at = i + m - n
            seen = [
                j for j in range(m) if (not causal or j <= at) and (window is None or abs(at - j) < window)
            ]
            for h in range(n_heads if seen else 0):
                g = h * k.shape[1] // n_heads
                scores = k[b, g, seen] @ q[b, h, i] * (head_dim**-0.5 if scale is None else scale)
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                o[b, h, i] = torch.softmax(scores, 0) @ v[b, g, seen]
    return o


def make(case, head_dim=5, n_kv_heads=2, dtype=torch.float64):
    torch.manual_seed(0)
    q = torch.randn(3, 4, case["q_len"], head_dim, dtype=dtype)
    k, v = torch.randn(2, 3, n_kv_heads, case["k_len"], head_dim, dtype=dtype)
    return (q, k, v), {name: x for name, x in case.items() if name[1:] != "_len"}


def with_gradients(f, tensors, **call):
    tensors = [x.detach().requires_grad_() for x in tensors]
    o = f(*tensors, **call)
    grad = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [o, *torch.autograd.grad(o, tensors, grad.to(o.dtype))]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_reference_is_what_it_says(case):
    if case["q_len"] > 100:
        case = {**case, "q_len": 15, "k_len": 29, "window": 14, "seq_lens": torch.tensor([15, 3, 1])}
    tensors, call = make(case)
    ours, expected = (with_gradients(f, tensors, **call) for f in (attention, plainly))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", [b.name for b in ATTENTION if b.name in ("cpu", "torch")])
@pytest.mark.parametrize("head_dim", [5, 16, 40])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_backend_means_the_same(case, head_dim, backend):
    tensors, call = make(case, head_dim)
    exact = with_gradients(attention, tensors, **call)
    low = [x.float() for x in tensors]
    for a, b in zip(with_gradients(attention, low, **call, backend=backend), exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_explain_says_how():
    words = explain_attention(2, 4, 1, 16, k_len=300, options=["window"])
    assert "[2, 4, 1, 16] over 300 keys float32" in words
    with pytest.raises(ShiftInputError, match="one of 'k_seq_lens', 'window'"):
        explain_attention(2, 4, 1, 16, options=["windows"])


def test_bad_arguments_are_refused():
    q, k = torch.randn(2, 1, 2, 3, 8)
    for call in ({"window": 0}, {"softcap": 0.0}, {"scale": -1.0}, {"k_seq_lens": torch.tensor([4])}):
        with pytest.raises(ShiftInputError, match=next(iter(call))):
            attention(q, k, k, **call)
