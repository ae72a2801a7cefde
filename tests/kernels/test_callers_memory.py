"""Lengths and loops belong to the caller, who may write to them at any time: calls use those at the call."""

import threading

import numpy as np
import pytest
import torch

from shift_kernels import BlockSpec, LoopedBlock, ShiftInputError, attention, backends

SERVING = [name for name in ("torch", "cpu") if backends()[name] == "available"]
every_backend = pytest.mark.parametrize("backend", SERVING)


def make():
    torch.manual_seed(0)
    return LoopedBlock(BlockSpec(d_model=8, n_heads=2, d_ff=16)), torch.randn(3, 6, 8, requires_grad=True)


def on_rewriting(call, e, memory, values):
    """The gradient of e before and after ``memory`` has been written to, behind autograd's back."""
    h = call()
    (before,) = torch.autograd.grad(h.sum(), e, retain_graph=True)
    memory[:] = values
    (after,) = torch.autograd.grad(h.sum(), e, retain_graph=True)
    return before, after


@every_backend
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("values", [[6, 6, 6], [0, 1, 2], [10**6] * 3, [-5] * 3])
@pytest.mark.parametrize("name", ["seq_lens", "n_loops"])
def test_a_backward_uses_the_numbers_of_its_forward(name, values, dtype, backend):
    block, e = make()
    memory = np.array([5, 3, 2], dtype=dtype)
    call = {"n_loops": 2, name: torch.from_numpy(memory), "backend": backend}
    before, after = on_rewriting(lambda: block(e, **call), e, memory, values)
    assert torch.equal(before, after)


@every_backend
@pytest.mark.parametrize("name", ["seq_lens", "n_loops"])
def test_writing_in_place_after_the_call_is_no_error(name, backend):
    block, e = make()
    numbers = torch.tensor([5, 3, 2])
    before, after = on_rewriting(
        lambda: block(e, **{"n_loops": 2, name: numbers, "backend": backend}), e, numbers, 1
    )
    assert torch.equal(before, after)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_backward_uses_the_numbers_of_its_forward(compiler):
    block, e = make()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    lens, loops = np.array([5, 3, 2]), np.array([1, 2, 3])
    call = {"n_loops": torch.from_numpy(loops), "seq_lens": torch.from_numpy(lens)}
    (expected,) = torch.autograd.grad(block(e, **call).sum(), e)
    h = compiled(e, **call)
    lens[:], loops[:] = [2, 5, 6], [3, 3, 1]
    torch.testing.assert_close(torch.autograd.grad(h.sum(), e)[0], expected)


def test_offsets_of_packed_sequences_are_read_once():
    block, e = make()
    packed = e.detach()[0].requires_grad_()
    memory = np.array([0, 2, 3, 6])
    before, after = on_rewriting(
        lambda: block(packed, 2, cu_seqlens=torch.from_numpy(memory)), packed, memory, [0, 6, 6, 6]
    )
    assert torch.equal(before, after)


def test_attention_uses_the_lengths_of_its_forward():
    q = torch.randn(3, 2, 5, 4, requires_grad=True)
    memory = np.array([5, 3, 2])
    before, after = on_rewriting(
        lambda: attention(q, q, q, seq_lens=torch.from_numpy(memory)), q, memory, [1, 5, 0]
    )
    assert torch.equal(before, after)


@every_backend
def test_numbers_that_another_thread_rewrites_are_some_that_it_wrote(backend):
    """Values are either all valid, or refused; nothing reads or writes beyond its memory."""
    block, _ = make()
    e, lens, stop = torch.randn(64, 6, 8), torch.ones(64, dtype=torch.int64), threading.Event()
    lens_and_more = torch.tensor([6, 10**9, 1])

    def rewrite():
        while not stop.is_set():
            for n in lens_and_more:
                lens.fill_(n)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(30):
            try:
                assert block(e, 2, seq_lens=lens, backend=backend).isfinite().all()
            except ShiftInputError as error:
                assert "1000000000" in str(error)  # noqa: PT017
    finally:
        stop.set()
        writer.join()


@every_backend
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.int(),
        lambda x: torch.stack([x, x], 1)[:, 0],
        lambda x: torch.cat([x[:1], x])[1:],
        lambda x: x.flip(0).flip(0),
        lambda x: x.clone().requires_grad_(False),
    ],
    ids=["int32", "strided", "offset", "flipped", "plain"],
)
def test_numbers_may_lie_anyhow_in_memory(layout, backend):
    block, e = make()
    lens, loops = torch.tensor([5, 3, 2]), torch.tensor([1, 0, 3])
    expected = block(e, loops, seq_lens=lens, backend=backend)
    assert torch.equal(block(e, layout(loops), seq_lens=layout(lens), backend=backend), expected)
    same = torch.tensor(3)
    assert torch.equal(
        block(e, same.expand(3), seq_lens=same.expand(3), backend=backend),
        block(e, 3, seq_lens=torch.tensor([3, 3, 3]), backend=backend),
    )


def negated(x):
    """The same values, of which memory holds the opposite."""
    return torch._neg_view(-x)


@every_backend
def test_a_negation_that_is_still_to_be_done_is_done(backend):
    block, e = make()
    weights = {name: w.detach() for name, w in block.weights().items()}
    expected = block(e, 2, backend=backend)
    (expected_grad,) = torch.autograd.grad(expected.cos().sum(), e, retain_graph=True)
    x = e.detach().requires_grad_()
    assert negated(x).is_neg()
    h = block(negated(x), 2, backend=backend)
    assert torch.equal(h, expected)
    torch.testing.assert_close(torch.autograd.grad(h.cos().sum(), x)[0], expected_grad)
    with torch.no_grad():
        assert torch.equal(block(negated(e), 2, backend=backend), expected)
        for p in block.parameters():
            p.data = negated(p.data)
    assert torch.equal(block(e, 2, backend=backend), expected)
    assert all(torch.equal(w, weights[name]) for name, w in block.weights().items())
    cotangent = torch.randn_like(expected)
    (plain,) = torch.autograd.grad(expected, e, cotangent, retain_graph=True)
    assert torch.equal(torch.autograd.grad(expected, e, negated(cotangent), retain_graph=True)[0], plain)


@every_backend
def test_gradients_without_memory_of_their_own_are_read(backend):
    block, e = make()
    h = block(e, 2, backend=backend)
    ones, zeros = torch.ones(()).expand(h.shape), torch._efficientzerotensor(h.shape)
    for cotangent, plain in ((ones, torch.ones_like(h)), (zeros, torch.zeros_like(h))):
        (grad,) = torch.autograd.grad(h, e, cotangent, retain_graph=True)
        assert torch.equal(grad, torch.autograd.grad(h, e, plain, retain_graph=True)[0])


def test_a_real_part_of_a_conjugate_is_read_with_its_sign():
    block = LoopedBlock(BlockSpec(d_model=8, n_heads=2))
    e = torch.randn(2, 3, 8, dtype=torch.complex64).conj().imag
    assert e.is_neg()
    for backend in SERVING:
        assert torch.equal(block(e, 2, backend=backend), block(e.resolve_neg(), 2, backend=backend))
    q = torch.randn(1, 2, 3, 4, dtype=torch.complex64).conj().imag
    assert torch.equal(attention(q, q, q), attention(*3 * [q.resolve_neg()]))
