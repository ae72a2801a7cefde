"""The module's weights, where they are no plain parameters of its own."""

import copy
import dataclasses
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

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


def noop(*_):
    pass


HOOKS = {
    "forward": lambda m: m.register_forward_hook(noop),
    "forward_pre": lambda m: m.register_forward_pre_hook(noop, with_kwargs=True, prepend=True),
    "backward": lambda m: m.register_full_backward_hook(noop),
    "backward_pre": lambda m: m.register_full_backward_pre_hook(noop),
    "old backward": lambda m: m.register_backward_hook(noop),
    "weight_norm": lambda m: nn.utils.weight_norm(m, next(n for n, _ in m.named_parameters())),
    "spectral_norm": lambda m: nn.utils.spectral_norm(m, next(n for n, _ in m.named_parameters())),
    "prune": lambda m: prune.l1_unstructured(m, next(n for n, _ in m.named_parameters()), 0.5),
    "another forward": lambda m: setattr(m, "forward", noop),
    "a module": lambda m: setattr(m, "lora", nn.Linear(8, 8)),
    "an added module": lambda m: m.add_module("lora", nn.Linear(8, 8)),
    "call": lambda m: m(torch.randn(2, 3, 8)),
}


@pytest.mark.filterwarnings("ignore:.*_norm.*:FutureWarning")
@pytest.mark.parametrize("submodule", ["layers.0", "layers.1.linear1", "layers.0.self_attn", "loop_norm"])
@pytest.mark.parametrize("kind", HOOKS)
def test_what_a_submodule_would_ignore_is_refused_and_leaves_the_block_as_it_was(kind, submodule):
    torch.manual_seed(0)
    block = LoopedBlock(BlockSpec(d_model=8, n_heads=2, d_ff=16, n_layers=2, loop_norm=True))
    before, e = copy.deepcopy(block.state_dict()), torch.randn(2, 3, 8)
    if submodule == "layers.0" and "norm" in kind + "prune":
        submodule = "layers.0.linear2"  # the others own no weight
    with pytest.raises(ShiftInputError, match=re.escape(submodule)):
        HOOKS[kind](block.get_submodule(submodule))
    assert all(torch.equal(w, before[name]) for name, w in block.state_dict().items())
    assert list(block.state_dict()) == list(before)
    assert block(e, 2).isfinite().all()


@pytest.mark.parametrize("path", ["layers", "layers.0", "layers.0.linear1", "loop_norm"])
def test_a_submodule_is_not_replaced_by_one_that_computes(path):
    block = LoopedBlock(BlockSpec(d_model=8, n_heads=2, loop_norm=True))
    parent, _, name = path.rpartition(".")
    with pytest.raises(ShiftInputError, match=re.escape(path)):
        setattr(block.get_submodule(parent), name, nn.Linear(8, 32))
    with pytest.raises(ShiftInputError, match=re.escape(path)):
        block.get_submodule(parent).register_module(name, nn.Linear(8, 32))
    with pytest.raises(ShiftInputError, match=re.escape(path)):
        block.set_submodule(path, nn.Linear(8, 32))


