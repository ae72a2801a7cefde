"""Bad input: the right class, and a text with function, argument, value, what is allowed, what to do."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nested import nested_tensor as nested

from shift_kernels import (
    BlockSpec,
    LoopedBlock,
    ShiftInputError,
    ShiftTypeError,
    attention,
    explain,
    looped_block,
)

SPEC = BlockSpec(d_model=8, n_heads=2, d_ff=16)
BLOCK = LoopedBlock(SPEC)
W = {name: p.detach() for name, p in BLOCK.named_parameters()}
E = torch.randn(3, 5, 8)
Q = torch.randn(2, 4, 6, 8)


def spec(**options):
    return lambda: BlockSpec(**{"d_model": 8, "n_heads": 2, **options})


def call(e=E, weights=W, n_loops=2, **options):
    return lambda: looped_block(e, weights, options.pop("spec", SPEC), n_loops, **options)


def mapped(e=E, **options):
    """A call under vmap, which maps over these lists."""
    values = {name: torch.tensor(value) for name, value in options.items()}
    return lambda: torch.vmap(lambda given: looped_block(e, W, SPEC, **{"n_loops": 2, **given}))(values)


def attend(q=Q, k=Q, v=Q, **options):
    return lambda: attention(q, k, v, **options)


def without(name):
    return {k: v for k, v in W.items() if k != name}


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(8, 2, 16, **{"batch_first": True, "dropout": 0.0, **options})


# (what is wrong, the call, the argument that is named, whether it is about a type)
CASES = [
    ("vmap over loops", mapped(n_loops=[1, 2]), "n_loops", False),
    ("vmap over loops of samples", mapped(n_loops=[[1, 2, 3]]), "n_loops", False),
    ("vmap over lengths", mapped(seq_lens=[[5, 2, 3]]), "seq_lens", False),
    ("vmap over offsets", mapped(E.flatten(0, 1), cu_seqlens=[[0, 15]]), "cu_seqlens", False),
    ("vmap over a scale", mapped(residual_scale=[0.5, 1.0]), "residual_scale", False),
    ("zero width", spec(d_model=0), "d_model", False),
    ("width not an int", spec(d_model=8.0), "d_model", True),
    ("bool as width", spec(d_model=True), "d_model", True),
    ("no heads", spec(n_heads=0), "n_heads", False),
    ("heads that do not divide", spec(n_heads=3), "n_heads", False),
    ("kv heads that do not divide", spec(n_heads=4, n_kv_heads=3), "n_kv_heads", False),
    ("no kv heads", spec(n_kv_heads=0), "n_kv_heads", False),
    ("no layers", spec(n_layers=0), "n_layers", False),
    ("negative d_ff", spec(d_ff=-1), "d_ff", False),
    ("d_ff not an int", spec(d_ff="4x"), "d_ff", True),
    ("zero head_dim", spec(head_dim=0), "head_dim", False),
    ("odd head_dim with rope", spec(head_dim=3, position="rope"), "head_dim", False),
    ("unknown activation", spec(activation="silu"), "activation", False),
    ("unknown norm", spec(norm="batchnorm"), "norm", False),
    ("unknown placement", spec(norm_placement="before"), "norm_placement", False),
    ("unknown position", spec(position="alibi"), "position", False),
    ("unknown injection", spec(injection="concatenate"), "injection", False),
    ("zero eps", spec(norm_eps=0.0), "norm_eps", False),
    ("NaN eps", spec(norm_eps=float("nan")), "norm_eps", False),
    ("eps not a number", spec(norm_eps="small"), "norm_eps", True),
    ("negative residual scale", spec(residual_scale=-1.0), "residual_scale", False),
    ("residual scale another word", spec(residual_scale="1/L"), "residual_scale", True),
    ("unknown norm weight", spec(norm_weight="one"), "norm_weight", False),
    ("norm weight without norm", spec(norm="none", norm_weight="one_plus"), "norm_weight", False),
    ("qk norm without norm", spec(norm="none", qk_norm=True), "qk_norm", False),
    ("qk norm not a bool", spec(qk_norm=1), "qk_norm", True),
    ("qkv bias not a bool", spec(qkv_bias=1), "qkv_bias", True),
    ("window without positions", spec(window=0), "window", False),
    ("window not whole", spec(window=2.5), "window", True),
    ("softcap of zero", spec(softcap=0.0), "softcap", False),
    ("softcap a word", spec(softcap="50"), "softcap", True),
    ("negative attn scale", spec(attn_scale=-1.0), "attn_scale", False),
    ("frequencies without rope", spec(rope_freqs=(1.0,)), "rope_freqs", False),
    ("more frequencies than pairs", spec(position="rope", rope_freqs=(1.0,) * 3), "rope_freqs", False),
    ("no frequencies", spec(position="rope", rope_freqs=()), "rope_freqs", False),
    ("a NaN frequency", spec(position="rope", rope_freqs=(float("nan"),)), "rope_freqs", False),
    ("frequencies a number", spec(position="rope", rope_freqs=1.0), "rope_freqs", True),
    ("fields not a dict", lambda: BlockSpec.from_dict([("d_model", 8)]), "fields", True),
    ("a field that is not there", lambda: BlockSpec.from_dict({"d_model": 8, "heads": 2}), "heads", True),
    ("a field that has no default", lambda: BlockSpec.from_dict({"d_model": 8}), "fields", False),
    ("no fields", lambda: BlockSpec.from_dict({}), "fields", False),
    ("infinite rope base", spec(rope_theta=float("inf")), "rope_theta", False),
    ("causal not a bool", spec(causal=1), "causal", True),
    ("bias not a bool", spec(bias="yes"), "bias", True),
    ("loop norm without norm", spec(norm="none", loop_norm=True), "loop_norm", False),
    ("placement without norm", spec(norm="none", norm_placement="post"), "norm_placement", False),
    ("width beyond all bounds", spec(d_model=2**70), "d_model", False),
    ("width of more digits than Python prints", spec(d_model=10**5000), "d_model", False),
    ("layers without end", spec(n_layers=2**40), "n_layers", False),
    ("heads too wide together", spec(n_heads=2**20, head_dim=2**20), "head_dim", False),
    ("eps beyond a float", spec(norm_eps=10**400), "norm_eps", False),
    ("eps a bool", spec(norm_eps=True), "norm_eps", True),
    ("width a numpy float", spec(d_model=np.float32(8)), "d_model", True),
    ("width a numpy bool", spec(d_model=np.True_), "d_model", True),
    ("width a list", spec(d_model=[8]), "d_model", True),
    ("width of many tensors", spec(d_model=torch.tensor([8, 8])), "d_model", True),
    ("activation a number", spec(activation=3), "activation", True),
    ("activation None", spec(activation=None), "activation", True),
    ("norm an array", spec(norm=np.array(["rmsnorm", "none"])), "norm", True),
    ("a field misspelt", spec(d_modl=8), "d_modl", True),
    ("spec not a BlockSpec", call(spec={"d_model": 8}), "spec", True),
    ("e not a tensor", call(e=[[1.0]]), "e", True),
    ("e of ints", call(e=torch.ones(3, 5, 8, dtype=torch.int64)), "e", True),
    ("e complex", call(e=torch.ones(3, 5, 8, dtype=torch.complex64)), "e", True),
    ("e sparse", call(e=E.to_sparse()), "e", True),
    ("e nested", call(e=nested([E[0], E[1, :2]], layout=torch.jagged)), "e", True),
    ("e of rank 2", call(e=E[0]), "e", False),
    ("e of rank 4", call(e=E[None]), "e", False),
    ("e of other width", call(e=E[..., :7]), "e", False),
    ("empty batch", call(e=E[:0]), "e", False),
    ("empty sequence", call(e=E[:, :0]), "e", False),
    ("weights a list", call(weights=list(W.values())), "weights", True),
    ("a weight missing", call(weights=without("layers.0.linear1.weight")), "weights", False),
    ("a weight too many", call(weights={**W, "extra": E}), "weights", False),
    (
        "a weight of other shape",
        call(weights={**W, "layers.0.norm1.weight": torch.ones(7)}),
        "layers.0.norm1",
        False,
    ),
    (
        "a weight of ints",
        call(weights={**W, "layers.0.norm1.weight": torch.ones(8).long()}),
        "layers.0.norm1",
        True,
    ),
    ("a weight elsewhere", call(weights={k: v.to("meta") for k, v in W.items()}), "weights", False),
    ("state not a tensor", call(h0=[0.0]), "h0", True),
    ("state of other dtype", call(h0=E.double()), "h0", True),
    ("state of other shape", call(h0=E[:, :4]), "h0", False),
    ("state elsewhere", call(h0=E.to("meta")), "h0", False),
    ("packed state of other shape", call(e=E[0], h0=E[0, :4], cu_seqlens=torch.tensor([0, 5])), "h0", False),
    ("left pads beyond the sequence", call(left_pad=torch.tensor([6, 0, 0])), "left_pad", False),
    (
        "left pads beyond the last token",
        call(left_pad=torch.tensor([0, 4, 0]), seq_lens=torch.tensor([5, 3, 5])),
        "left_pad",
        False,
    ),
    ("left pads a number", call(left_pad=1), "left_pad", True),
    (
        "left pads of packed sequences",
        call(e=E[0], left_pad=torch.tensor([0]), cu_seqlens=torch.tensor([0, 5])),
        "left_pad",
        False,
    ),
    ("negative offset", call(position_offset=torch.tensor([-1, 0, 0])), "position_offset", False),
    ("scale zero", call(residual_scale=0.0), "residual_scale", False),
    ("scale a word", call(residual_scale="1/T"), "residual_scale", True),
    ("scales of other shape", call(residual_scale=torch.ones(4)), "residual_scale", False),
    ("scales of ints", call(residual_scale=torch.tensor([1, 1, 1])), "residual_scale", True),
    ("an infinite scale", call(residual_scale=torch.tensor([1, 1, torch.inf])), "residual_scale", False),
    ("a learned scale", call(residual_scale=torch.ones(3, requires_grad=True)), "residual_scale", False),
    ("negative loops", call(n_loops=-1), "n_loops", False),
    ("loops not whole", call(n_loops=1.5), "n_loops", True),
    ("loops a bool", call(n_loops=True), "n_loops", True),
    ("loops None", call(n_loops=None), "n_loops", True),
    ("loops a float tensor", call(n_loops=torch.ones(3)), "n_loops", True),
    ("loops of other length", call(n_loops=torch.ones(2, dtype=torch.int64)), "n_loops", False),
    ("a negative own loop", call(n_loops=torch.tensor([1, -1, 2])), "n_loops", False),
    ("loops beyond 64 bits", call(n_loops=2**63), "n_loops", False),
    ("loops beyond all patience", call(n_loops=2**31), "n_loops", False),
    ("own loops beyond all patience", call(n_loops=torch.tensor([1, 2**62, 2])), "n_loops", False),
    (
        "loops of a meta tensor",
        call(n_loops=torch.ones(3, dtype=torch.int64, device="meta")),
        "n_loops",
        False,
    ),
    ("loops a word", call(n_loops="3"), "n_loops", True),
    ("loops NaN", call(n_loops=float("nan")), "n_loops", True),
    ("loops of bools", call(n_loops=torch.ones(3, dtype=torch.bool)), "n_loops", True),
    ("all loops a word", call(return_all_loops="no"), "return_all_loops", True),
    ("all loops a number", call(return_all_loops=1), "return_all_loops", True),
    ("a keyword misspelt", call(seq_len=torch.tensor([5, 5, 5])), "seq_len", True),
    ("a keyword of the module misspelt", lambda: BLOCK(E, 2, n_grad_loop=1), "n_grad_loop", True),
    ("a keyword of its constructor misspelt", lambda: LoopedBlock(SPEC, dtyp=torch.float32), "dtyp", True),
    ("a weight misspelt", call(weights={**W, "layers.0.linear1.weigth": E}), "weights", False),
    (
        "lengths on another device",
        call(seq_lens=torch.ones(3, dtype=torch.int64, device="meta")),
        "seq_lens",
        False,
    ),
    ("lengths of small ints", call(seq_lens=torch.tensor([5, 5, 5], dtype=torch.int16)), "seq_lens", True),
    ("lengths sparse", call(seq_lens=torch.tensor([5, 5, 5]).to_sparse()), "seq_lens", True),
    ("lengths a list", call(seq_lens=[5, 5, 5]), "seq_lens", True),
    ("lengths of floats", call(seq_lens=torch.tensor([5.0, 5, 5])), "seq_lens", True),
    ("lengths of other length", call(seq_lens=torch.tensor([5, 5])), "seq_lens", False),
    ("a length beyond the padding", call(seq_lens=torch.tensor([5, 6, 5])), "seq_lens", False),
    ("a negative length", call(seq_lens=torch.tensor([5, -1, 5])), "seq_lens", False),
    ("no grad loops", call(n_grad_loops=0), "n_grad_loops", False),
    ("grad loops not whole", call(n_grad_loops=1.0), "n_grad_loops", True),
    ("grad loops a bool", call(n_grad_loops=True), "n_grad_loops", True),
    ("grad loops below all bounds", call(n_grad_loops=-(2**70)), "n_grad_loops", False),
    ("halting beyond a float", call(halt_threshold=10**400), "halt_threshold", False),
    ("halting a bool", call(halt_threshold=True), "halt_threshold", True),
    ("backend None", call(backend=None), "backend", True),
    ("backends in an array", call(backend=np.array(["cpu", "torch"])), "backend", True),
    ("backends in a list", call(backend=["cpu"]), "backend", True),
    ("halting at zero", call(halt_threshold=0.0), "halt_threshold", False),
    ("halting at NaN", call(halt_threshold=float("nan")), "halt_threshold", False),
    ("halting threshold a word", call(halt_threshold="low"), "halt_threshold", True),
    (
        "halting while training",
        call(e=E.clone().requires_grad_(), halt_threshold=0.1),
        "halt_threshold",
        False,
    ),
    ("unknown backend", call(backend="tpu"), "backend", False),
    ("packed but padded", call(cu_seqlens=torch.tensor([0, 5])), "e", False),
    (
        "packed and lengths",
        call(e=E[0], cu_seqlens=torch.tensor([0, 5]), seq_lens=torch.tensor([5])),
        "seq_lens",
        False,
    ),
    ("offsets of floats", call(e=E[0], cu_seqlens=torch.tensor([0.0, 5.0])), "cu_seqlens", True),
    ("offsets without a dimension", call(e=E[0], cu_seqlens=torch.tensor(5)), "cu_seqlens", False),
    ("offsets that end early", call(e=E[0], cu_seqlens=torch.tensor([0, 4])), "cu_seqlens", False),
    ("offsets that fall", call(e=E[0], cu_seqlens=torch.tensor([0, 4, 3, 5])), "cu_seqlens", False),
    ("offsets on meta", call(e=E[0], cu_seqlens=torch.tensor([0, 5], device="meta")), "cu_seqlens", False),
    ("offsets a list", call(e=E[0], cu_seqlens=[0, 5]), "cu_seqlens", True),
    ("no offsets", call(e=E[0], cu_seqlens=torch.empty(0, dtype=torch.int64)), "cu_seqlens", False),
    ("offsets from 1", call(e=E[0], cu_seqlens=torch.tensor([1, 5])), "cu_seqlens", False),
    ("offsets of rank 2", call(e=E[0], cu_seqlens=torch.tensor([[0, 5]])), "cu_seqlens", False),
    ("causal a word", attend(causal="yes"), "causal", True),
    ("attention's keyword misspelt", attend(casual=True), "casual", True),
    ("attention on no backend", attend(backend=None), "backend", True),
    (
        "attention on meta lengths",
        attend(seq_lens=torch.ones(2, dtype=torch.int64, device="meta")),
        "seq_lens",
        False,
    ),
    ("q a numpy array", attend(q=Q.numpy()), "q", True),
    ("q of rank 3", attend(q=Q[0]), "q", False),
    ("q of ints", attend(q=Q.long()), "q", True),
    ("k of other dtype", attend(k=Q.double()), "k", True),
    ("k of other head_dim", attend(k=Q[..., :5], v=Q[..., :5]), "k", False),
    ("v of other shape", attend(v=Q[:, :2]), "v", False),
    ("kv heads that do not divide q's", attend(k=Q[:, :3], v=Q[:, :3]), "k", False),
    ("attention length too long", attend(seq_lens=torch.tensor([7, 1])), "seq_lens", False),
    ("attention on an unknown backend", attend(backend="cuda"), "backend", False),
    ("explain without a spec", lambda: explain("gpt2", 1, 1), "spec", True),
    ("explain of an empty batch", lambda: explain(SPEC, 0, 1), "batch", False),
    ("explain of half a token", lambda: explain(SPEC, 1, 0.5), "seq_len", True),
    ("explain of a dtype's name", lambda: explain(SPEC, 1, 1, dtype="float32"), "dtype", True),
    ("explain of no device", lambda: explain(SPEC, 1, 1, device="gpu"), "device", False),
    ("explain of negative loops", lambda: explain(SPEC, 1, 1, n_loops=-1), "n_loops", False),
    ("explain of a numpy dtype", lambda: explain(SPEC, 1, 1, dtype=np.float32), "dtype", True),
    ("explain of ints", lambda: explain(SPEC, 1, 1, dtype=torch.int32), "dtype", True),
    ("explain of a batch beyond all bounds", lambda: explain(SPEC, 2**70, 1), "batch", False),
    ("explain of gradients, perhaps", lambda: explain(SPEC, 1, 1, grad="no"), "grad", True),
    ("explain on device None", lambda: explain(SPEC, 1, 1, device=None), "device", False),
    ("explain on device 10**30", lambda: explain(SPEC, 1, 1, device=10**30), "device", False),
    ("explain on no backend", lambda: explain(SPEC, 1, 1, backend=3), "backend", True),
    ("explain's keyword misspelt", lambda: explain(SPEC, 1, 1, grads=True), "grads", True),
    ("module of ints", lambda: LoopedBlock(SPEC, dtype=torch.int32), "dtype", True),
    ("module of a dtype's name", lambda: LoopedBlock(SPEC, dtype="float32"), "dtype", True),
    ("module on no device", lambda: LoopedBlock(SPEC, device="bogus"), "device", False),
    ("module on a device that is not here", lambda: LoopedBlock(SPEC, device="cuda:99"), "device", False),
    ("module without a spec", lambda: LoopedBlock({"d_model": 8}), "spec", True),
    (
        "from_torch of something else",
        lambda: LoopedBlock.from_torch(nn.Linear(2, 2), causal=True),
        "layer",
        True,
    ),
    (
        "from_torch with dropout",
        lambda: LoopedBlock.from_torch(encoder_layer(dropout=0.1), causal=True),
        "layer",
        False,
    ),
    (
        "from_torch with another activation",
        lambda: LoopedBlock.from_torch(encoder_layer(activation=torch.tanh), causal=True),
        "layer",
        False,
    ),
    (
        "from_torch with layers that it would have to invent",
        lambda: LoopedBlock.from_torch(encoder_layer(), causal=True, n_layers=2),
        "options",
        False,
    ),
    (
        "from_torch with what the layer decides",
        lambda: LoopedBlock.from_torch(encoder_layer(), causal=True, d_model=9),
        "options",
        False,
    ),
    (
        "to_torch of what torch lacks",
        lambda: LoopedBlock(BlockSpec(8, 2, norm="rmsnorm")).to_torch(),
        "spec",
        False,
    ),
]


@pytest.mark.parametrize(("bad", "argument", "is_type"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_bad_input_is_named_with_its_value_and_a_remedy(bad, argument, is_type):
    with pytest.raises(ShiftInputError) as caught:
        bad()
    parts = re.fullmatch(
        r"(?P<function>[\w.]+): argument '(?P<argument>.+?)' = (?P<value>.+) is not supported; "
        r"allowed: (?P<allowed>.+?)\. (?P<remedy>[A-Z0-9].*\.)",
        str(caught.value),
        flags=re.DOTALL,
    )
    assert parts, f"not five parts: {caught.value}"
    assert argument in parts["argument"]
    assert isinstance(caught.value, ShiftTypeError) == is_type


def test_the_package_still_works_after_an_error():
    with pytest.raises(ShiftInputError):
        BLOCK(E, -1)
    assert BLOCK(E, 1).isfinite().all()


def test_numbers_of_numpy_are_numbers():
    wide = BlockSpec(np.int64(8), np.int32(2), d_ff=np.uint8(16), norm_eps=np.float32(1e-5))
    assert wide.key == BlockSpec(8, 2, d_ff=16, norm_eps=float(np.float32(1e-5))).key
    assert torch.equal(BLOCK(E, np.int64(2), n_grad_loops=np.int64(1)), BLOCK(E, 2))
    assert explain(SPEC, np.int64(1), np.int16(3)) == explain(SPEC, 1, 3)


def test_more_grad_loops_than_loops_are_all_of_them():
    e = E.clone().requires_grad_()
    for backend in ("auto", "torch"):
        expected = torch.autograd.grad(BLOCK(e, 3, backend=backend).sum(), e)
        for n_loops in (3, torch.tensor([3, 3, 3])):
            for n_grad_loops in (3, 2**31, 2**63 - 1, 2**63, 2**64 + 1):
                h = BLOCK(e, n_loops, n_grad_loops=n_grad_loops, backend=backend)
                assert torch.equal(torch.autograd.grad(h.sum(), e)[0], expected[0])


@pytest.mark.parametrize(
    ("bad", "meant"),
    [
        (spec(d_modl=8), "d_model"),
        (spec(activation="gleu"), "gelu"),
        (call(seq_len=None), "seq_lens"),
        (call(left_pads=None), "left_pad"),
        (lambda: BLOCK(E, 2, h_0=E), "h0"),
        (lambda: BlockSpec.from_dict({"d_model": 8, "n_heads": 2, "qkv_biases": True}), "qkv_bias"),
    ],
)
def test_a_near_miss_is_named(bad, meant):
    with pytest.raises(ShiftInputError, match=f"Perhaps '{meant}' is meant"):
        bad()
