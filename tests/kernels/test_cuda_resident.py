"""The CUDA resident kernels on an emulated GPU against the float64 reference; and what their planner admits.

An error may be at most twice that of the same computation in plain PyTorch of the same dtype, plus a rounding
for where PyTorch is lucky; as root mean squares, because the largest of a few errors is a matter of luck too.
"""

import itertools
import random
import shutil
from pathlib import Path

import pytest
import torch
from any_problem import problems
from cuda_emulation import LIBRARY, emulated
from hypothesis import HealthCheck, Phase, given, settings
from test_reference import OPTIONS as REFERENCE_OPTIONS

from benchmarks.gpu.cases import KINDS
from shift_kernels import BlockSpec, LoopedBlock, compiled, reference
from shift_kernels.backends import cuda as cuda_backend
from shift_kernels.call import CallOptions

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

A100, GEFORCE, H100 = 163 * 1024, 99 * 1024, 227 * 1024  # shared memory that a block may use


def options():
    """Every option that the reference is tested with, in sizes that are served."""
    sizes = {"d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff"}
    for name, chosen in REFERENCE_OPTIONS.items():
        kept = {k: v for k, v in chosen.items() if k not in sizes}
        if "n_kv_heads" in chosen:
            kept |= {"n_heads": 4, "n_kv_heads": 2}
        if chosen.get("d_ff") == 0:
            kept["d_ff"] = 0
        if cuda_backend.CUDA.served.serves("activation", kept.get("activation", "gelu")):
            yield name, kept


OPTIONS = dict(options()) | {
    "scaled residual, sandwich": {"residual_scale": 0.5, "norm_placement": "sandwich", "d_ff": 40},
    "narrow model, one head": {"d_model": 80, "n_heads": 1, "head_dim": 48},
    "wide heads": {"n_heads": 2, "n_kv_heads": 1, "head_dim": 128, "position": "rope"},
}
CALLS = {
    "packed": {},
    "ragged, own loops": {
        "n_loops": torch.tensor([2, 0, 1]),
        "seq_lens": torch.tensor([7, 5, 3]),
        "return_all_loops": True,
        "n_grad_loops": 1,
    },
}


def on(monkeypatch, watched):
    library = emulated(*LIBRARY, watched=watched).library
    monkeypatch.setattr(cuda_backend, "_LIBRARY", compiled.load("_native_cuda", Path(library._name))[0])
    return library


@pytest.fixture
def gpu(monkeypatch):
    """The backend on an emulated GPU."""
    return on(monkeypatch, watched=False)


@pytest.fixture
def watched(monkeypatch):
    """The same, and every access is checked for races and bounds."""
    return on(monkeypatch, watched=True)


def make(batch=3, seq_len=7, seed=0, dtype=torch.bfloat16, **options):
    torch.manual_seed(seed)
    sizes = {"d_model": 64, "n_heads": 2, "head_dim": 32, "d_ff": 96}
    block = LoopedBlock(BlockSpec(**{**sizes, **options}), dtype=dtype)
    for p in block.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1) * 0.5, std=0.15)
    return block, torch.randn(batch, seq_len, block.spec.d_model).to(dtype)


def cotangent(h):
    return torch.randn(h.shape, generator=torch.Generator().manual_seed(1))


def in_dtype(block, e, call, dtype):
    """Output and all gradients of the reference in a dtype."""
    given, e = e.dtype, e.to(dtype).requires_grad_()
    weights = {name: w.detach().to(dtype).requires_grad_() for name, w in block.weights().items()}
    h, _ = reference.looped_block(e, weights, block.spec, **{"n_loops": 2, **call})
    inputs = [e, *weights.values()]
    if not h.requires_grad:
        return [h, *map(torch.zeros_like, inputs)]
    grad = cotangent(h).to(given).to(dtype)
    return [h, *torch.autograd.grad(h, inputs, grad, allow_unused=True, materialize_grads=True)]


