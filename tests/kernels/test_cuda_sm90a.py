"""The forward kernel for sm_90a on the emulated GPU, in the ways its planner can arrange it.

Every option; then rings too small for the weights, clusters that share the weights' way, rows for one and
both warpgroups, sequences split over a cluster, the tile in L2, each with every access watched and in several
schedules.
"""

import shutil
from pathlib import Path

import pytest
import torch
from cuda_emulation import LIBRARY, Library, emulated
from test_cuda_resident import OPTIONS

from benchmarks.gpu.cases import KINDS
from shift_kernels import BlockSpec, LoopedBlock, compiled
from shift_kernels.backends import cuda as cuda_backend

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

BF16 = torch.bfloat16
KB = 1024

# shared memory, multiprocessors, batch, seq_len, block: rows, split, programs, cluster, weights stay,
# tile in shared memory
PLANS = {
    "weights stay": (227 * KB, 132, 3, 20, {}, 60, 1, 1, 1, True, True),
    "weights stay, 120 rows": (227 * KB, 1, 4, 30, {}, 120, 1, 1, 1, True, True),
    "weights stay, warpgroups apart": (227 * KB, 1, 4, 32, {}, 128, 1, 1, 1, True, True),
    "four share": (80 * KB, 132, 8, 25, {"norm_placement": "post"}, 50, 1, 4, 4, False, True),
    "two share, 97 rows": (
        130 * KB,
        132,
        2,
        97,
        {"activation": "swiglu", "n_layers": 2},
        97,
        1,
        2,
        2,
        False,
        True,
    ),
    "odd widths": (
        130 * KB,
        132,
        14,
        9,
        {"d_model": 144, "n_heads": 3, "d_ff": 200},
        63,
        1,
        2,
        2,
        False,
        True,
    ),
    "tile in L2": (70 * KB, 132, 1, 31, {"d_model": 128, "norm": "rmsnorm"}, 31, 1, 1, 1, False, False),
    "split, odd": (62 * KB, 132, 3, 33, {}, 17, 2, 6, 2, False, True),
    "split, TRM": (
        112 * KB,
        132,
        1,
        97,
        KINDS["trm"] | {"d_model": 128, "n_heads": 2, "d_ff": 80},
        49,
        2,
        2,
        2,
        False,
        True,
    ),
    "two split, four share": (70 * KB, 132, 2, 48, {"n_kv_heads": 2}, 24, 2, 4, 4, False, True),
    "split in four": (63 * KB, 132, 1, 67, {"n_kv_heads": 1, "position": "rope"}, 17, 4, 4, 4, False, True),
}
CALLS = {
    "own loops, ragged": {"n_loops": torch.tensor([2, 0, 3]), "seq_lens": torch.tensor([9, 7, 1])},
    "halting": {"n_loops": 6, "halt_threshold": 0.2},
}


def block_of(options):
    torch.manual_seed(0)
    block = LoopedBlock(BlockSpec(**{"d_model": 64, "n_heads": 4, "d_ff": 80, **options}), dtype=BF16)
    for p in block.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1) * 0.5, std=0.15)
    return block


def on_device(monkeypatch, shared_bytes, n_sms, watched):
    library = emulated(*LIBRARY, watched=watched)
    module, _ = compiled.load("_native_cuda", Path(library.library._name))
    monkeypatch.setattr(cuda_backend, "_LIBRARY", module)
    monkeypatch.setattr(cuda_backend, "HOPPER", cuda_backend.Limits(shared_bytes, n_sms, True))
    return library


def check(library: Library, block, e, seeds, **call):
    with torch.no_grad():
        exact = block.double()(e.double(), backend="torch", **call)
        theirs = block.to(BF16)(e, backend="torch", **call)
        for seed in seeds:
            library.library.shift_emulation_seed(seed)
            ours = block(e, backend="cuda", **call)
            allowed = 2 * (theirs - exact).abs().max() + 4 * torch.finfo(BF16).eps * exact.abs().max()
            assert (ours - exact).abs().max() <= allowed


