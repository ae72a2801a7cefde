"""The resident Triton kernels against the float64 reference: interpreted, or on a GPU if there is one."""

import contextlib
import dataclasses
import importlib.util
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from any_problem import problems
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_reference import OPTIONS
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from triton.runtime.interpreter import GridExecutor
from triton_interpreter import DEVICE, to_bits, to_float32

from shift_kernels import BlockSpec, LoopedBlock, dispatch, looped_block, reference
from shift_kernels.backends import device, weight_gradients
from shift_kernels.backends.triton import backend as triton_backend
from shift_kernels.backends.triton import packing, resident, resident_plan, tuned
from shift_kernels.call import CallOptions, Problem

F64 = torch.float64
# Ours may be twice as far from float64 as torch in the same dtype, plus a few roundings where torch is lucky.
FLOOR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# The interpreter of Triton 3.6 indexes with one-element arrays.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def make(batch=3, seq_len=5, **options):
    torch.manual_seed(0)
    block = LoopedBlock(BlockSpec(**{"d_model": 8, "n_heads": 2, "d_ff": 12, **options}), dtype=F64)
    for p in block.parameters():
        nn.init.normal_(p, std=0.4)
    e = torch.randn(batch, seq_len, block.spec.d_model, dtype=F64)
    return block.spec, e.to(DEVICE), {name: p.detach().to(DEVICE) for name, p in block.named_parameters()}


def cast(weights, dtype):
    return {name: w.to(dtype) for name, w in weights.items()}


def forward(options=None, n_loops=2, dtype=torch.float32, size=None, **call):
    """Ours, and the errors of ours and of torch in the same dtype."""
    spec, e, weights = make(**(size or {}), **(options or {}))
    exact, used = reference.looped_block(e, weights, spec, n_loops, **call)
    theirs, _ = reference.looped_block(e.to(dtype), cast(weights, dtype), spec, n_loops, **call)
    ours = looped_block(e.to(dtype), cast(weights, dtype), spec, n_loops, **call, backend="triton")
    if "halt_threshold" in call:
        ours, our_used = ours
        assert our_used.tolist() == used.tolist()
    assert ours.dtype == dtype
    return ours, (ours - exact).abs().max().item(), (theirs - exact).abs().max().item()


@every_option
def test_forward_equals_float64(options):
    _, ours, theirs = forward(options)
    assert ours <= 2 * theirs + FLOOR[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"injection": "add", "position": "rope"}], ids=["plain", "rope"])
def test_forward_in_half_precision_is_no_worse_than_torch(options, dtype):
    _, ours, theirs = forward(options, dtype=dtype)
    assert ours <= 2 * theirs + FLOOR[dtype]


@pytest.mark.parametrize("n_loops", [0, 1, 5])
@pytest.mark.parametrize("injection", ["none", "add"])
def test_any_number_of_loops(n_loops, injection):
    _, ours, theirs = forward({"injection": injection, "loop_norm": True}, n_loops=n_loops)
    assert ours <= 2 * theirs + FLOOR[torch.float32]


@pytest.mark.parametrize("return_all_loops", [False, True])
def test_each_sample_runs_its_own_loops(return_all_loops):
    loops = torch.tensor([3, 0, 1], device=DEVICE)
    _, ours, theirs = forward(n_loops=loops, return_all_loops=return_all_loops)
    assert ours <= 2 * theirs + FLOOR[torch.float32]


@pytest.mark.parametrize("causal", [True, False])
def test_pads_may_hold_nan_and_return_zero(causal):
    spec, e, weights = make(causal=causal)
    lens = torch.tensor([5, 0, 2], device=DEVICE)
    clean, _ = reference.looped_block(e, weights, spec, 2, seq_lens=lens)
    pads = torch.arange(5, device=DEVICE) >= lens[:, None]
    e[pads] = torch.nan
    h = looped_block(e.float(), cast(weights, torch.float32), spec, 2, seq_lens=lens, backend="triton")
    torch.testing.assert_close(h.double(), clean, atol=1e-5, rtol=1e-5)
    assert (h[pads] == 0).all()


