"""The forward kernel for sm_90a on the emulated GPU, in the ways its planner can arrange it.

Every option; then rings too small for the weights, clusters that share the weights' way, 64 and 128 rows, the
tile in L2, each with every access watched and in several schedules.
"""

import shutil
from pathlib import Path

import pytest
import torch
from cuda_emulation import LIBRARY, Library, emulated
from test_cuda_resident import OPTIONS

from shift_kernels import BlockSpec, LoopedBlock, cuda_backend
from shift_kernels.native import cuda

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

BF16 = torch.bfloat16
KB = 1024

# shared memory, multiprocessors, batch, seq_len, block: rows, programs, cluster, weights read once
PLANS = {
    "weights stay": (227 * KB, 132, 3, 20, {}, 64, 1, 1, True),
    "weights stay, 128 rows": (227 * KB, 1, 4, 30, {}, 128, 1, 1, True),
    "four share": (80 * KB, 132, 8, 25, {"norm_placement": "post"}, 64, 4, 4, False),
    "two share, 128 rows": (130 * KB, 132, 2, 97, {"activation": "swiglu", "n_layers": 2}, 128, 2, 2, False),
    "odd widths": (120 * KB, 132, 14, 9, {"d_model": 144, "n_heads": 3, "d_ff": 200}, 64, 2, 2, False),
    "tile in L2": (120 * KB, 132, 1, 65, {"d_model": 128, "norm": "rmsnorm"}, 128, 1, 1, False),
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
    monkeypatch.setattr(cuda_backend, "_LIBRARY", cuda.load(Path(library.library._name))[0])
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


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_is_right_with_every_option(monkeypatch, options):
    library = on_device(monkeypatch, 227 * KB, 132, watched=False)
    e = torch.randn(3, 7, options.get("d_model", 64)).to(BF16)
    for more in ({"return_all_loops": True}, {"seq_lens": torch.tensor([7, 0, 4])}):
        check(library, block_of(options), e, range(1), n_loops=2, **more)


@pytest.mark.parametrize("watched", [False, True], ids=["plain", "watched"])
@pytest.mark.parametrize("name", PLANS)
def test_output_is_right_however_it_is_arranged(monkeypatch, name, watched):
    shared_bytes, n_sms, batch, seq_len, options, rows, programs, cluster, once = PLANS[name]
    library = on_device(monkeypatch, shared_bytes, n_sms, watched)
    block, e = block_of(options), torch.randn(batch, seq_len, options.get("d_model", 64)).to(BF16)
    call = cuda_backend.sizes(block.spec, batch, seq_len, BF16, BF16, cuda_backend.HOPPER)
    plan = cuda_backend._LIBRARY.plan(call, backward=False)
    assert (plan.rows, plan.programs, plan.cluster) == (rows, programs, cluster)
    assert (plan.tiles * block.spec.n_layers == plan.stages) == once
    check(library, block, e, range(2 if watched else 3), n_loops=2)


@pytest.mark.parametrize("shared_bytes", [100 * KB, 227 * KB], ids=["ring", "weights stay"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_programs_end_when_their_samples_do(monkeypatch, call, shared_bytes):
    library = on_device(monkeypatch, shared_bytes, 132, watched=True)
    block, e = block_of({"norm_placement": "post", "injection": "add"}), torch.randn(3, 9, 64).to(BF16)
    if "halt_threshold" not in call:
        return check(library, block, e, range(2), **call)
    with torch.no_grad():
        _, expected = block(e, backend="torch", **call)
        for seed in range(2):
            library.library.shift_emulation_seed(seed)
            _, used = block(e, backend="cuda", **call)
            assert torch.equal(used, expected)
        assert 1 < int(used.min()) < 6
