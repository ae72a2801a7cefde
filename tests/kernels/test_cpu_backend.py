"""The C++ backend against the float64 reference: every option, every gradient, no bit left to chance.

An error may be at most twice that of the same computation in plain PyTorch of the same dtypes, plus 2e-6 of
the largest value (a sum in another order). tests/sanitize.py runs this file over a build that traps bad
accesses.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from any_problem import problems
from hypothesis import HealthCheck, given, settings
from operator_arguments import ops_arguments
from torch._dynamo.utils import counters
from torch.autograd import forward_ad

from shift_kernels import (
    BackendFallbackWarning,
    BlockSpec,
    LoopedBlock,
    ShiftInputError,
    backends,
    compiled,
    dispatch,
    explain,
    reference,
)
from shift_kernels.backends import cpu as cpu_backend
from shift_kernels.call import CallOptions
from shift_kernels.spec import ACTIVATIONS

native = cpu_backend._NATIVE
available = native is not None
ISAS = native.ISAS if available else ("portable",)
needs_library = pytest.mark.skipif(not available, reason=f"cpu backend {cpu_backend.CPU.why_not(None)}")

OPTIONS = {
    "pre": {},
    "post": {"norm_placement": "post"},
    "sandwich": {"norm_placement": "sandwich"},
    "rmsnorm": {"norm": "rmsnorm"},
    "no norm": {"norm": "none"},
    "attention only": {"d_ff": 0},
    "attention only, post": {"d_ff": 0, "norm_placement": "post", "loop_norm": True},
    **{name: {"activation": name} for name in ACTIVATIONS if name != "gelu"},  # which all others have
    # With this seed nothing lies so close to the kink that a rounding decides between its two slopes.
    "relu": {"activation": "relu", "seed": 1},
    "no bias": {"bias": False},
    "full attention": {"causal": False},
    "rope": {"position": "rope"},
    "injection": {"injection": "add"},
    "loop norm": {"loop_norm": True, "injection": "add"},
    "two layers": {"n_layers": 2},
    "grouped heads": {"n_heads": 6, "n_kv_heads": 2, "head_dim": 4},
    "head_dim 4": {"n_heads": 5, "head_dim": 4},
    "scaled residual": {"residual_scale": 0.5},
    "concat": {"injection": "concat", "n_layers": 2},
    "concat without biases": {"injection": "concat", "bias": False, "qkv_bias": True},
    "diagonal": {"injection": "diagonal", "loop_norm": True},
    "norm_add": {"injection": "norm_add"},
    "norm_add, (1 + w) rmsnorm": {"injection": "norm_add", "norm": "rmsnorm", "norm_weight": "one_plus"},
    "sandwich_post": {"norm_placement": "sandwich_post", "loop_norm": True},
    "norms without weights": {"norm_placement": "sandwich", "norm_weight": "none"},
    "(1 + w) post": {"norm_placement": "post", "norm_weight": "one_plus"},
    "normed heads": {"qk_norm": True, "position": "rope", "n_heads": 4, "n_kv_heads": 2, "head_dim": 6},
    "wide normed heads": {"qk_norm": True, "norm": "rmsnorm", "norm_weight": "one_plus", "head_dim": 34},
    "some channels rotate": {"position": "rope", "rope_freqs": (1.0, 0.1), "head_dim": 7, "n_layers": 2},
    "a scale of 1/T": {"norm_placement": "sandwich", "residual_scale": "1/T"},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)

CALLS = {
    "plain": {},
    "ragged, own loops": {"n_loops": torch.tensor([2, 3, 0, 1]), "seq_lens": torch.tensor([7, 2, 5, 0])},
    "all loops, truncated": {
        "n_loops": torch.tensor([3, 1, 2, 3]),
        "seq_lens": torch.tensor([7, 7, 1, 4]),
        "return_all_loops": True,
        "n_grad_loops": 1,
    },
    "truncated": {"n_loops": 4, "n_grad_loops": 2},
    "no loops": {"n_loops": 0},
    "from a state": {
        "n_loops": torch.tensor([3, 0, 2, 1]),
        "seq_lens": torch.tensor([7, 2, 5, 0]),
        "n_grad_loops": 2,
        "h0": torch.randn(4, 7, 20, generator=torch.Generator().manual_seed(2)),
        "residual_scale": torch.tensor([0.5, 1.0, 0.25, 2.0], dtype=torch.float64),
    },
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def make(batch=4, seq_len=7, seed=0, **options):
    torch.manual_seed(seed)
    block = LoopedBlock(BlockSpec(**{"d_model": 20, "n_heads": 2, "d_ff": 24, **options}))
    # Without norms larger weights make scores so large that the softmax magnifies rounding at random.
    std = 0.15 if block.spec.norm == "none" else 0.3
    for p in block.parameters():
        torch.nn.init.normal_(p, std=std)
    return block, torch.randn(batch, seq_len, block.spec.d_model)


FLOAT32, AUTOCAST, BFLOAT16 = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
)
"""Dtypes of e and the weights, and of the matrix products' operands."""


