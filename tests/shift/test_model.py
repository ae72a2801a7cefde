"""LoopedTransformer: one object for both stages."""

import pytest
import torch

from shift.model import LoopedTransformer
from shift_kernels import BlockSpec, ShiftInputError


def make(**options):
    torch.manual_seed(0)
    spec = BlockSpec(d_model=16, n_heads=2, injection="add", causal=options.pop("causal", True))
    return LoopedTransformer(spec, vocab_size=7, n_classes=5, max_seq_len=6, **options)


TOKENS = torch.arange(12).view(2, 6) % 7


def test_logits_have_one_row_per_position():
    assert make()(TOKENS, 3).shape == (2, 6, 5)
    assert make()(TOKENS[:, :4], 3, return_all_loops=True).shape == (3, 2, 4, 5)


def test_loops_change_the_result_but_not_the_parameters():
    model = make()
    assert not torch.equal(model(TOKENS, 1), model(TOKENS, 4))


@pytest.mark.parametrize("n_loops", [1, 4])
def test_every_parameter_is_used_in_both_stages(n_loops):
    # Otherwise distributed training needs a search for unused parameters, and the switch a new wrapper.
    model = make(n_contexts=2)
    model(TOKENS, n_loops, context=torch.tensor([0, 1])).square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


def test_context_reaches_every_position():
    model = make(n_contexts=2, causal=False)
    a, b = (model(TOKENS, 1, context=torch.tensor([c, c])) for c in (0, 1))
    assert ((a - b).abs().amax(-1) > 0).all()


def test_positions_can_be_left_out():
    model = make(learned_positions=False, causal=False)
    flipped = model(TOKENS.flip(1), 2).flip(1)
    torch.testing.assert_close(model(TOKENS, 2), flipped)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: make()(torch.zeros(1, 7, dtype=torch.int64), 1), "tokens"),
        (lambda: make()(TOKENS, 1, context=torch.tensor([0, 1])), "context"),
        (lambda: make(n_contexts=2)(TOKENS, 1), "context"),
    ],
)
def test_bad_input_is_named(call, argument):
    with pytest.raises(ShiftInputError, match=f"'{argument}'"):
        call()