def test_a_sample_halts_where_the_reference_halts():
    options = {"injection": "add", "loop_norm": True}
    for keep in (False, True):
        _, ours, theirs = forward(options, n_loops=6, halt_threshold=0.6, return_all_loops=keep)
        assert ours <= 2 * theirs + FLOOR[torch.float32]


@pytest.mark.parametrize(("batch", "seq_len"), [(1, 16), (2, 17), (7, 3), (9, 16), (5, 20)])
def test_packed_and_odd_shapes(batch, seq_len):
    _, ours, theirs = forward(size={"batch": batch, "seq_len": seq_len})
    assert ours <= 2 * theirs + FLOOR[torch.float32]


def test_sequences_in_one_tile_do_not_see_each_other():
    spec, e, weights = make(batch=4, seq_len=6, causal=False)
    e, weights = e.float(), cast(weights, torch.float32)
    before = looped_block(e, weights, spec, 2, backend="triton")
    e[1] += 1
    after = looped_block(e, weights, spec, 2, backend="triton")
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, False, False]


def gradients(e, weights, spec, n_loops, dtype, backend, grad_at_pads=None, **call):
    leaves = [x.to(dtype).requires_grad_() for x in (e, *weights.values())]
    h = looped_block(
        leaves[0], dict(zip(weights, leaves[1:], strict=True)), spec, n_loops, **call, backend=backend
    )
    if not h.requires_grad:  # no sample makes a loop
        return [torch.zeros_like(x) for x in leaves]
    cotangent = torch.randn(h.shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(e.device)
    if grad_at_pads is not None:
        cotangent = cotangent.masked_fill(grad_at_pads[..., None], torch.nan)
    return torch.autograd.grad(h, leaves, cotangent.to(dtype), allow_unused=True, materialize_grads=True)


def check_gradients(options=None, n_loops=2, dtype=torch.float32, size=None, **call):
    spec, e, weights = make(**(size or {}), **(options or {}))
    compare_gradients(e, weights, spec, n_loops, dtype, **call)


def compare_gradients(e, weights, spec, n_loops, dtype=torch.float32, **call):
    """Each gradient at most twice as far from float64 as torch's in the same dtype, relative to its size."""
    exact, theirs, ours = (
        gradients(e, weights, spec, n_loops, d, backend, **call)
        for d, backend in ((F64, "torch"), (dtype, "torch"), (dtype, "triton"))
    )
    for name, g, torchs, mine in zip(("e", *weights), exact, theirs, ours, strict=True):
        assert mine.dtype == dtype
        size = g.abs().max().item()
        error, allowed = (mine - g).abs().max().item(), 2 * (torchs - g).abs().max().item()
        assert error <= allowed + FLOOR[dtype] * (1 + size), name


@every_option
def test_gradients_equal_float64(options):
    check_gradients(options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{"norm_placement": "post"}, {"activation": "swiglu"}])
def test_gradients_in_half_precision_are_no_worse_than_torchs(options, dtype):
    check_gradients(options, dtype=dtype)


@pytest.mark.parametrize("n_grad_loops", [1, 2, 9])
@pytest.mark.parametrize("injection", ["none", "add"])
@pytest.mark.parametrize("n_loops", [3, torch.tensor([3, 0, 1])], ids=["same", "own"])
def test_gradients_of_the_last_loops_only(n_grad_loops, injection, n_loops):
    check_gradients({"injection": injection}, n_loops, n_grad_loops=n_grad_loops)


@pytest.mark.parametrize("n_grad_loops", [None, 1])
@pytest.mark.parametrize("n_loops", [3, torch.tensor([3, 0, 1])], ids=["same", "own"])
def test_gradients_through_every_returned_loop(n_loops, n_grad_loops):
    check_gradients(n_loops=n_loops, return_all_loops=True, n_grad_loops=n_grad_loops)


