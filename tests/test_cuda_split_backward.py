"""The backward of sequences that are split over a cluster's blocks, on the emulated GPU."""

import shutil
from pathlib import Path

import pytest
import torch
from cuda_emulation import LIBRARY, emulated
from test_cuda_resident import OPTIONS, check, make, on_kernels, plan

from benchmarks.gpu.cases import KINDS
from shift_kernels import cuda_backend
from shift_kernels.native import cuda

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

KB = 1024
TRM = KINDS["trm"] | {"d_model": 128, "d_ff": 96}


def on_small_hopper(monkeypatch, spec, seq_len, split, watched=False):
    """The emulated GPU with just as little shared memory as has sequences split over so many blocks."""
    library = emulated(*LIBRARY, watched=watched).library
    monkeypatch.setattr(cuda_backend, "_LIBRARY", cuda.load(Path(library._name))[0])
    for limit in range(227 * KB, 0, -KB):
        if plan(spec, 2, seq_len, limit, True, sm90a=True).split == split:
            monkeypatch.setattr(cuda_backend, "HOPPER", cuda_backend.Limits(limit, 132, True))
            return library
    raise AssertionError("never split")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_right_with_every_option(monkeypatch, options):
    block, e = make(2, 37, **options)
    on_small_hopper(monkeypatch, block.spec, 37, 2)
    check(block, e, {"n_loops": 2, "seq_lens": torch.tensor([37, 11])})


CALLS = {
    "packed": {"n_loops": 2, "n_grad_loops": 1},
    "ragged, own loops": {
        "n_loops": torch.tensor([1, 2]),
        "seq_lens": torch.tensor([20, 65]),
        "return_all_loops": True,
    },
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("options", "split"), [(TRM, 2), ({"n_kv_heads": 1}, 4)], ids=["TRM", "four"])
def test_no_access_races_with_another_or_leaves_its_buffer(monkeypatch, options, split, call):
    block, e = make(2, 67, **options)
    library = on_small_hopper(monkeypatch, block.spec, 67, split, watched=True)
    for seed in range(2):
        library.shift_emulation_seed(seed)
        check(block, e, call)


def test_any_schedule_gives_the_same_bits(monkeypatch):
    block, e = make(1, 37, position="rope")
    library = on_small_hopper(monkeypatch, block.spec, 37, 2)
    results = []
    for seed in range(5):
        library.shift_emulation_seed(seed)
        results.append(on_kernels(block, e, {}))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