def on_kernels(block, e, call, grad=cotangent):
    weights = {name: w.detach() for name, w in block.weights().items()}
    call_options = CallOptions(**{"n_loops": 2, "compute_dtype": e.dtype, **call})
    h, _, saved = cuda_backend.CUDA.forward(e, weights, block.spec, call_options, for_backward=True)
    grad_e, grads = cuda_backend.CUDA.backward(
        grad(h).to(e.dtype), e, weights, block.spec, call_options, saved
    )
    return [h, grad_e, *grads]


def check(block, e, call):
    ours = on_kernels(block, e, call)
    truth, plain = (in_dtype(block, e, call, dtype) for dtype in (torch.float64, e.dtype))
    for name, a, b, c in zip(["h", "e", *block.weights()], ours, plain, truth, strict=True):
        assert a.shape == c.shape
        if not a.numel():  # all of no loops
            continue
        assert a.isfinite().all(), name
        error, allowed = (a - c).norm(), 2 * (b - c).norm() + torch.finfo(e.dtype).eps * c.norm()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_are_right(gpu, options, call):
    dtype = torch.float16 if call else torch.bfloat16
    check(*make(**options, dtype=dtype), call)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_len", [1, 16, 17, 49, 113])
def test_sequence_lengths_around_the_tile_sizes(gpu, seq_len, causal):
    check(*make(2, seq_len, causal=causal, position="rope"), {"n_loops": 1})


@pytest.mark.parametrize("sms", [1, 2])
def test_tiles_of_many_sequences(gpu, sms, monkeypatch):
    # On a GPU of few multiprocessors several sequences fill a tile; here 128 rows hold 18.
    monkeypatch.setattr(cuda_backend, "HOPPER", cuda_backend.Limits(H100, sms))
    check(*make(20, 7, injection="add"), {"n_loops": 2})


@pytest.mark.parametrize("sm90a", [False, True], ids=["mma", "wgmma"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_samples_that_share_a_tile_keep_what_is_not_finite_to_themselves(gpu, bad, sm90a, monkeypatch):
    monkeypatch.setattr(cuda_backend, "HOPPER", cuda_backend.Limits(H100, 1, sm90a))
    block, e = make(5, 7, causal=False)
    assert plan(block.spec, 5, 7, H100, True, sms=1, sm90a=sm90a).programs == 1
    clean = on_kernels(block, e, {})[:2]
    e[1, 3, 0] = bad
    for ours, expected in zip(on_kernels(block, e, {})[:2], clean, strict=True):
        assert not ours[1].isfinite().any()
        others = [0, 2, 3, 4]
        assert torch.equal(ours[others], expected[others])


@pytest.mark.parametrize("library", ["gpu", "watched"])
def test_a_block_goes_from_program_to_program(request, library, monkeypatch):
    request.getfixturevalue(library)
    monkeypatch.setattr(cuda_backend, "HOPPER", cuda_backend.Limits(GEFORCE, 1))
    block, e = make(3, 40, norm_placement="sandwich", loop_norm=True)
    p = plan(block.spec, 3, 40, GEFORCE, True, sms=1, own_loops=True)
    assert (p.programs, p.blocks) == (3, 1)
    check(block, e, {"n_loops": torch.tensor([1, 0, 2]), "seq_lens": torch.tensor([40, 3, 31])})


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_tile_outside_shared_memory(gpu, placement, monkeypatch):
    monkeypatch.setattr(cuda_backend, "HOPPER", cuda_backend.Limits(72 * 1024, 132))
    block, e = make(2, 17, d_model=256, norm_placement=placement, activation="swiglu")
    for backward in (False, True):
        assert plan(block.spec, 2, 17, 72 * 1024, backward).residual == "workspace"
    check(block, e, {})


def served(options):
    """The nearest block whose sizes the kernels take."""
    chosen = {"d_model": 64 + 16 * (options["d_model"] % 5), "head_dim": 16 * (1 + options["head_dim"] % 3)}
    if (
        options["activation"] == "relu"
    ):  # rounding puts a unit on either side of its kink, in ours or in PyTorch
        chosen["activation"] = "gelu"
    return {**options, **chosen}


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes
)
@given(problem=problems(max_batch=4))
def test_any_problem(gpu, problem):
    options, call, batch, seq_len, seed = problem
    gpu.shift_emulation_seed(seed)
    block, e = make(batch, seq_len, seed, **served(options))
    for p in block.parameters():  # gentle ones, because without norms values explode
        torch.nn.init.normal_(p, mean=float(p.ndim == 1) * 0.5, std=0.05)
    check(block, e, call)


def test_any_schedule_gives_the_same_bits(gpu):
    block, e = make(2, norm_placement="sandwich", activation="swiglu", position="rope", loop_norm=True)
    results = []
    for seed in range(20):
        gpu.shift_emulation_seed(seed)
        results.append(on_kernels(block, e, {"seq_lens": torch.tensor([7, 3])}))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {"n_layers": 2, "injection": "add", "loop_norm": True, "n_kv_heads": 1},
        {"norm_placement": "post", "activation": "swiglu", "position": "rope"},
        {"norm_placement": "sandwich", "d_ff": 0},
    ],
)
def test_no_access_races_with_another_or_leaves_its_buffer(watched, options):
    for seed in range(2):
        watched.shift_emulation_seed(seed)
        check(*make(**options), {"seq_lens": torch.tensor([7, 0, 4])})