def test_hooks_on_the_block_itself_and_on_all_modules_fire():
    block, e = make()
    calls = []
    block.register_forward_pre_hook(lambda *_: calls.append("before"))
    block.register_forward_hook(lambda *_: calls.append("after"))
    block.register_full_backward_hook(lambda *_: calls.append("backward"))
    everywhere = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(type(m)))
    try:
        block(e.requires_grad_(), 1).sum().backward()
    finally:
        everywhere.remove()
    assert calls == ["before", LoopedBlock, "after", "backward"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_or_pickled_block_computes_the_same_and_still_refuses_hooks(copied):
    block, e = make()
    twin = copied(block)
    assert torch.equal(twin(e, 2), block(e, 2))
    assert str(twin) == str(block)
    with pytest.raises(ShiftInputError, match="linear1"):
        twin.get_submodule("layers.0.linear1").register_forward_hook(noop)


def test_a_block_saved_as_a_whole_loads(tmp_path):
    block, e = make()
    torch.save(block, tmp_path / "block.pt")
    assert torch.equal(torch.load(tmp_path / "block.pt", weights_only=False)(e, 2), block(e, 2))


def test_a_block_changes_its_dtype_as_any_module():
    block, e = make()
    assert block.half()(e.half(), 1, backend="torch").dtype == torch.float16
    assert block.to(torch.float64)(e.double(), 1).dtype == torch.float64


def test_a_parametrized_block_is_copied():
    block, e = make()
    parametrizations.orthogonal(block.get_submodule("layers.0.linear1"), "weight")
    assert torch.equal(copy.deepcopy(block)(e, 2), block(e, 2))


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


def encoder(n_layers=3, norm=None, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, **options)
    made = nn.TransformerEncoder(layer, n_layers, norm=norm, enable_nested_tensor=False)
    with torch.no_grad():
        for p in made.parameters():  # torch makes n copies of one layer
            p.add_(0.1 * torch.randn_like(p))
    return made


@pytest.mark.parametrize("norm", [None, nn.LayerNorm(16)], ids=["no norm", "norm"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_one_loop_of_an_encoder_is_the_encoder_and_two_are_it_twice(norm_first, norm):
    whole, e = encoder(norm=norm, norm_first=norm_first), torch.randn(2, 5, 16)
    next(whole.layers[1].parameters()).requires_grad_(False)
    block = LoopedBlock.from_torch(whole, causal=False)
    torch.testing.assert_close(block(e, 1), whole(e))
    torch.testing.assert_close(block(e, 2), whole(whole(e)))
    assert [p.requires_grad for p in block.get_submodule("layers.1").parameters()].count(False) == 1


def unlike():
    made = encoder()
    made.layers[1] = encoder(1, norm_first=True).layers[0]
    return made


ENCODERS = {
    "layers that differ": unlike,
    "a norm of another kind": lambda: encoder(norm=nn.RMSNorm(16)),
    "a norm with another eps": lambda: encoder(norm=nn.LayerNorm(16, eps=1e-3)),
    "no layers": lambda: encoder(0),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_that_is_no_block_is_refused(kind):
    with pytest.raises(ShiftInputError, match=r"from_torch: argument 'layer"):
        LoopedBlock.from_torch(ENCODERS[kind](), causal=False)


class OwnForward(nn.TransformerEncoderLayer):
    def forward(self, src, *masks, **keywords):
        return 2 * super().forward(src, *masks, **keywords)


class OwnEncoder(nn.TransformerEncoder):
    forward = OwnForward.forward


def changed(path, value):
    """An encoder layer, one of whose attributes was set by hand."""
    made = encoder(1).layers[0]
    name, _, attribute = path.rpartition(".")
    setattr(made.get_submodule(name), attribute, value)
    return made


def hooked(name):
    made = encoder(1).layers[0]
    made.get_submodule(name).register_forward_hook(lambda module, given, result: 2 * result)
    return made


UNLIKE_TORCHS = {
    "batch_first=False": lambda: nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0),
    "norm2.eps=0.1": lambda: changed("norm2.eps", 0.1),
    "dropout=0.1": lambda: changed("dropout.p", 0.1),
    "dropout1=0.1": lambda: changed("dropout1.p", 0.1),
    "dropout2=0.1": lambda: changed("dropout2.p", 0.1),
    "self_attn.dropout=0.1": lambda: changed("self_attn.dropout", 0.1),
    "OwnForward, which has its own forward": lambda: OwnForward(16, 2, 24, dropout=0.0, batch_first=True),
    "norm1=RMSNorm, which has its own forward": lambda: changed("norm1", nn.RMSNorm(16)),
    "linear1=Identity, which has its own forward": lambda: changed("linear1", nn.Identity()),
    "linear1=Linear, which has its own hooks": lambda: hooked("linear1"),
    "attention to keys of its own": lambda: changed("self_attn.add_zero_attn", True),
    "biases in some of its parts": lambda: changed("linear1", nn.Linear(16, 24, bias=False)),
    "OwnEncoder, which has its own forward": lambda: OwnEncoder(
        encoder().layers[0], 2, enable_nested_tensor=False
    ),
}


@pytest.mark.parametrize("words", UNLIKE_TORCHS)
def test_from_torch_refuses_what_would_be_lost_without_a_word(words):
    layer = UNLIKE_TORCHS[words]()
    with pytest.raises(ShiftInputError, match=re.escape(words)):
        LoopedBlock.from_torch(layer, causal=False)


def test_from_torch_takes_a_layer_without_modules_for_dropout():
    layer, e = changed("dropout1", nn.Identity()), torch.randn(2, 3, 16)
    torch.testing.assert_close(LoopedBlock.from_torch(layer, causal=False)(e, 1), layer(e))


def test_to_torch_takes_a_batch_as_the_block_does():
    block, e = LoopedBlock(BlockSpec(8, 2, d_ff=16, causal=False)), torch.randn(2, 3, 8)
    torch.testing.assert_close(block.to_torch()(e), block(e, 1))
