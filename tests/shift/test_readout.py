"""The loss by chunks: what plain PyTorch says, in value and in every gradient, and without its memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from shift import readout
from shift.readout import logits_of, summed_loss
from shift.tasks import IGNORE

BATCH, LENGTH, WIDTH, CLASSES, LOOPS = 3, 5, 8, 11, 4


def problem(dtype, loops=()):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    targets = torch.randint(CLASSES, (BATCH, LENGTH), generator=generator)
    targets[0, 1:] = IGNORE
    return draw(*loops, BATCH, LENGTH, WIDTH), draw(CLASSES, WIDTH), draw(CLASSES), targets


def plain(h, weight, bias, targets, softcap, loop_weights=(1.0,)):
    """The meaning: every loop's logits at once."""
    every = h if h.ndim == 4 else h[None]
    losses = [
        F.cross_entropy(
            logits_of(after, weight, bias, softcap).flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORE,
            reduction="sum",
        )
        for after in every
    ]
    own = [loop_weights[min(t, len(loop_weights) - 1)] for t in range(len(every))]
    return sum(w * loss for w, loss in zip(own, losses, strict=True)) / sum(own)


@pytest.fixture(params=[1, 4, 100], ids=["rows alone", "uneven chunks", "one chunk"])
def rows_at_once(request, monkeypatch):
    monkeypatch.setitem(readout.CHUNK, "cpu", request.param * CLASSES)


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize(
    ("softcap", "bias", "loop_weights"),
    list(itertools.product([None, 1.5], [True, False], [(), (1.0,), (0.0, 0.5, 2.0)])),
)
def test_value_and_gradients_are_those_of_plain_pytorch(softcap, bias, loop_weights):
    h, weight, b, targets = problem(torch.float64, (LOOPS,) if loop_weights else ())
    inputs = (h, weight, *([b] if bias else []))
    given = b if bias else None
    loss = summed_loss(h, weight, given, targets, softcap=softcap, loop_weights=loop_weights)
    expected = plain(h, weight, given, targets, softcap, loop_weights or (1.0,))
    torch.testing.assert_close(loss, expected)
    for own, other in zip(
        torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * expected, inputs), strict=True
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_at_most_twice_that_of_plain_pytorch(dtype, monkeypatch):
    monkeypatch.setitem(readout.CHUNK, "cpu", 4 * CLASSES)
    exact = problem(torch.float64)
    rounded = problem(dtype)
    truth = torch.autograd.grad(plain(*exact, None), exact[:3])

    def errors(loss):
        found = torch.autograd.grad(loss, rounded[:3])
        return [float((g - t).abs().max()) for g, t in zip(found, truth, strict=True)]

    for ours, theirs in zip(errors(summed_loss(*rounded)), errors(plain(*rounded, None)), strict=True):
        assert ours <= 2 * theirs + 1e-7


def test_autocast_multiplies_in_its_dtype_and_keeps_the_weights_gradients_in_theirs(monkeypatch):
    monkeypatch.setitem(readout.CHUNK, "cpu", 4 * CLASSES)
    h, weight, bias, targets = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_loss(h, weight, bias, targets)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, (h, weight, bias))
    assert [g.dtype for g in grads] == 3 * [torch.float32]
    exact = torch.autograd.grad(plain(h, weight, bias, targets, None), (h, weight, bias))
    for g, e in zip(grads, exact, strict=True):
        assert not torch.equal(g, e)
        torch.testing.assert_close(g, e, atol=0.05, rtol=0.05)


def test_what_is_not_finite_stays_so_and_unread_rows_reach_nothing(monkeypatch):
    monkeypatch.setitem(readout.CHUNK, "cpu", 4 * CLASSES)
    h, weight, bias, targets = problem(torch.float32)
    spoilt = h.detach().clone()
    spoilt[targets == IGNORE] = torch.inf
    torch.testing.assert_close(
        summed_loss(spoilt, weight, bias, targets), summed_loss(h, weight, bias, targets)
    )
    spoilt[1, 0, 0] = torch.nan
    assert summed_loss(spoilt, weight, bias, targets).isnan()


def test_logits_of_all_loops_never_stand_in_memory(monkeypatch):
    monkeypatch.setitem(readout.CHUNK, "cpu", 2 * CLASSES)
    sizes, linear = [], F.linear

    def watched(*args):
        out = linear(*args)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(F, "linear", watched)
    h, weight, bias, targets = problem(torch.float32, (LOOPS,))
    summed_loss(h, weight, bias, targets, loop_weights=(1.0,)).backward()
    assert max(sizes) == 2 * CLASSES
    assert sum(sizes) == LOOPS * BATCH * LENGTH * CLASSES  # and every one is computed once
