"""The backward kernel for sm_90a on the emulated GPU, in the ways its planner can arrange it.

Every option, whole sequences and split ones; then rings too small for a loop's weights and large enough,
clusters that share the weights' way, rows for one and both warpgroups, the tile in L2: with every access
watched, too.
"""

import shutil
from pathlib import Path

import pytest
import torch
from cuda_emulation import LIBRARY, emulated
from test_cuda_resident import CALLS, OPTIONS, check, make, on_kernels, plan

from benchmarks.gpu.cases import KINDS
from shift_kernels import compiled
from shift_kernels.backends import cuda as cuda_backend

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

KB = 1024
TRM = KINDS["trm"] | {"d_model": 128, "d_ff": 96}
ODD = {"d_model": 144, "n_heads": 3, "d_ff": 200}
GROUPED = {"n_heads": 4, "n_kv_heads": 2, "norm_placement": "sandwich"}

# shared memory, batch, seq_len, block: rows, split, cluster, stages, tiles of a loop, tile in shared memory
PLANS = {
    "weights stay": (190 * KB, 3, 20, {"d_ff": 0}, 60, 1, 1, 6, 6, True),
    "four share": (85 * KB, 4, 25, {"norm_placement": "post"}, 25, 1, 4, 3, 16, True),
    "two share, 97 rows": (150 * KB, 2, 97, {"activation": "swiglu", "n_layers": 2}, 97, 1, 2, 4, 42, True),
    "odd widths, three rounds": (140 * KB, 14, 9, ODD, 63, 1, 2, 4, 65, True),
    "tile in L2": (76 * KB, 1, 31, {"d_model": 128, "norm": "rmsnorm"}, 31, 1, 1, 3, 24, False),
    "rows of no token": (200 * KB, 4, 20, {"n_layers": 2}, 60, 1, 2, 7, 29, True),
    "two stages": (52 * KB, 3, 20, {"loop_norm": True, "d_ff": 0}, 20, 1, 1, 2, 12, True),
    "two split, four share": (93 * KB, 2, 48, GROUPED, 24, 2, 4, 4, 19, True),
}
# on one multiprocessor: shared memory, batch, seq_len, block, call: programs, blocks, cluster, weights stay
OWN = {"n_loops": torch.tensor([0, 2, 1]), "seq_lens": torch.tensor([30, 9, 50])}
ROUNDS = {
    "weights stay": (190 * KB, 7, 20, {"d_ff": 0}, {}, 2, 1, 1, True),
    "weights stay, own loops": (
        190 * KB,
        3,
        60,
        {"d_ff": 0},
        OWN | {"return_all_loops": True},
        3,
        1,
        1,
        True,
    ),
    "four share": (85 * KB, 8, 25, {"norm_placement": "post"}, {"return_all_loops": True}, 8, 4, 4, False),
    "tile in L2": (76 * KB, 3, 31, {"d_model": 128, "loop_norm": True}, {}, 3, 1, 1, False),
    "warpgroups apart": (227 * KB, 3, 64, {"norm_placement": "sandwich"}, {}, 2, 2, 2, False),
    "split, own loops": (93 * KB, 3, 50, GROUPED, {"n_grad_loops": 1} | OWN, 6, 2, 2, False),
}
SPLIT_CALLS = {
    "packed": {"n_loops": 2, "n_grad_loops": 1},
    "ragged, own loops": {
        "n_loops": torch.tensor([1, 2]),
        "seq_lens": torch.tensor([20, 65]),
        "return_all_loops": True,
    },
}


def on_hopper(monkeypatch, shared_bytes, watched=False, n_sms=132):
    """The emulated GPU with ``shared_bytes`` of shared memory. Its outputs are NaN before a run."""
    library = emulated(*LIBRARY, watched=watched).library
    monkeypatch.setattr(cuda_backend, "_LIBRARY", compiled.load("_native_cuda", Path(library._name))[0])
    monkeypatch.setattr(cuda_backend, "HOPPER", cuda_backend.Limits(shared_bytes, n_sms, True))
    operands = cuda_backend.ResidentGradients.operands

    def poisoned(self, rows, *, untouched):
        found = operands(self, rows, untouched=untouched)
        return found if untouched else {name: x.fill_(torch.nan) for name, x in found.items()}

    monkeypatch.setattr(cuda_backend.ResidentGradients, "operands", poisoned)
    return library