def in_dtypes(block, e, cotangent, call, dtypes):
    """Output and all gradients of the reference."""
    dtype, compute_dtype = dtypes
    e = e.to(dtype).requires_grad_()
    weights = {name: w.detach().to(dtype).requires_grad_() for name, w in block.weights().items()}
    call = {"seq_lens": None, "compute_dtype": compute_dtype, **call}
    if (h0 := call.get("h0")) is not None:
        call["h0"] = h0.to(dtype).requires_grad_()
    h, _ = reference.looped_block(e, weights, block.spec, **call)
    inputs = [e, *weights.values(), *([] if h0 is None else [call["h0"]])]
    if not h.requires_grad:
        return [h, *map(torch.zeros_like, inputs)]
    grads = torch.autograd.grad(h, inputs, cotangent(h).to(dtype), allow_unused=True, materialize_grads=True)
    return [h, *grads]


def on_cpu_backend(block, e, cotangent, call, isa=None, dtypes=FLOAT32):
    weights = {name: w.detach().to(dtypes[0]) for name, w in block.weights().items()}
    e = e.to(dtypes[0])
    if "h0" in call:
        call["h0"] = call["h0"].to(dtypes[0])
    call_options = CallOptions(compute_dtype=dtypes[1], **call)
    h, _, saved = cpu_backend.CPU.forward(e, weights, block.spec, call_options, for_backward=True, isa=isa)
    grad_e, grads = cpu_backend.CPU.backward(
        cotangent(h), e, weights, block.spec, call_options, saved, isa=isa
    )
    return [h, grad_e, *grads]


def normal(h):
    return torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).to(h.dtype)


def check(block, e, call, isa=None, cotangent=normal, dtypes=FLOAT32, slack=2e-6):
    call = {"n_loops": 3, **call}
    e = e.to(dtypes[0]).float()
    block.to(dtypes[0]).float()  # the truth starts from the same numbers
    ours = on_cpu_backend(block, e, cotangent, dict(call), isa, dtypes)
    exact = (torch.float64, torch.float64)
    truth, plain = (in_dtypes(block, e, cotangent, dict(call), which) for which in (exact, dtypes))
    names = ["h", "e", *block.weights(), *(["h0"] if "h0" in call else [])]
    for name, a, b, c in zip(names, ours, plain, truth, strict=True):
        assert a.shape == c.shape
        if not a.numel():  # all of no loops
            continue
        assert a.isfinite().all(), name
        if dtypes[1] == torch.bfloat16 and name.endswith("k_norm.bias"):
            continue  # what all keys have in common moves no weight much: roundings are all that is left
        # The largest of a few bfloat16 roundings is a matter of luck, their mean square is not.
        size = torch.linalg.vector_norm if dtypes[1] == torch.bfloat16 else lambda x: x.abs().max()
        error, allowed = size(a - c), 2 * size(b - c) + slack * size(c) + 1e-7
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def test_library_is_there_wherever_it_can_be_built():
    if shutil.which("g++") or shutil.which("clang++"):
        assert available, backends()["cpu"]