@pytest.mark.parametrize("size", [{"batch": 7, "seq_len": 3}, {"batch": 2, "seq_len": 17}])
def test_gradients_of_packed_and_odd_shapes(size):
    check_gradients({"causal": False}, size=size)


@pytest.mark.parametrize("return_all_loops", [False, True])
def test_no_gradient_comes_from_pads(return_all_loops):
    spec, e, weights = make(norm="none")
    lens = torch.tensor([5, 0, 2], device=DEVICE)
    pads = torch.arange(5, device=DEVICE) >= lens[:, None]
    call = dict(spec=spec, n_loops=2, seq_lens=lens, return_all_loops=return_all_loops)
    exact = gradients(e, weights, dtype=F64, backend="torch", **call)
    e = e.masked_fill(pads[..., None], torch.nan)
    ours = gradients(e, weights, dtype=torch.float32, backend="triton", grad_at_pads=pads, **call)
    assert (ours[0][pads] == 0).all()
    for g, mine in zip(exact, ours, strict=True):
        torch.testing.assert_close(mine.double(), g, rtol=1e-4, atol=1e-5 * float(g.abs().max()))


def test_zero_loops_pass_the_gradient_straight_on():
    check_gradients(n_loops=0)


STREAMED = {"batch": 2, "seq_len": 20, "d_model": 132}
BOTH_PATHS = pytest.mark.parametrize("size", [{}, STREAMED], ids=["resident", "streamed"])


