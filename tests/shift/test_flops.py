"""The ledger's formula against torch's counter, on plain PyTorch (fused kernels count as zero there)."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shift.flops import forward_flops, train_step_flops
from shift.model import Layout, LoopedTransformer
from shift_kernels import BlockSpec

CONFIGS = {
    "hop": (dict(d_model=64, n_heads=4, d_ff=256, causal=False, injection="add"), 12, 4),
    "attention only": (dict(d_model=32, n_heads=2, d_ff=0, norm="none"), 20, 3),
    "grouped heads": (dict(d_model=48, n_heads=6, n_kv_heads=2, d_ff=96, position="rope"), 17, 2),
    "swiglu, two layers": (dict(d_model=32, n_heads=4, d_ff=64, n_layers=2, activation="swiglu"), 9, 5),
    "wide heads": (dict(d_model=32, n_heads=2, head_dim=24, loop_norm=True, norm="rmsnorm"), 33, 1),
    "prelude and coda": (dict(d_model=32, n_heads=2, injection="add"), 12, 3, Layout(n_prelude=2, n_coda=1)),
    "concat": (dict(d_model=32, n_heads=2, injection="concat", activation="geglu_tanh"), 12, 3),
    "tied": (dict(d_model=32, n_heads=2), 12, 2, Layout(tied=True)),
}


@pytest.fixture(params=CONFIGS, ids=list(CONFIGS))
def case(request):
    options, seq_len, n_loops, *layout = CONFIGS[request.param]
    torch.manual_seed(0)
    n_classes = 11 if layout and layout[0].tied else 7
    sizes = dict(vocab_size=11, n_classes=n_classes, max_seq_len=seq_len)
    model = LoopedTransformer(BlockSpec(**options), **sizes, layout=layout[0] if layout else None)
    return model, torch.randint(11, (3, seq_len)), n_loops


def counted(step) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def test_forward_formula_equals_torchs_counter(case):
    model, tokens, n_loops = case
    assert forward_flops(model, 3, tokens.shape[1], n_loops) == pytest.approx(
        counted(lambda: model(tokens, n_loops, backend="torch")), rel=0.01
    )


def test_training_formula_equals_torchs_counter(case):
    model, tokens, n_loops = case
    assert train_step_flops(model, 3, tokens.shape[1], n_loops) == pytest.approx(
        counted(lambda: model(tokens, n_loops, backend="torch").sum().backward()), rel=0.01
    )


@pytest.mark.parametrize("injection", ["add", "none"])
@pytest.mark.parametrize("n_prelude", [0, 2])
def test_truncated_training_formula_equals_torchs_counter(injection, n_prelude):
    spec, layout = BlockSpec(d_model=32, n_heads=2, injection=injection), Layout(n_prelude, n_coda=1)
    model = LoopedTransformer(spec, vocab_size=5, n_classes=5, max_seq_len=8, layout=layout)
    tokens = torch.randint(5, (2, 8))
    assert train_step_flops(model, 2, 8, n_loops=6, grad_loops=2) == pytest.approx(
        counted(lambda: model(tokens, 6, n_grad_loops=2, backend="torch").sum().backward()), rel=0.01
    )


def test_a_loss_after_every_loop_reads_out_every_loop():
    spec, layout = BlockSpec(d_model=32, n_heads=2, injection="add"), Layout(n_coda=1)
    model = LoopedTransformer(spec, vocab_size=50, n_classes=50, max_seq_len=8, layout=layout)
    tokens = torch.randint(50, (2, 8))
    step = lambda: model(tokens, 3, targets=tokens, loop_weights=(1.0,), backend="torch").backward()  # noqa: E731
    assert train_step_flops(model, 2, 8, 3, all_loops=True) == pytest.approx(counted(step), rel=0.01)


def test_own_loop_counts_enter_as_their_mean():
    model = LoopedTransformer(BlockSpec(d_model=16, n_heads=2), vocab_size=5, n_classes=5, max_seq_len=8)
    both = forward_flops(model, 1, 8, 2) + forward_flops(model, 1, 8, 5)
    assert forward_flops(model, 2, 8, 3.5) == both