def skip_without(isa):
    if ISAS.index(isa) > ISAS.index(native.best_isa()):
        pytest.skip(f"this processor has no {isa}")


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_gelu_is_right_everywhere(isa):
    """A block of which only x + gelu(x) is left."""
    skip_without(isa)
    spec = BlockSpec(d_model=16, n_heads=1, d_ff=16, norm="none", bias=False)
    weights = {name: torch.zeros(w.shape) for name, w in LoopedBlock(spec).weights().items()}
    weights["layers.0.linear1.weight"] = weights["layers.0.linear2.weight"] = torch.eye(16)
    x = torch.linspace(-12, 12, 64 * 1024).view(64, 64, 16)
    call_options = CallOptions(n_loops=1, compute_dtype=torch.float32)
    h, _, saved = cpu_backend.CPU.forward(x, weights, spec, call_options, for_backward=True, isa=isa)
    slope, _ = cpu_backend.CPU.backward(torch.ones_like(h), x, weights, spec, call_options, saved, isa=isa)
    exact = x.double().requires_grad_()
    value = exact + torch.nn.functional.gelu(exact)
    (exact_slope,) = torch.autograd.grad(value.sum(), exact)
    assert ((h - value).abs() < 2e-7 + 1.2e-7 * value.abs()).all()
    assert ((slope - exact_slope).abs() < 5e-7).all()


@needs_library
@every_option
@every_call
def test_output_and_gradients_are_right(options, call):
    check(*make(**options), call)


@needs_library
@every_option
@pytest.mark.parametrize("dtypes", [AUTOCAST, BFLOAT16], ids=["autocast", "bfloat16"])
def test_bfloat16_is_as_right_as_plain_bfloat16(options, dtypes):
    for call in CALLS.values():
        check(*make(**options), call, dtypes=dtypes)


@needs_library
@every_option
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_boundaries_alone_give_the_same_gradients(options, dtypes, monkeypatch):
    monkeypatch.setattr(cpu_backend, "MOST_KEPT_BYTES", 0)
    for call in CALLS.values():
        check(*make(**options), call, dtypes=dtypes)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [{}, {"activation": "swiglu", "position": "rope", "norm": "rmsnorm"}])
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_every_instruction_set_is_right(isa, options, dtypes):
    skip_without(isa)
    check(*make(**options), CALLS["ragged, own loops"], isa, dtypes=dtypes)


@needs_library
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_len", [1, 15, 16, 17, 31, 33, 65, 100])
def test_sequence_lengths_around_the_tile_sizes(seq_len, causal, dtypes):
    check(*make(batch=3, seq_len=seq_len, causal=causal), {"n_loops": 2}, dtypes=dtypes)


@needs_library
@pytest.mark.parametrize(
    ("d_model", "dtypes"),
    # Norms of one or eight numbers only magnify rounding: those in float32 alone.
    [(d, FLOAT32) for d in (1, 8, 16, 17, 96, 130)] + [(d, AUTOCAST) for d in (16, 17, 33, 130)],
)
def test_widths_around_the_vector_sizes(d_model, dtypes):
    options = {"d_model": d_model, "n_heads": 1, "head_dim": 5, "d_ff": 2 * d_model + 1}  # odd: half a pair
    check(*make(seq_len=5, **options), {"n_loops": 2}, dtypes=dtypes)


@needs_library
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_batches_of_one_and_of_many_tiles(batch):
    check(*make(batch=batch, seq_len=11, injection="add"), {"n_loops": 2})


@needs_library
@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems(served=cpu_backend.CPU.served.block))
def test_any_problem(problem):
    options, call, batch, seq_len, seed = problem
    block, e = make(batch, seq_len, seed, **options)
    # Without norms values explode, and narrow norms magnify rounding, differently in any two summation
    # orders: gentle weights keep the comparison about the kernel.
    for p in block.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1) * 0.5, std=0.1)
    check(block, e, call)


@needs_library
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problems(max_batch=3, max_seq_len=12, served=cpu_backend.CPU.served.block))
def test_any_problem_in_bfloat16(problem):
    options, call, batch, seq_len, seed = problem
    if options["activation"] == "relu":
        options["activation"] = "gelu"  # a relu that rounding switches on or off is an error of any size
    block, e = make(batch, seq_len, seed, **options)
    for p in block.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1) * 0.5, std=0.1)
    # Plain bfloat16 is right by luck in some of these small tensors: a unit in its last place is added.
    check(block, e, call, dtypes=AUTOCAST, slack=torch.finfo(torch.bfloat16).eps)