def test_nan_in_pads_reaches_nothing(gpu):
    block, e = make()
    call = CALLS["ragged, own loops"]
    pad = torch.arange(7) >= call["seq_lens"][:, None]
    dirty = on_kernels(
        block,
        e.masked_fill(pad[..., None], torch.nan),
        call,
        lambda h: cotangent(h).masked_fill(pad[..., None], torch.nan),
    )
    for a, b in zip(on_kernels(block, e, call), dirty, strict=True):
        assert torch.equal(a, b)


def test_each_sample_halts_where_the_reference_halts(gpu):
    block, e = make(6, 7, norm_placement="post", dtype=torch.float16)
    lens = torch.tensor([7, 3, 1, 7, 5, 2])
    weights = {name: w.detach() for name, w in block.weights().items()}
    for threshold in (0.3, 0.05):
        call_options = CallOptions(12, e.dtype, lens, halt_threshold=threshold)
        _, used, _ = cuda_backend.CUDA.forward(e, weights, block.spec, call_options, for_backward=False)
        exact = {name: w.double() for name, w in weights.items()}
        _, expected = reference.looped_block(
            e.double(), exact, block.spec, 12, halt_threshold=threshold, seq_lens=lens
        )
        assert used.tolist() == expected.tolist()


# The planner. The arithmetic of plan.h's opening comment, written once more.


