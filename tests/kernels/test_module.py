"""The module's weights, where they are no plain parameters of its own."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from shift_kernels import BlockSpec, LoopedBlock, ShiftInputError, looped_block, module


def make():
    torch.manual_seed(0)
    return LoopedBlock(BlockSpec(d_model=8, n_heads=2, d_ff=16, n_layers=2)), torch.randn(2, 3, 8)


def test_a_parametrized_weight_is_used_by_its_value():
    block, e = make()
    plain = block(e, 2)
    linear = block.get_submodule("layers.0.linear1")
    parametrizations.weight_norm(linear, "weight")
    torch.testing.assert_close(block(e, 2), plain)
    with torch.no_grad():
        linear.parametrizations.weight.original0.mul_(2)
    expected = looped_block(e, block.weights() | {"layers.0.linear1.weight": linear.weight}, block.spec, 2)
    assert torch.equal(block(e, 2), expected)
    assert not torch.allclose(expected, plain)
    block(e, 2).sum().backward()
    assert linear.parametrizations.weight.original0.grad.abs().sum() > 0


@pytest.mark.parametrize("autocast", [False, True])
def test_shapes_alone_pass_through_on_the_meta_device(autocast):
    block = LoopedBlock(BlockSpec(d_model=8, n_heads=2), device="meta")
    e = torch.randn(2, 3, 8, device="meta")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        h = block(e, 2, return_all_loops=True)
        h.sum().backward()
    assert (h.shape, h.dtype, h.device) == ((2, 2, 3, 8), e.dtype, e.device)
    assert all(p.grad.is_meta for p in block.parameters())


def test_sizes_that_are_replaced_by_none_follow_the_others_again():
    spec = BlockSpec(d_model=16, n_heads=2)
    replaced = dataclasses.replace(spec, d_model=32, n_heads=8, n_kv_heads=None, head_dim=None, d_ff=None)
    assert replaced == BlockSpec(d_model=32, n_heads=8)


def test_layers_may_share_a_weight():
    block, e = make()
    first, second = (block.get_submodule(f"layers.{i}.linear1") for i in range(2))
    expected = looped_block(e, block.weights() | {"layers.1.linear1.weight": first.weight}, block.spec, 2)
    (expected_grad,) = torch.autograd.grad(expected.sum(), first.weight)
    second.weight = first.weight
    out = block(e, 2)
    assert torch.equal(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), first.weight)[0], expected_grad)


def test_parametrized_and_shared_weights_compile():
    block, e = make()
    parametrizations.weight_norm(block.get_submodule("layers.0.linear1"), "weight")
    block.get_submodule("layers.1.linear2").weight = block.get_submodule("layers.0.linear2").weight
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(e, 2), block(e, 2))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_only_a_submodules_hook_renews_is_refused():
    block, e = make()
    nn.utils.weight_norm(block.get_submodule("layers.0.linear1"), "weight")
    with pytest.raises(ShiftInputError, match=r"layers\.0\.linear1\.weight"):
        block(e, 1)


@pytest.mark.parametrize("relu", ["relu", nn.ReLU(), *module.RELUS], ids=range(2 + len(module.RELUS)))
def test_torchs_relu_is_known_by_any_of_its_names(relu):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=relu, batch_first=True)
    e = torch.randn(2, 3, 8)
    torch.testing.assert_close(LoopedBlock.from_torch(layer, causal=False)(e, 1), layer(e))


def test_what_was_frozen_in_torchs_layer_stays_frozen():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layer.linear1.weight.requires_grad_(False)
    block = LoopedBlock.from_torch(layer, causal=False)
    frozen = [name for name, p in block.named_parameters() if not p.requires_grad]
    assert frozen == ["layers.0.linear1.weight"]