@needs_library
def test_autocast_and_bfloat16_models_run_on_it():
    block, e = make(injection="add")
    with torch.autocast("cpu", torch.bfloat16):
        h = block(e.requires_grad_(), 3, backend="cpu")
    assert h.dtype == torch.float32
    (grad,) = torch.autograd.grad(h, e, normal(h))
    ours = on_cpu_backend(block, e.detach(), normal, {"n_loops": 3}, dtypes=AUTOCAST)
    assert torch.equal(h, ours[0])
    assert torch.equal(grad, ours[1])
    assert not torch.equal(h, block(e, 3, backend="cpu"))  # which has no rounded operands
    low = block.to(torch.bfloat16)(e.to(torch.bfloat16), 3, backend="cpu")
    assert low.dtype == torch.bfloat16


@needs_library
def test_nan_in_pads_reaches_nothing():
    block, e = make()
    call = CALLS["ragged, own loops"]
    pad = torch.arange(7) >= call["seq_lens"][:, None]

    def poisoned(h):
        return normal(h).masked_fill(pad[..., None], torch.nan)

    clean = on_cpu_backend(block, e, normal, dict(call))
    dirty = on_cpu_backend(block, e.masked_fill(pad[..., None], torch.nan), poisoned, dict(call))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


class Framed:
    """torch, for the backend's allocations: each lies between bands of NaN that no kernel may touch."""

    BAND = 64

    def __init__(self):
        self.frames = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def hold(self, x):
        frame = torch.full((x.numel() + 2 * self.BAND,), torch.nan)
        self.frames.append(frame)
        return frame[self.BAND : -self.BAND].view(x.shape).copy_(x)

    def empty(self, *shape, **kwargs):
        x = torch.empty(*shape, **kwargs)
        return self.hold(x.fill_(torch.nan)) if x.dtype == torch.float32 else x

    def zeros(self, *shape, **kwargs):
        return self.hold(torch.zeros(*shape, **kwargs))

    def check(self):
        for frame in self.frames:
            assert frame[: self.BAND].isnan().all()
            assert frame[-self.BAND :].isnan().all()