def shared_bytes(spec, rows, kv_heads, ff_chunk, stages, in_shared, backward):
    group, swiglu = spec.n_heads // spec.n_kv_heads, spec.activation == "swiglu"
    qkv, queries = kv_heads * (group + 2) * spec.head_dim, kv_heads * group * spec.head_dim
    tile = rows * (spec.d_model + 8) * 4 if in_shared else 0
    least = -(-rows // 32) * 4 * 64 * 2 * 4 if backward else 0  # sums of a norm's gradient, by warp
    if backward:
        mlp = ff_chunk * (3 if swiglu else 1) if spec.d_ff else 0
        work, ring = max(2 * qkv + queries, mlp) + 8, stages * (128 + rows) * 72 * 2
        rest = kv_heads * group * rows * 8 + rows * 8
    else:
        work, ring = max(qkv, ff_chunk if spec.d_ff else 0) + 8, stages * 128 * 72 * 2
        rest = rows * (spec.d_model + 8) * 2
    return tile + rows * 8 + 128 + max(rows * work * 2, least) + ring + rest


def plan(spec, batch, seq_len, limit, backward, dtype=torch.bfloat16, sms=132, **more):
    call = cuda_backend.sizes(spec, batch, seq_len, dtype, dtype, cuda_backend.Limits(limit, sms))
    for name, value in more.items():
        setattr(call, name, value)
    return cuda_backend._LIBRARY.plan(call, backward=backward)


def any_spec(rng):
    n_kv_heads = rng.choice([1, 2, 4])
    return BlockSpec(
        d_model=16 * rng.randint(4, 64),
        n_kv_heads=n_kv_heads,
        n_heads=n_kv_heads * rng.choice([1, 2, 4]),
        head_dim=16 * rng.randint(1, 8),
        d_ff=rng.choice([0, 33, 256, 1536]),
        activation=rng.choice(["gelu", "swiglu"]),
        norm_placement=rng.choice(["pre", "post", "sandwich"]),
    )


def test_planner_admits_what_brute_force_says_fits(gpu):
    rng = random.Random(0)
    refused = 0
    for _ in range(200):
        spec, seq_len, batch = any_spec(rng), rng.randint(1, 128), rng.choice([1, 40, 4096])
        limit, backward, own = rng.choice([A100, GEFORCE, H100]), rng.random() < 0.5, rng.random() < 0.3
        p = plan(spec, batch, seq_len, limit, backward, own_loops=own)
        least = -(-seq_len // 16) * 16
        fits = any(
            shared_bytes(spec, least, kv_heads, chunk, stages, in_shared, backward) <= limit
            for kv_heads in (n for n in range(1, spec.n_kv_heads + 1) if spec.n_kv_heads % n == 0)
            for chunk in (16, 32, 64)
            for stages, in_shared in itertools.product((2, 3, 4), (0, 1))
        )
        small = (1, min(16, spec.d_ff), 2, 1)  # kv_heads, ff_chunk, stages, in_shared
        assert (p.refusal == 0) == fits
        if p.refusal:
            refused += 1
            continue
        chosen = (p.rows, p.kv_heads, p.ff_chunk, p.stages, p.residual == "shared")
        assert p.shared_bytes == shared_bytes(spec, *chosen, backward) <= limit
        assert (p.residual == "shared") == (shared_bytes(spec, least, *small, backward) <= limit)
        assert p.sequences * seq_len <= p.rows <= 128
        assert p.rows % 16 == spec.n_kv_heads % p.kv_heads == p.ff_chunk % 16 == 0
        assert (p.split, p.tiles) == (1, 0)
        assert p.programs == -(-batch // p.sequences)
        assert p.threads == -(-p.rows // 32) * 128
        assert p.ff_chunk <= p.ff_pad == -(-spec.d_ff // 16) * 16
        assert p.sequences == 1 or not own
        assert 2 * p.programs > 132 or p.rows == least
    assert 10 < refused < 150


def test_planner_names_what_it_refuses(gpu):
    def reason(dtype=torch.bfloat16, seq_len=64, limit=H100, **sizes):
        spec = BlockSpec(**{"d_model": 64, "n_heads": 4, **sizes})
        return cuda_backend._LIBRARY.reason(plan(spec, 8, seq_len, limit, False, dtype))

    assert reason() is None
    assert "fp16 or bf16" in reason(torch.float32)
    for d_model in (48, 72, 1040):
        assert "d_model" in reason(d_model=d_model, head_dim=16)
    for head_dim in (8, 144):
        assert "head_dim" in reason(head_dim=head_dim)
    assert "seq_len" in reason(seq_len=129)
    assert "shared memory" in reason(seq_len=128, d_model=1024, head_dim=128)


@pytest.mark.parametrize("seq_len", [81, 97])
@pytest.mark.parametrize("backward", [False, True])
def test_tiny_recursive_models_are_served_on_hopper(gpu, seq_len, backward):
    spec = BlockSpec(d_model=512, n_heads=8, **KINDS["trm"])
    p = plan(spec, 768, seq_len, H100, backward)
    assert p.refusal == 0
    assert p.rows == -(-seq_len // 16) * 16
    assert p.stages >= 3
    assert p.ff_chunk >= 128