@BOTH_PATHS
def test_the_operator_keeps_its_registered_contract(size):
    spec, e, weights = make(loop_norm=True, **size)
    weights = [w.float().requires_grad_() for w in weights.values()]
    e = e.float().requires_grad_()
    args = (e, weights, spec.key, 2, *[None] * 5, False, None, None, torch.float32, True, "triton")
    torch.library.opcheck(
        torch.ops.shift_kernels.looped_block,
        args,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_splitting_the_loops_over_launches_changes_only_rounding(monkeypatch):
    monkeypatch.setattr(weight_gradients, "OPERAND_BYTES", 1)
    check_gradients({"n_layers": 2, "injection": "add"}, n_loops=3)


@BOTH_PATHS
def test_gradients_have_the_same_bits_every_time(size):
    spec, e, weights = make(**size)
    runs = [gradients(e, weights, spec, 2, torch.float32, "triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@BOTH_PATHS
def test_autocast_keeps_the_residual_stream_in_float32(size):
    size = size and {**size, "seq_len": 80}  # 2-byte operands: a tile holds 64 rows of 256
    spec, e, weights = make(**size)
    exact, _ = reference.looped_block(e, weights, spec, 2)
    e, weights = e.float(), cast(weights, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = looped_block(e, weights, spec, 2, backend="triton")
        theirs = looped_block(e, weights, spec, 2, backend="torch")
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + FLOOR[torch.bfloat16]


def test_float64_is_refused_with_the_reason():
    spec, e, weights = make()
    with pytest.raises(ValueError, match="not float64"):
        looped_block(e, weights, spec, 1, backend="triton")


@pytest.mark.parametrize("seq_len", [20, 40])
def test_blocks_too_large_for_a_tile_are_streamed(seq_len):
    """In fp32 a tile holds 4,096 elements: 32 rows of 256 are too many, and ``explain`` says so."""
    size = {"batch": 2, "seq_len": seq_len, "d_model": 132, "n_heads": 2, "d_ff": 8}
    problem = Problem(
        BlockSpec(132, 2, d_ff=8), 2, seq_len, torch.float32, torch.float32, torch.device(DEVICE), True
    )
    assert "streamed" in triton_backend.TRITON.describe(problem)
    check_gradients({"injection": "add"}, size=size)
    _, ours, theirs = forward({"loop_norm": True}, size=size)
    assert ours <= 2 * theirs + FLOOR[torch.float32]


@pytest.mark.parametrize("d_model", [8, 132], ids=["resident", "streamed"])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_what_is_kept_is_what_the_planner_says(d_model, n_layers):
    spec, e, weights = make(batch=2, seq_len=20, d_model=d_model, n_layers=n_layers, loop_norm=True)
    kept = looped_block_saves(e.float(), cast(weights, torch.float32), spec, n_loops=3)
    problem = Problem(spec, 2, 20, torch.float32, torch.float32, torch.device(DEVICE), True)
    states, *packed = kept
    assert states.nbytes == 3 * triton_backend.TRITON.saved_bytes(problem)
    assert bool(packed) == (d_model == 8)  # the resident forward's, which its backward need not make again
    assert [(x.shape, x.dtype) for x in kept] == [
        (x.shape, x.dtype) for x in triton_backend.TRITON.saved_like(e.float(), spec, 3)
    ]


class Launches(TorchDispatchMode):
    """Counts what a GPU would be asked to run: torch's operations that are no views, and our kernels."""

    FREE = ("aten.empty", "aten.new_empty", "aten.detach")

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        inner = GridExecutor.__call__

        def launch(executor, *args, **kwargs):
            self.names.append(executor.fn.__name__)
            with torch._C._DisableTorchDispatch():  # what the interpreter does is no launch
                return inner(executor, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", launch)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not str(func).startswith(self.FREE):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the interpreter's launches")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"injection": "add", "loop_norm": True, "position": "rope"}])
def test_a_layer_is_few_launches_whatever_its_loops(monkeypatch, options, dtype):
    spec, e, weights = make(**options)
    e, weights, call = e.to(dtype), cast(weights, dtype), CallOptions(3, dtype)
    triton_backend.TRITON.forward(e, weights, spec, call, for_backward=True)  # makes the rotary table
    with Launches(monkeypatch) as forward:
        _, _, saved = triton_backend.TRITON.forward(e, weights, spec, call, for_backward=True)
    assert len(forward.names) <= 4, forward.names
    with Launches(monkeypatch) as backward:
        triton_backend.TRITON.backward(e, e, weights, spec, call, saved)
    assert len(backward.names) <= 10, " ".join(backward.names)


def looped_block_saves(e, weights, spec, n_loops):
    return triton_backend.TRITON.forward(e, weights, spec, CallOptions(n_loops, e.dtype), for_backward=True)[
        2
    ]


def test_auto_never_takes_the_interpreter_for_cpu_tensors():
    problem = Problem(BlockSpec(8, 2), 2, 4, torch.float32, torch.float32, torch.device("cpu"), False)
    assert dispatch.plan(problem).backend != "triton"


@pytest.mark.skipif(DEVICE == "cuda", reason="about the interpreter")
def test_cpu_tensors_are_no_slow_path_where_the_interpreter_is_on(monkeypatch):
    monkeypatch.setattr(dispatch, "_SAID", set())
    block = LoopedBlock(BlockSpec(8, 2, qk_norm=True))  # which triton does not serve
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(torch.zeros(1, 2, 8), 1)


@pytest.mark.parametrize(("sm", "shared", "fits"), [(89, 99, False), (120, 99, False), (90, 227, True)])
def test_what_a_devices_shared_memory_does_not_hold_is_streamed_in_words(monkeypatch, sm, shared, fits):
    chip = resident_plan.Chip(sm, shared * 1024)
    monkeypatch.setattr(triton_backend, "_chip", lambda device: chip)
    problem = Problem(
        BlockSpec(128, 2, head_dim=128), 8, 64, torch.bfloat16, torch.bfloat16, torch.device("cuda"), True
    )
    words = triton_backend.TRITON.describe(problem)
    assert words.startswith("resident" if fits else "streamed")
    assert fits or f"> {shared * 1024} on this device" in words
    narrow = dataclasses.replace(problem, spec=BlockSpec(128, 4))
    assert triton_backend.TRITON.describe(narrow).startswith("resident")


@pytest.mark.parametrize("columns", [None, 512, 576])
def test_a_kernel_that_triton_made_empty_is_an_error(columns):
    kernel = SimpleNamespace(metadata=SimpleNamespace(tmem_size=columns))
    with pytest.raises(RuntimeError, match="576 columns") if columns == 576 else contextlib.nullcontext():
        resident.check_not_empty(kernel)


@pytest.mark.parametrize(
    ("sm", "grad", "fits"), [(80, False, False), (90, False, True), (90, True, False), (100, False, False)]
)
def test_the_block_that_holds_most_is_resident_where_it_was_compiled_so(sm, grad, fits):
    wide = dict(activation="swiglu", position="rope", norm_placement="sandwich", head_dim=128)
    chip = resident_plan.Chip(sm, 227 * 1024)
    refused = resident_plan.too_large(BlockSpec(256, 2, **wide), 64, torch.bfloat16, grad=grad, chip=chip)
    assert (refused is None) == fits


@pytest.mark.parametrize("grad", [False, True])
def test_a_block_that_would_spill_kilobytes_is_streamed_in_words(monkeypatch, grad):
    monkeypatch.setattr(triton_backend, "_chip", lambda device: resident_plan.HOPPER)
    spec = BlockSpec(256, 2, activation="swiglu", position="rope", norm_placement="sandwich", head_dim=128)
    device = torch.device("cuda")
    words = triton_backend.TRITON.describe(Problem(spec, 8, 64, torch.bfloat16, torch.bfloat16, device, grad))
    assert words.startswith("streamed" if grad else "resident")
    assert ("448 numbers a thread > 256 with gradients" in words) == grad


def test_a_device_that_is_too_old_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(triton_backend, "_chip", lambda device: resident_plan.Chip(75, 64 * 1024))
    problem = Problem(BlockSpec(64, 4), 8, 32, torch.float32, torch.float32, torch.device(DEVICE), True)
    assert triton_backend.TRITON.why_not(problem).words.startswith("sm_75: ")


@BOTH_PATHS
def test_a_cuda_graph_refuses_what_it_cannot_hold(monkeypatch, size):
    """Nothing is captured here: the question whether something is has a prepared answer."""
    monkeypatch.setattr(device, "capturing", lambda device: True)
    monkeypatch.setattr(packing, "capturing", lambda device: True)
    spec, e, weights = make(**size, position="rope")
    e, weights = e.float(), cast(weights, torch.float32)
    whole = looped_block(e, weights, spec, 2, backend="triton")
    assert whole.isfinite().all()
    for call in (
        {"n_loops": torch.tensor([1] * len(e))},
        {"n_loops": 1, "seq_lens": torch.tensor([2] * len(e))},
    ):
        with pytest.raises(ValueError, match="while a CUDA graph is captured"):
            looped_block(e, weights, spec, **call, backend="triton")


@pytest.mark.parametrize("seq_len", [1, 16, 30, 64, 100])
@pytest.mark.parametrize("d_model", [8, 64, 96, 256])
@pytest.mark.parametrize("grad", [False, True])
def test_a_tile_that_is_not_refused_fits_its_limits(seq_len, d_model, grad):
    spec = BlockSpec(d_model, 2, head_dim=32)
    refused = resident_plan.too_large(spec, seq_len, torch.bfloat16, grad=grad)
    tile = resident_plan.tile(spec, seq_len, 1000, itemsize=2, pack=True, precision="ieee", grad=grad)
    limit = resident_plan.BACKWARD_TILE if grad else resident_plan.FORWARD_TILE
    assert (refused is None) == (tile.rows * tile.d_pad <= limit[2] and tile.rows <= resident_plan.MAX_ROWS)
    assert tile.programs(1000, seq_len) * (tile.rows // seq_len) >= 1000


def test_short_sequences_share_a_tile_only_where_programs_stay_plenty():
    spec = BlockSpec(64, 2)
    few, many = (
        resident_plan.tile(spec, 16, batch, itemsize=2, pack=True, precision="ieee", grad=False)
        for batch in (64, 4096)
    )
    assert (few.rows, many.rows) == (16, resident_plan.PACKED_ROWS)
    assert few.programs(64, 16) == 64
    assert many.programs(4096, 16) == 1024


@pytest.mark.parametrize(
    ("seq_len", "d_model", "rows"), [(32, 64, 32), (25, 64, 32), (21, 64, 64), (16, 64, 64), (32, 128, 64)]
)
def test_two_sequences_of_a_narrow_block_stay_apart(seq_len, d_model, rows):
    tile = resident_plan.tile(
        BlockSpec(d_model, 4), seq_len, 4096, itemsize=2, pack=True, precision="ieee", grad=False
    )
    assert (tile.rows, tile.packed) == (rows, rows == 64)


@pytest.mark.skipif(DEVICE == "cuda", reason="the patch is for the interpreter alone")
def test_the_patched_interpreter_rounds_bf16_as_torch_does():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(A, B, PRODUCT, SUM, N: tl.constexpr):
        at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        a, b = tl.load(A + at), tl.load(B + at)
        tl.store(PRODUCT + at, tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16)))
        tl.store(SUM + at, a.to(tl.bfloat16) + b.to(tl.bfloat16))

    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16)
    product, total = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    kernel[(1,)](a, b, product, total, 16)
    torch.testing.assert_close(product, a.bfloat16().float() @ b.bfloat16().float())
    assert torch.equal(total, a.bfloat16() + b.bfloat16())
    wide = torch.tensor([1.0, 1.00390625, 1.01171875, -3e38, torch.inf, torch.nan]).float()
    rounded = torch.from_numpy(to_float32(to_bits(wide.numpy())))
    torch.testing.assert_close(rounded, wide.bfloat16().float(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.skipif(DEVICE == "cuda", reason="the watch is for the interpreter alone")
@pytest.mark.parametrize("kind", ["load", "store"])
def test_an_access_outside_a_tensor_is_reported(kind):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(X, STORES: tl.constexpr, N: tl.constexpr):
        at = tl.arange(0, 8)
        if STORES:
            tl.store(X + at, at.to(tl.float32), mask=at < N)
        else:
            tl.load(X + at, mask=at < N)

    whole = torch.zeros(8)
    inner = whole[1:5]  # neighbours in the same memory are outside too
    kernel[(1,)](inner, kind == "store", 4)
    with pytest.raises(Exception, match=f"{kind} outside every tensor"):
        kernel[(1,)](inner, kind == "store", 5)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU doesn't tell")
@pytest.mark.parametrize(("op", "first"), [("add", 2**31 - 8), ("mul", 2**30), ("sub", 8 - 2**31)])
def test_an_integer_that_overflows_is_reported(op, first):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(X, first, OP: tl.constexpr):
        i = tl.arange(0, 8)
        y = first + i if OP == "add" else first - i if OP == "sub" else first * i
        tl.store(X + i, y)

    x = torch.zeros(8, dtype=torch.int32)
    kernel[(1,)](x, 1, op)
    kernel[(1,)](x, first // 8 if op == "mul" else first, op)
    with pytest.raises(Exception, match=f"int32 overflows in {op}"):
        kernel[(1,)](x, first + (1 if op == "add" else -2), op)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "none"])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_problem(norm, data):
    options, call, batch, seq_len, seed = data.draw(problems(norm, max_batch=3, max_seq_len=12))
    torch.manual_seed(seed)
    spec = BlockSpec(**options)
    e = torch.randn(batch, seq_len, spec.d_model, dtype=F64).to(DEVICE)
    weights = {name: w.detach().to(DEVICE) for name, w in LoopedBlock(spec, dtype=F64).named_parameters()}
    # Without norms values explode, and narrow norms magnify rounding, differently in any two summation
    # orders: gentle weights keep the comparison about the kernel.
    for w in weights.values():
        nn.init.normal_(w, mean=float(w.ndim == 1) * 0.5, std=0.1)
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    compare_gradients(e, weights, spec, **call)


def _layouts():
    """Eight ways to lay [batch, seq_len, d_model] out in memory."""
    for order in itertools.permutations(range(3)):
        inverse = [order.index(i) for i in range(3)]
        yield "".join(map(str, order)), lambda x, o=order, i=inverse: x.permute(o).contiguous().permute(i)
    yield "every second column", lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2]
    yield "rows in a wider one", lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]]