@needs_library
@every_option
@pytest.mark.parametrize("dtypes", [FLOAT32, AUTOCAST], ids=["float32", "autocast"])
def test_nothing_is_read_or_written_beside_a_buffer(options, dtypes, monkeypatch):
    block, e = make(**options)
    for call in CALLS.values():
        expected = on_cpu_backend(block, e, normal, {"n_loops": 2, **call}, dtypes=dtypes)
        with monkeypatch.context() as patch:
            frames = Framed()
            patch.setattr(cpu_backend, "torch", frames)
            patch.setattr(cpu_backend, "_buffer", lambda shape, frames=frames: frames.empty(shape))
            weights = {name: frames.hold(w.detach()) for name, w in block.weights().items()}
            patch.setattr(block, "weights", lambda weights=weights: weights)
            found = on_cpu_backend(block, frames.hold(e), normal, {"n_loops": 2, **call}, dtypes=dtypes)
        frames.check()
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@needs_library
@pytest.mark.parametrize("call", [{"n_loops": 2}, CALLS["all loops, truncated"]], ids=["plain", "ragged"])
def test_same_bits_for_any_number_of_threads(call):
    block, e = make(batch=40, seq_len=7)
    if "seq_lens" in call:
        call = {k: v.repeat(10) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append(on_cpu_backend(block, e, normal, dict(call)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@needs_library
def test_memory_layout_does_not_matter():
    block, e = make()
    expected = on_cpu_backend(block, e, normal, {"n_loops": 2})
    transposed = e.transpose(0, 2).clone().transpose(0, 2)
    strided = on_cpu_backend(
        block, transposed, lambda h: normal(h).transpose(0, 2).clone().transpose(0, 2), {"n_loops": 2}
    )
    for a, b in zip(expected, strided, strict=True):
        assert torch.equal(a, b)


@needs_library
@pytest.mark.parametrize("theirs", [torch.float64, torch.device("meta")], ids=str)
def test_torchs_defaults_do_not_matter(theirs):
    block, e = make()
    step = lambda: (h := block(e, 2, backend="cpu"), *torch.autograd.grad(h.sum(), block.parameters()))  # noqa: E731
    want = step()
    if isinstance(theirs, torch.dtype):
        torch.set_default_dtype(theirs)
    else:
        torch.set_default_device(theirs)
    try:
        got = step()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(map(torch.equal, got, want))


@needs_library
def test_halting_stops_where_the_reference_stops():
    block, e = make(batch=6, norm_placement="post")
    lens = torch.tensor([7, 3, 1, 7, 5, 2])
    with torch.no_grad():
        for threshold in (0.3, 0.1, 0.03):
            h, used = block(e, 12, halt_threshold=threshold, seq_lens=lens, backend="cpu")
            expected, expected_used = block(e, 12, halt_threshold=threshold, seq_lens=lens, backend="torch")
            assert torch.equal(used, expected_used)
            torch.testing.assert_close(h, expected, atol=1e-4, rtol=1e-4)


@needs_library
def test_a_step_does_not_write_into_what_another_step_saved():
    # The buffer for activations is used again, but only once no graph holds it.
    block, e = make()
    e.requires_grad_()
    first = block(e, 2, backend="cpu")
    (expected,) = torch.autograd.grad(first.sum(), e, retain_graph=True)
    second = block(e * 2, 3, backend="cpu")
    (again,) = torch.autograd.grad(first.sum(), e)
    assert torch.equal(expected, again)
    second.sum().backward()


@needs_library
@every_call
def test_public_call_gives_the_same_as_the_backend(call):
    block, e = make()
    call = {"n_loops": 2, **call}
    expected = on_cpu_backend(block, e, normal, dict(call))
    if "h0" in call:
        call["h0"] = call["h0"].clone().requires_grad_()
    h = block(e.requires_grad_(), **call, backend="cpu")
    assert torch.equal(h, expected[0])
    inputs = [e, *block.weights().values(), *([call["h0"]] if "h0" in call else [])]
    grads = torch.autograd.grad(h, inputs, normal(h))
    for a, b in zip(grads, expected[1:], strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(block(e, **call, backend="cpu"), h)


@needs_library
def test_forward_mode_and_transforms_say_what_to_do():
    block, e = make()
    block.requires_grad_(False)
    with forward_ad.dual_level():
        assert block(e, 1).isfinite().all()  # no tangent goes in: nothing is lost
        with pytest.raises(ShiftInputError, match="backend='torch'"):
            block(forward_ad.make_dual(e, e), 1)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(ShiftInputError, match="backend='torch'"):
            transform(lambda x: block(x, 1).sum())(e)
        assert transform(lambda x: block(x, 1, backend="torch").sum())(e).isfinite().all()


@needs_library
def test_second_derivatives_say_what_to_do():
    block, e = make()
    h = block(e.requires_grad_(), 2, backend="cpu")
    with pytest.raises(ShiftInputError, match="backend='torch'"):
        torch.autograd.grad(h.square().sum(), e, create_graph=True)


@needs_library
@every_call
def test_operator_passes_opcheck(call):
    block, e = make()
    call = {"n_loops": 2, **call}
    own = call["n_loops"] if isinstance(call["n_loops"], torch.Tensor) else None
    args = ops_arguments(
        e.requires_grad_(),
        block,
        n_loops=0 if own is not None else call["n_loops"],
        sample_loops=own,
        seq_lens=call.get("seq_lens"),
        all_loops=call.get("return_all_loops", False),
        n_grad_loops=call.get("n_grad_loops"),
        h0=call.get("h0"),
        residual_scale=call.get("residual_scale"),
        compute_dtype=torch.float32,
        backend="cpu",
    )
    # Not the comparison of all outputs with a traced run: parts of what is saved are never read.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.shift_kernels.looped_block, args, test_utils=checks)


@needs_library
def test_compiled_model_runs_it_without_recompiling():
    torch._dynamo.reset()
    counters.clear()
    block, e = make(injection="add")
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    e.requires_grad_()
    for n_loops in (1, 3, 2):
        ours = torch.autograd.grad(compiled(e, torch.tensor(n_loops)).sum(), [e, *block.parameters()])
        plain = torch.autograd.grad(block(e, n_loops, backend="torch").sum(), [e, *block.parameters()])
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1


@needs_library
def test_auto_takes_it_for_float32_and_bfloat16_and_leaves_the_rest():
    block, _ = make()
    for dtype in (torch.float32, torch.bfloat16):
        assert "runs on   cpu" in explain(block.spec, 4, 7, dtype=dtype)
    assert "bfloat16 is" in explain(block.spec, 4, 7, dtype=torch.float16)
    assert "runs on   torch" in explain(block.spec, 4, 7, dtype=torch.float64)


@needs_library
@pytest.mark.parametrize("autocast", [False, True])
def test_float16_is_no_silent_slow_path(autocast, monkeypatch):
    monkeypatch.setattr(dispatch, "_SAID", set())
    monkeypatch.delenv("SHIFT_KERNELS_STRICT", raising=False)
    block, e = make()
    if not autocast:
        block, e = block.half(), e.half()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        with pytest.warns(BackendFallbackWarning, match="float16 is not served, bfloat16 is"):
            block(e, 1)
        monkeypatch.setenv("SHIFT_KERNELS_STRICT", "1")
        with pytest.raises(ShiftInputError, match="SHIFT_KERNELS_STRICT"):
            block(e, 1)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_explain_counts_what_is_kept(dtype):
    block, e = make(batch=40, seq_len=33)
    kept = cpu_backend.CPU.saved_like(e.to(dtype), block.spec, 3)[0]
    text = explain(block.spec, *e.shape[:2], n_loops=3, dtype=dtype)
    assert f"{kept.nbytes / 2**20:.1f} MiB" in text


@needs_library
def test_what_is_kept_begins_on_a_cache_line_and_takes_less_in_bfloat16():
    block, e = make()
    kept = {}
    for dtypes in (FLOAT32, AUTOCAST):
        weights = {name: w.detach() for name, w in block.weights().items()}
        call_options = CallOptions(n_loops=2, compute_dtype=dtypes[1])
        *_, (kept[dtypes[1]],) = cpu_backend.CPU.forward(
            e, weights, block.spec, call_options, for_backward=True
        )
    assert all(x.data_ptr() % 64 == 0 for x in kept.values())
    assert kept[torch.bfloat16].nbytes < 0.8 * kept[torch.float32].nbytes


@needs_library
def test_more_loops_than_memory_holds_is_a_memory_error():
    block, e = make(batch=1, seq_len=1)
    for n_loops in (2**40, 2**50, 2**60):
        for kind in ({"return_all_loops": True}, {}):
            call_options = CallOptions(n_loops=n_loops, compute_dtype=torch.float32, **kind)
            with pytest.raises(MemoryError, match=f"{n_loops}"):
                cpu_backend.CPU.forward(e, block.weights(), block.spec, call_options, for_backward=not kind)


@needs_library
@pytest.mark.parametrize("name", ["n_loops", "seq_lens"])
def test_integers_that_change_while_a_call_runs_are_held_to_their_limits(name):
    """As memory that another thread writes: the backward finds larger numbers than there is room for.

    Its gradients mean nothing. It stays within its memory, and those of the right numbers come out as before.
    """
    block, e = make()
    call = {"n_loops": torch.tensor([2, 3, 1, 1]), "seq_lens": torch.tensor([5, 2, 5, 1])}
    weights = {k: w.detach() for k, w in block.weights().items()}
    call_options = CallOptions(compute_dtype=torch.float32, **call)
    h, _, saved = cpu_backend.CPU.forward(e, weights, block.spec, call_options, for_backward=True)

    def gradients():
        grad_e, grads = cpu_backend.CPU.backward(normal(h), e, weights, block.spec, call_options, saved)
        return [grad_e, *grads]

    expected, right = gradients(), call[name].clone()
    call[name].fill_(10**6)
    gradients()
    call[name].copy_(right)
    assert all(map(torch.equal, gradients(), expected))


@needs_library
def test_more_gradient_loops_than_an_integer_holds_are_all():
    block, e = make()
    expected = on_cpu_backend(block, e, normal, {"n_loops": 2})
    found = on_cpu_backend(block, e, normal, {"n_loops": 2, "n_grad_loops": 2**70})
    assert all(map(torch.equal, found, expected))


IN_PROCESSES_OF_THEIR_OWN = """
import faulthandler, json, os, resource, signal, sys, threading, time, torch
from shift_kernels import BlockSpec, LoopedBlock

block = LoopedBlock(BlockSpec(d_model=64, n_heads=1))

def in_child(function, *arguments):
    pid = os.fork()  # before any thread is made: importing torch takes seconds
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        os._exit(function(*arguments))
    except BaseException as error:
        print(arguments, repr(error), file=sys.stderr)
        os._exit(99)

def interrupted(n_threads, n_loops, batch, grad):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    torch.set_num_threads(n_threads)
    e = torch.randn(batch, 64, 64)
    block.requires_grad_(grad)
    start = time.monotonic()
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        h = block(e, n_loops, backend="cpu")
        h.sum().backward() if grad else None
        return 1  # too short to be interrupted, or it was not
    except KeyboardInterrupt:
        took = time.monotonic() - start
    return 0 if took < 5 and block(e, 1, backend="cpu").isfinite().all() else 2

def limited(mib, n_threads):
    torch.set_num_threads(n_threads)
    e = torch.randn(64, 64, 64, requires_grad=True)
    (e * 2).sum().backward()  # torch's own threads: it ends the process where it cannot make one
    with open("/proc/self/statm") as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + mib * 2**20,) * 2)
    try:
        block(e, 3, backend="cpu").sum().backward()
    except MemoryError:
        return 0
    except RuntimeError as error:
        return 0 if "allocate" in str(error) else 3  # torch's own
    return 0

chosen = {"interrupted": interrupted, "limited": limited}[sys.argv[1]]
print(json.dumps([(case, in_child(chosen, *case)) for case in json.loads(sys.argv[2])]))
"""


def in_processes_of_their_own(name, cases):
    command = [sys.executable, "-c", IN_PROCESSES_OF_THEIR_OWN, name, json.dumps(cases)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert [code for _, code in json.loads(run.stdout)] == [0] * len(cases), (run.stdout, run.stderr)


@needs_library
def test_ctrl_c_ends_a_long_call():
    """Of one sequence the thread that Python interrupts may be the one that only waits."""
    many_loops, many_sequences, backward = (10**6, 1, False), (300, 600, False), (400, 16, True)
    cases = [(n_threads, *case) for n_threads in (1, 2) for case in (many_loops, many_sequences, backward)]
    in_processes_of_their_own("interrupted", cases)


@needs_library
def test_too_little_memory_is_an_exception():
    in_processes_of_their_own("limited", [(mib, n) for mib in range(0, 200, 20) for n in (1, 4)])


@needs_library
def test_a_field_that_the_kernels_do_not_know_is_an_error():
    block = native.Block(d_model=16)
    with pytest.raises(TypeError, match="no field d_modle"):
        native.Block(d_modle=16)
    with pytest.raises(TypeError, match="no field boundary"):
        native.Call(block, boundary=0)
    with pytest.raises(ValueError, match="no such choice: tanh"):
        native.Block(activation="tanh")
    with pytest.raises(AttributeError):
        native.Call(block).grad_w = 0


@needs_library
def test_a_call_without_what_it_reads_is_an_error():
    block = native.Block(d_model=16, n_heads=1, n_kv_heads=1, head_dim=16, n_layers=1)
    call = native.Call(block, batch=1, seq_len=1, most_loops=1, n_threads=1)
    with pytest.raises(ValueError, match="missing"):
        native.run(call, backward=False)
    one = torch.ones(1, dtype=torch.int64)
    call.loops = call.lengths = one.data_ptr()
    with pytest.raises(ValueError, match="weights are not the block's"):
        native.run(call, backward=False)
    with pytest.raises(ValueError, match="this processor has no mmx"):
        native.run(call, backward=False, isa="mmx")


@needs_library
def test_how_gradients_are_summed_does_not_depend_on_the_threads():
    loops, lengths = torch.full((40,), 3), torch.full((40,), 100)
    spec = BlockSpec(d_model=16, n_heads=1)
    sizes = dict(batch=40, seq_len=100, most_loops=3, loops=loops.data_ptr(), lengths=lengths.data_ptr())
    plans = [native.plan(native.Call(compiled.block(native, spec), n_threads=n, **sizes)) for n in (1, 2, 9)]
    assert plans == [{"n_tiles": 40, "most_rows": 100, "n_slices": 40 * 100 * 3 // 1024}] * 3