def plan_of(spec, batch, seq_len, **more):
    call = cuda_backend.sizes(spec, batch, seq_len, BF16, BF16, cuda_backend.HOPPER)
    for name, value in more.items():
        setattr(call, name, value)
    return cuda_backend._LIBRARY.plan(call, backward=False)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_is_right_with_every_option(monkeypatch, options):
    library = on_device(monkeypatch, 227 * KB, 132, watched=False)
    e = torch.randn(3, 7, options.get("d_model", 64)).to(BF16)
    for more in ({"return_all_loops": True}, {"seq_lens": torch.tensor([7, 0, 4])}):
        check(library, block_of(options), e, range(1), n_loops=2, **more)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_is_right_with_every_option_where_sequences_are_split(monkeypatch, options):
    block, e = block_of(options), torch.randn(2, 37, options.get("d_model", 64)).to(BF16)
    for shared_bytes in range(227 * KB, 0, -KB):  # as soon as it must be split
        library = on_device(monkeypatch, shared_bytes, 132, watched=False)
        if plan_of(block.spec, *e.shape[:2]).split == 2:
            break
    else:
        pytest.fail("never split")
    for more in ({"return_all_loops": True}, {"seq_lens": torch.tensor([29, 11])}):
        check(library, block, e, range(1), n_loops=2, **more)


@pytest.mark.parametrize("watched", [False, True], ids=["plain", "watched"])
@pytest.mark.parametrize("name", PLANS)
def test_output_is_right_however_it_is_arranged(monkeypatch, name, watched):
    shared_bytes, n_sms, batch, seq_len, options, *expected = PLANS[name]
    library = on_device(monkeypatch, shared_bytes, n_sms, watched)
    block, e = block_of(options), torch.randn(batch, seq_len, options.get("d_model", 64)).to(BF16)
    plan = plan_of(block.spec, batch, seq_len)
    stay = plan.tiles == plan.stages
    assert [plan.rows, plan.split, plan.programs, plan.cluster, stay, plan.residual == "shared"] == expected
    check(library, block, e, range(2 if watched else 3), n_loops=2)


def test_tiny_recursive_models_at_their_own_size(monkeypatch):
    library = on_device(monkeypatch, 227 * KB, 132, watched=False)
    block, e = block_of(KINDS["trm"] | {"d_model": 512, "n_heads": 8}), torch.randn(2, 97, 512).to(BF16)
    assert plan_of(block.spec, 2, 97).cluster == 4
    check(library, block, e, range(1), n_loops=1)


@pytest.mark.parametrize(
    ("shared_bytes", "seq_len", "split"),
    [(100 * KB, 9, 1), (227 * KB, 9, 1), (62 * KB, 37, 2)],
    ids=["ring", "weights stay", "split"],
)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_programs_end_when_their_samples_do(monkeypatch, call, shared_bytes, seq_len, split):
    library = on_device(monkeypatch, shared_bytes, 132, watched=True)
    block, e = block_of({"norm_placement": "post", "injection": "add"}), torch.randn(3, seq_len, 64).to(BF16)
    assert plan_of(block.spec, 3, seq_len, own_loops=1).split == split
    e[:, 19:] *= 3  # the second block's rows alone would settle earlier
    if "halt_threshold" not in call:
        return check(library, block, e, range(2), **call)
    with torch.no_grad():
        _, expected = block(e, backend="torch", **call)
        for seed in range(2):
            library.library.shift_emulation_seed(seed)
            _, used = block(e, backend="cuda", **call)
            assert torch.equal(used, expected)
        assert 1 < int(used.min()) < 6


# tokens, d_model, sequences a program, threads: how often so many wait for each other in a loop
@pytest.mark.parametrize(
    ("seq_len", "d_model", "batch", "expected"),
    [
        pytest.param(32, 64, 4, {256: 0, 128: 2 * 2, 64: 0}, id="a warpgroup has whole sequences"),
        pytest.param(64, 256, 1, {256: 2 * 2, 128: 0, 64: 4 * 12}, id="two chunks of heads, two of the MLP"),
    ],
)
def test_bands_of_rows_wait_for_each_other_about_keys_alone(monkeypatch, seq_len, d_model, batch, expected):
    library = on_device(monkeypatch, 227 * KB, 1, watched=False).library
    block = block_of({"d_model": d_model, "n_heads": d_model // 32, "d_ff": 4 * d_model})
    e = torch.randn(batch, seq_len, d_model).to(BF16)
    assert plan_of(block.spec, batch, seq_len).programs == 1

    def waits(n_loops):
        before = [library.shift_emulation_meetings(threads) for threads in expected]
        with torch.no_grad():
            block(e, n_loops, backend="cuda")
        return [library.shift_emulation_meetings(n) - old for n, old in zip(expected, before, strict=True)]

    assert [two - one for one, two in zip(waits(1), waits(2), strict=True)] == list(expected.values())
