"""LoopedTransformer: one object for both stages."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from shift.model import Layout, LoopedTransformer
from shift.tasks import IGNORE
from shift_kernels import BlockSpec, ShiftInputError


def make(**options):
    torch.manual_seed(0)
    spec = BlockSpec(d_model=16, n_heads=2, injection="add", causal=options.pop("causal", True))
    n_classes = 7 if options.get("layout", Layout()).tied else 5
    sizes = {"vocab_size": 7, "n_classes": n_classes, "max_seq_len": 6}
    return LoopedTransformer(spec, **{**sizes, **options})


SPEC = BlockSpec(d_model=16, n_heads=2)
TOKENS = torch.arange(12).view(2, 6) % 7


def test_logits_have_one_row_per_position():
    assert make()(TOKENS, 3).shape == (2, 6, 5)
    assert make()(TOKENS[:, :4], 3, return_all_loops=True).shape == (3, 2, 4, 5)


def test_loops_change_the_result_but_not_the_parameters():
    model = make()
    assert not torch.equal(model(TOKENS, 1), model(TOKENS, 4))


SLOW_IS_FINE = pytest.mark.filterwarnings("default::shift_kernels.BackendFallbackWarning")
"""Not every kernel takes h0."""

LAYOUTS = [
    Layout(),
    Layout(initial_state="learned"),
    Layout(n_prelude=1, n_coda=2),
    Layout(tied=True, logit_softcap=5.0, init_loops=4),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["loop alone", "learned start", "prelude and coda", "tied"])
@pytest.mark.parametrize("n_loops", [1, 4])
@SLOW_IS_FINE
def test_every_parameter_is_used_in_both_stages(n_loops, layout):
    # Otherwise distributed training needs a search for unused parameters, and the switch a new wrapper.
    model = make(n_contexts=2, layout=layout)
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


def by_hand(model, tokens, n_loops, context=None):
    """The logits, from the parts."""
    h = model.tokens(tokens) + model.positions.weight[: tokens.shape[1]]
    h = model.prelude(h, 1)
    h = model.coda(model.block(h, n_loops), 1)
    weight, bias = model.readout()
    z = torch.nn.functional.linear(model.norm(h), weight, bias)
    cap = model.layout.logit_softcap
    return z if cap is None else cap * (z / cap).tanh()


@pytest.mark.parametrize("tied", [False, True])
def test_prelude_core_and_coda_run_one_after_another(tied):
    model = make(layout=Layout(n_prelude=2, n_coda=1, tied=tied, logit_softcap=0.5))
    assert [block.spec.n_layers for block in model.parts.values()] == [2, 1, 1]
    assert model.prelude.spec.injection == model.coda.spec.injection == "none"
    torch.testing.assert_close(model(TOKENS, 3), by_hand(model, TOKENS, 3))
    every = model(TOKENS, 3, return_all_loops=True)
    torch.testing.assert_close(every, torch.stack([model(TOKENS, t) for t in (1, 2, 3)]))
    assert model(TOKENS, 3).abs().max() < 0.5


@SLOW_IS_FINE
def test_a_learned_start_is_where_the_loops_start():
    model = make(layout=Layout(initial_state="learned"))
    torch.testing.assert_close(model(TOKENS, 3), make()(TOKENS, 3))  # it begins as 0
    with torch.no_grad():
        model.start.fill_(0.7)
    e = model.embed(TOKENS)
    torch.testing.assert_close(model(TOKENS, 2), model.read(model.block(e, 2, h0=torch.full_like(e, 0.7))))


@SLOW_IS_FINE
def test_a_random_start_is_drawn_in_training_and_fixed_in_evaluation():
    model = make(layout=Layout(initial_state="random"))
    assert not torch.equal(model(TOKENS, 2), model(TOKENS, 2))
    model.eval()
    state = torch.get_rng_state()
    assert torch.equal(model(TOKENS, 2), model(TOKENS, 2))
    assert torch.equal(torch.get_rng_state(), state)
    # Neither on the other samples of the batch nor on the tokens before, which a cache may hold.
    e = model.embed(TOKENS)
    assert torch.equal(model.initial(e)[1:, 3:], model.initial(e[1:, 3:]))


def test_a_tied_model_begins_as_one_that_knows_nothing():
    torch.manual_seed(0)
    sizes = dict(vocab_size=500, n_classes=500, max_seq_len=32)
    spec = BlockSpec(d_model=128, n_heads=4, injection="add")
    model = LoopedTransformer(spec, **sizes, layout=Layout(tied=True))
    tokens = torch.randint(500, (8, 33))
    loss = model(tokens[:, :-1], 2, targets=tokens[:, 1:]) / (8 * 32)
    assert loss.item() == pytest.approx(math.log(500), rel=0.05)


def test_a_tied_model_has_no_second_matrix():
    model = make(layout=Layout(tied=True))
    assert "head.weight" not in model.state_dict()
    assert model(TOKENS, 2).shape == (2, 6, 7)


def test_what_stands_around_the_loop_changes_none_of_its_first_weights():
    plain, framed = make().state_dict(), make(layout=Layout(init_loops=4)).state_dict()
    scaled = {name for name in plain if not torch.equal(plain[name], framed[name])}
    assert scaled == {"block.layers.0.self_attn.out_proj.weight", "block.layers.0.linear2.weight"}


def test_branches_start_smaller_by_the_layers_that_add_to_the_stream():
    layout = dict(n_prelude=2, n_coda=1)
    plain, framed = make(layout=Layout(**layout)), make(layout=Layout(**layout, init_loops=4))
    for name, part in framed.parts.items():
        small, large = part.layers.get_submodule("0"), plain.parts[name].layers.get_submodule("0")
        for path in ("self_attn.out_proj.weight", "linear2.weight"):
            ratio = small.get_parameter(path) / large.get_parameter(path)
            torch.testing.assert_close(ratio, torch.full_like(ratio, 14**-0.5))  # 2 (2 + 4 + 1)


def test_targets_turn_logits_into_their_summed_loss():
    model, targets = make(layout=Layout(n_coda=1)), TOKENS % 5
    targets[0, :3] = IGNORE
    expected = cross_entropy(model(TOKENS, 3).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(TOKENS, 3, targets=targets), expected)
    each = [model(TOKENS, t, targets=targets) for t in (1, 2, 3)]
    weighted = model(TOKENS, 3, targets=targets, loop_weights=(1.0, 2.0))
    torch.testing.assert_close(weighted, (each[0] + 2 * each[1] + 2 * each[2]) / 5)
    torch.testing.assert_close(model(TOKENS, 1, targets=targets, loop_weights=(3.0, 2.0)), each[0])


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: make()(torch.zeros(1, 7, dtype=torch.int64), 1), "tokens"),
        (lambda: make()(TOKENS.float(), 1), "tokens"),
        (lambda: make()(TOKENS[0], 1), "tokens"),
        (lambda: make()(TOKENS - 1, 1), "tokens"),
        (lambda: make()(TOKENS + 7, 1), "tokens"),
        (lambda: make()(TOKENS.tolist(), 1), "tokens"),
        (lambda: make(vocab_size=0), "vocab_size"),
        (lambda: make(n_classes=0), "n_classes"),
        (lambda: make(max_seq_len=2.5), "max_seq_len"),
        (lambda: make(n_contexts=-1), "n_contexts"),
        (lambda: make()(TOKENS, 1, context=torch.tensor([0, 1])), "context"),
        (lambda: make(n_contexts=2)(TOKENS, 1), "context"),
        (
            lambda: LoopedTransformer(
                SPEC, vocab_size=7, n_classes=5, max_seq_len=6, layout=Layout(tied=True)
            ),
            "layout.tied",
        ),
        (
            lambda: LoopedTransformer(
                SPEC, vocab_size=7, n_classes=5, max_seq_len=6, layout=Layout(initial_state="random")
            ),
            "layout.initial_state",
        ),
    ],
)
def test_bad_input_is_named(call, argument):
    with pytest.raises(ShiftInputError, match=f"'{argument}'"):
        call()