def on_small_hopper(monkeypatch, spec, seq_len, split, watched=False):
    """The same with the most shared memory that still splits a sequence over ``split`` blocks."""
    for limit in range(227 * KB, 0, -KB):
        library = on_hopper(monkeypatch, limit, watched)
        if plan(spec, 2, seq_len, limit, True, sm90a=True).split == split:
            return library
    raise AssertionError("never split")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_right_with_every_option(monkeypatch, options):
    on_hopper(monkeypatch, 99 * KB)
    check(*make(**options), CALLS["ragged, own loops"])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_are_right_with_every_option_where_sequences_are_split(monkeypatch, options):
    block, e = make(2, 37, **options)
    on_small_hopper(monkeypatch, block.spec, 37, 2)
    check(block, e, {"n_loops": 2, "seq_lens": torch.tensor([37, 11])})


@pytest.mark.parametrize("watched", [False, True], ids=["plain", "watched"])
@pytest.mark.parametrize("name", PLANS)
def test_gradients_are_right_however_it_is_arranged(monkeypatch, name, watched):
    shared_bytes, batch, seq_len, options, *expected = PLANS[name]
    library = on_hopper(monkeypatch, shared_bytes, watched)
    block, e = make(batch, seq_len, **options)
    p = plan(block.spec, batch, seq_len, shared_bytes, True, sm90a=True)
    assert [p.rows, p.split, p.cluster, p.stages, p.tiles, p.residual == "shared"] == expected
    for seed in range(1 if watched else 2):
        library.shift_emulation_seed(seed)
        check(block, e, {"n_loops": 2})


@pytest.mark.parametrize("watched", [False, True], ids=["plain", "watched"])
@pytest.mark.parametrize("name", ROUNDS)
def test_a_block_goes_from_program_to_program(monkeypatch, name, watched):
    shared_bytes, batch, seq_len, options, call, *expected = ROUNDS[name]
    library = on_hopper(monkeypatch, shared_bytes, watched, n_sms=1)
    block, e = make(batch, seq_len, **options)
    own = "n_loops" in call and isinstance(call["n_loops"], torch.Tensor)
    p = plan(block.spec, batch, seq_len, shared_bytes, True, sms=1, sm90a=True, own_loops=own)
    assert [p.programs, p.blocks, p.cluster, p.stages == p.tiles] == expected
    for seed in range(1 if watched else 2):
        library.shift_emulation_seed(seed)
        check(block, e, call)


def test_tiny_recursive_models_at_their_own_size(monkeypatch):
    on_hopper(monkeypatch, 227 * KB)
    block, e = make(1, 97, **KINDS["trm"] | {"d_model": 512, "n_heads": 8, "head_dim": 64})
    p = plan(block.spec, 1, 97, 227 * KB, True, sm90a=True)
    assert (p.split, p.rows, p.residual == "shared") == (2, 49, True)
    check(block, e, {"n_loops": 1})


@pytest.mark.parametrize("call", SPLIT_CALLS.values(), ids=SPLIT_CALLS)
@pytest.mark.parametrize(("options", "split"), [(TRM, 2), ({"n_kv_heads": 1}, 4)], ids=["TRM", "four"])
def test_blocks_of_a_split_sequence_do_not_race(monkeypatch, options, split, call):
    block, e = make(2, 67, **options)
    library = on_small_hopper(monkeypatch, block.spec, 67, split, watched=True)
    for seed in range(2):
        library.shift_emulation_seed(seed)
        check(block, e, call)


@pytest.mark.parametrize(
    ("batch", "seq_len", "split", "schedules"), [(1, 37, 2, 20), (4, 7, 1, 20)], ids=["split", "four share"]
)
def test_any_schedule_gives_the_same_bits(monkeypatch, batch, seq_len, split, schedules):
    block, e = make(batch, seq_len, position="rope")
    if split > 1:
        library = on_small_hopper(monkeypatch, block.spec, seq_len, split)
    else:
        library = on_hopper(monkeypatch, 58 * KB)
        assert plan(block.spec, batch, seq_len, 58 * KB, True, sm90a=True).cluster == 4
    results = []
    for seed in range(schedules):
        library.shift_emulation_seed(seed)
        results.append(on_kernels(block, e, {}))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
