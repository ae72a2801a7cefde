"""The flash attention kernels against the reference in float64, in Triton's interpreter."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from triton_interpreter import DEVICE

if DEVICE != "cpu":
    pytest.skip("runs in Triton's interpreter; tests/gpu is for this machine", allow_module_level=True)

from shift_kernels import ShiftInputError, reference
from shift_kernels.backends.triton import attention as kernels
from shift_kernels.backends.triton import attention_op
from shift_kernels.backends.triton.backend import TRITON_ATTENTION
from shift_kernels.call import AttentionProblem

# The reference in the same dtype may be off by luck as little as nothing; this much is always granted.
FLOOR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def tensors(batch, heads, kv_heads, seq_len, head_dim, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, h, seq_len, head_dim, generator=g).to(dtype) for h in (heads, kv_heads, kv_heads)
    ]


def run(attention, qkv, grad, **call):
    """o, dq, dk, dv."""
    inputs = [x.detach().requires_grad_() for x in qkv]
    o = attention(*inputs, **call)
    return o.detach(), *torch.autograd.grad(o, inputs, grad.to(o.dtype))


def check(qkv, *, causal, seq_lens=None, grad=None, floor=None):
    """Every result is at most twice as far from float64 as the reference in the same dtype."""
    dtype = qkv[0].dtype
    floor = FLOOR[dtype] if floor is None else floor
    grad = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(9)) if grad is None else grad
    call = dict(causal=causal, seq_lens=seq_lens)
    ours = run(attention_op.attention, qkv, grad.to(dtype), **call)
    same = run(reference.attention, qkv, grad.to(dtype), **call)
    exact = run(reference.attention, [x.double() for x in qkv], grad.to(dtype).double(), **call)
    for name, a, b, c in zip(("o", "dq", "dk", "dv"), ours, same, exact, strict=True):
        assert a.dtype == dtype
        bound = 2 * (b - c).abs().max() + floor * c.abs().max().clamp(min=1)
        assert (a - c).abs().max() <= bound, f"{name}: {(a - c).abs().max():.3g} over {bound:.3g}"
    return ours


SHAPES = {  # batch, heads, kv_heads, seq_len, head_dim
    "one of everything": (1, 1, 1, 1, 1),
    "Fan's parity heads": (2, 3, 3, 17, 4),
    "head_dim 8": (1, 2, 2, 33, 8),
    "odd head_dim": (1, 2, 2, 31, 24),
    "grouped": (2, 6, 2, 21, 16),
    "one key head": (1, 4, 1, 40, 32),
    "several blocks": (1, 1, 1, 150, 64),
    "widest head": (1, 2, 1, 67, 128),
    "not a power of two": (1, 1, 1, 80, 96),
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_result_and_gradients_are_right(shape, causal):
    check(tensors(*shape), causal=causal)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_half_precision_is_as_good_as_the_reference(causal):
    check(tensors(1, 2, 1, 130, 32, torch.float16), causal=causal)


LENGTHS = {"all kinds": [70, 0, 1, 33], "block borders": [64, 32, 31, 65], "all empty": [0, 0, 0, 0]}


@pytest.mark.parametrize(
    ("lengths", "causal"),
    [("all kinds", True), ("all kinds", False), ("block borders", True), ("all empty", False)],
)
def test_pads_reach_nothing_and_return_zero(lengths, causal):
    qkv = tensors(4, 2, 1, 70, 16)
    lens, grad = torch.tensor(LENGTHS[lengths]), torch.randn(4, 2, 70, 16)
    pad = torch.arange(70) >= lens[:, None]
    clean = check(qkv, causal=causal, seq_lens=lens, grad=grad)
    poisoned = [x.clone() for x in (*qkv, grad)]
    for x in poisoned:
        x.transpose(1, 2)[pad] = float("nan")
    dirty = run(attention_op.attention, poisoned[:3], poisoned[3], causal=causal, seq_lens=lens)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert (b.transpose(1, 2)[pad] == 0).all()


def test_lengths_out_of_range_are_clamped_rather_than_read():
    qkv = tensors(2, 1, 1, 9, 8)
    a = attention_op.attention(*qkv, causal=False, seq_lens=torch.tensor([100, -3]))
    b = attention_op.attention(*qkv, causal=False, seq_lens=torch.tensor([9, 0]))
    assert torch.equal(a, b)


def _layouts():
    """Eight ways in which [batch, heads, seq_len, head_dim] lies in memory."""
    yield "contiguous", lambda x: x.contiguous()
    yield "heads inside", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "batch inside", lambda x: x.transpose(0, 2).contiguous().transpose(0, 2)
    yield "columns first", lambda x: x.mT.contiguous().mT
    yield "every other row", lambda x: x.repeat_interleave(2, 2)[:, :, ::2]
    yield "every other column", lambda x: x.repeat_interleave(2, 3)[..., ::2]
    yield "a slice of a wider one", lambda x: torch.cat([x, x + 7], -1)[..., : x.shape[-1]]
    yield "an odd offset", lambda x: torch.cat([x.new_ones(3), x.flatten()])[3:].view(x.shape)


LAYOUTS = list(_layouts())


@pytest.mark.parametrize(("name", "lay"), LAYOUTS, ids=[n for n, _ in LAYOUTS])
def test_any_strides_of_inputs_and_gradient_give_the_same_bits(name, lay):
    qkv, grad = tensors(2, 2, 2, 19, 12), torch.randn(2, 2, 19, 12)
    expected = run(attention_op.attention, qkv, grad, causal=True, seq_lens=None)
    got = run(attention_op.attention, [lay(x) for x in qkv], lay(grad), causal=True, seq_lens=None)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


def test_an_expanded_gradient_is_read_by_its_strides():
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 2, 10, 8))
    ours = torch.autograd.grad(attention_op.attention(q, k, v, causal=True, seq_lens=None).sum(), (q, k, v))
    theirs = torch.autograd.grad(reference.attention(q, k, v, causal=True).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_every_result_is_written_and_nothing_beyond_it():
    """Outputs start as NaN inside a band of a number that must survive."""
    batch, heads, seq_len, head_dim = 2, 4, 37, 12
    q, k, v = tensors(batch, heads, 2, seq_len, head_dim)
    lens, grad = torch.tensor([37, 5]), torch.randn(q.shape)

    def guarded(x):
        whole = torch.full([n + 4 for n in x.shape], 123.0)
        inner = whole[2:-2, 2:-2, 2:-2, 2:-2]
        inner.fill_(float("nan"))
        return whole, inner

    frames = [guarded(x) for x in (q, q, k, v)]
    o, lse = kernels.attention_forward(q, k, v, True, lens, out=frames[0][1])
    kernels.attention_backward(grad, q, k, v, o, lse, True, lens, out=tuple(f[1] for f in frames[1:]))
    for whole, inner in frames:
        assert not inner.isnan().any()
        inner.fill_(123.0)
        assert (whole == 123.0).all()
    assert not lse.isnan().any()


def test_the_same_call_gives_the_same_bits():
    qkv, grad = tensors(2, 4, 2, 50, 16), torch.randn(2, 4, 50, 16)
    first = run(attention_op.attention, qkv, grad, causal=True, seq_lens=None)
    again = run(attention_op.attention, qkv, grad, causal=True, seq_lens=None)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_scores_in_the_thousands_do_not_overflow():
    q, k, v = tensors(1, 1, 1, 40, 16)
    check([100 * q, 100 * k, v], causal=True, grad=torch.zeros_like(q))


@pytest.mark.parametrize("lens", [None, torch.tensor([9, 4])], ids=["whole", "ragged"])
def test_operator_passes_opcheck(lens):
    q, k, v = (x.requires_grad_() for x in tensors(2, 2, 1, 9, 8))
    torch.library.opcheck(
        torch.ops.shift_kernels.attention,
        (q, k, v, True, lens),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiled_without_a_graph_break():
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 2, 9, 8))

    def model(q, k, v):
        return attention_op.attention(q * 2, k, v, causal=True, seq_lens=None).sin()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v))
    theirs = torch.autograd.grad(model(q, k, v).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_say_what_to_do():
    q, k, v = (x.requires_grad_() for x in tensors(1, 1, 1, 4, 4))
    o = attention_op.attention(q, k, v, causal=True, seq_lens=None)
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(ShiftInputError, match="one derivative"):
        dq.sum().backward()


def test_what_is_not_served_is_named():
    def words(dtype, head_dim):
        problem = AttentionProblem(1, 1, 1, 1, head_dim, dtype, torch.device(DEVICE), False)
        return TRITON_ATTENTION.why_not(problem).words

    assert "float64" in words(torch.float64, 8)
    assert "head_dim 129" in words(torch.float32, 129)
    assert "not verified" in words(torch.float32, 128)


@pytest.mark.parametrize("logit", [1e2, 1e4, 1e5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_beyond_float16_are_as_exact_as_small_ones(dtype, logit):
    """An o rounded to 16 bits would put that rounding, times all of do, into each ds, and so times k into dq.

    Where softmax is one-hot dq and dk are 0, but for the order of sums in float32: a share of k.
    """
    size = logit**0.5
    q, k, v = (s * x for s, x in zip((size, size, 1), tensors(2, 2, 2, 9, 64), strict=True))
    check([x.to(dtype) for x in (q, k, v)], causal=True, floor=torch.finfo(dtype).eps / 20 * size)