LAYOUTS = dict(_layouts())
FEW = {name: LAYOUTS[name] for name in ("021", "210", "every second column", "rows in a wider one")}


@pytest.mark.parametrize(
    ("size", "layout"),
    [({}, f) for f in LAYOUTS.values()] + [(STREAMED, f) for f in FEW.values()],
    ids=[*LAYOUTS, *(f"streamed-{name}" for name in FEW)],
)
def test_memory_layout_of_input_and_gradient_changes_nothing(size, layout):
    spec, e, weights = make(**size)
    e, weights = e.float(), cast(weights, torch.float32)
    cotangent = torch.randn_like(e)

    def run(arrange):
        leaf = arrange(e).detach().requires_grad_()
        h = looped_block(leaf, weights, spec, 1, backend="triton")
        return h, torch.autograd.grad(h, leaf, arrange(cotangent))[0]

    plain, arranged = run(torch.clone), run(layout)
    assert all(torch.equal(a, b) for a, b in zip(plain, arranged, strict=True))


@BOTH_PATHS
def test_compiled_model_runs_it_without_a_graph_break_or_recompiling(size):
    spec, e, weights = make(**size)
    e, weights = e.float(), cast(weights, torch.float32)
    inputs = [e.requires_grad_(), *(w.requires_grad_() for w in weights.values())]

    def model(n_loops):
        return looped_block(e.tanh(), weights, spec, n_loops, backend="triton").sin()

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n_loops in (1, 2):
        ours, plain = compiled(torch.tensor(n_loops)), model(n_loops)
        torch.testing.assert_close(ours, plain)
        gradients = (torch.autograd.grad(h.sum(), inputs) for h in (ours, plain))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_configuration_comes_from_the_table_or_is_the_safe_one(monkeypatch):
    found = tuned.Config(2, 16, 3)
    monkeypatch.setattr(tuned, "table", lambda: {"sm_90": {"forward 16x32 16-bit": found}})

    def config(sm, grad=False):
        tile = resident_plan.tile(
            BlockSpec(d_model=32, n_heads=2),
            16,
            1,
            itemsize=2,
            pack=False,
            precision="ieee",
            grad=grad,
            chip=resident_plan.Chip(sm, 2**18),
        )
        return tile.warps, tile.ff_chunk, tile.stages

    assert config(90) == found
    assert config(100) == tuned.safe(16, 32, 2, grad=False) != found  # an unknown architecture
    assert config(90, grad=True) == tuned.safe(16, 32, 2, grad=True)


@pytest.mark.parametrize(
    ("sm", "entry"), [(80, 80), (86, 86), (87, 86), (89, 89), (103, 100), (121, 120), (110, 110)]
)
def test_an_architecture_without_entries_takes_those_of_the_one_it_revises(sm, entry):
    assert tuned.nearest(sm, [f"sm_{known}" for known in (80, 86, 89, 90, 100, 120)]) == f"sm_{entry}"
