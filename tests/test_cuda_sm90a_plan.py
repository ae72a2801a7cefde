"""What the planner gives the forward for sm_90a: arithmetic and order of plan.h's opening comment again."""

import dataclasses
import random
import shutil
from pathlib import Path

import pytest
import torch
from cuda_emulation import LIBRARY, emulated

from benchmarks.gpu.cases import KINDS
from shift_kernels import BlockSpec, cuda_backend
from shift_kernels.native import cuda

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

BF16 = torch.bfloat16
KB = 1024
WIDTHS = (256, 128, 64, 32, 16)


@pytest.fixture(scope="module")
def library():
    return cuda.load(Path(emulated(*LIBRARY).library._name))[0]


def plan_of(library, spec, batch, seq_len, limit=227 * KB, sms=132, backward=False, **more):
    call = cuda_backend.sizes(spec, batch, seq_len, BF16, BF16, cuda_backend.Limits(limit, sms, True))
    for name, value in more.items():
        setattr(call, name, value)
    plan = library.plan(call, backward=backward)
    return plan if backward or plan.tiles else None  # else another kernel's


@dataclasses.dataclass
class Arrangement:
    """Rows of a program, and what it does at a time."""

    rows: int
    split: int
    kv_heads: int
    ff_chunk: int
    stages: int
    in_shared: bool

    def bytes(self, spec):
        group = spec.n_heads // spec.n_kv_heads
        qkv = self.kv_heads * (group + 2) * spec.head_dim + 8
        work = max(qkv, self.ff_chunk + 8 if spec.d_ff else 0)
        a_row = (4 * self.in_shared + 2) * (spec.d_model + 8) + 2 * work + 8
        others = 16 * (2 * self.kv_heads * spec.head_dim + 8) * 2 if self.split > 1 else 0
        return self.rows * a_row + others + self.stages * (128 * 64 * 2 + 16) + 32 + 128

    def tiles(self, spec):
        def tiles(n, k):
            return -(-n // 128) * -(-k // 64)

        d, hidden = spec.d_model, 2 if spec.activation == "swiglu" else 1
        queries = self.kv_heads * spec.n_heads // spec.n_kv_heads * spec.head_dim
        rounds, ff = spec.n_kv_heads // self.kv_heads, -(-spec.d_ff // 16) * 16
        found = rounds * (tiles(queries + 2 * self.kv_heads * spec.head_dim, d) + tiles(d, queries))
        for first in range(0, ff, self.ff_chunk or 1):
            some = min(self.ff_chunk, ff - first)
            found += tiles(hidden * some, d) + tiles(d, some)
        return found


def chosen(plan):
    return Arrangement(
        plan.rows, plan.split, plan.kv_heads, plan.ff_chunk, plan.stages, bool(plan.tile_in_shared)
    )


def any_spec(rng):
    n_kv_heads = rng.choice([1, 2, 4])
    return BlockSpec(
        d_model=rng.choice([64, 128, 256, 512, 768, 1024]),
        n_heads=n_kv_heads * rng.choice([1, 2]),
        n_kv_heads=n_kv_heads,
        head_dim=rng.choice([16, 32, 64, 128]),
        n_layers=rng.choice([1, 2]),
        d_ff=rng.choice([0, 40, 256, 1024, 4096]),
        activation=rng.choice(["gelu", "swiglu"]),
    )


def test_planner_takes_the_first_arrangement_that_fits(library):
    rng = random.Random(0)
    kinds = dict.fromkeys(["stay", "whole", "split", "L2", "none"], 0)
    for _ in range(400):
        spec, seq_len, batch = any_spec(rng), rng.randint(1, 128), rng.choice([1, 40, 4096])
        limit, own = rng.choice([99, 163, 227]) * KB, rng.random() < 0.3
        plan = plan_of(library, spec, batch, seq_len, limit, own_loops=own)

        def least(split, in_shared=True, spec=spec, seq_len=seq_len):
            small = Arrangement(-(-seq_len // split), split, 1, min(16, spec.d_ff), 3, in_shared)
            small.stages = min(3, spec.n_layers * small.tiles(spec))
            return small.bytes(spec)

        splits = [s for s in (2, 4) if seq_len > 16 * s]
        fitting = [s for s in (1, *splits) if least(s) <= limit]
        if plan is None:
            kinds["none"] += 1
            assert not fitting
            assert least(1, in_shared=False) > limit
            continue
        mine = chosen(plan)
        assert plan.shared_bytes == mine.bytes(spec) <= limit
        assert plan.tiles == mine.tiles(spec)
        assert plan.split == (min(fitting) if fitting else 1)
        assert plan.tile_in_shared == bool(fitting)
        assert plan.rows == -(-plan.sequences * seq_len // plan.split) <= 128
        assert plan.programs == -(-batch // plan.sequences) * plan.split
        assert plan.programs % plan.cluster == plan.cluster % plan.split == 0
        assert plan.programs >= 132 or plan.rows <= -(-seq_len // 64) * 64
        if own:
            assert (plan.sequences, plan.cluster) == (1, plan.split)
        stay = plan.stages == spec.n_layers * plan.tiles
        kinds["stay" if stay else "L2" if not fitting else "split" if plan.split > 1 else "whole"] += 1
    assert min(kinds.values()) > 15, kinds


@pytest.mark.parametrize(("seq_len", "rows"), [(81, 41), (97, 49)])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_tiny_recursive_models_are_resident(library, seq_len, rows, own, backward):
    spec = BlockSpec(d_model=512, n_heads=8, **KINDS["trm"])
    plan = plan_of(library, spec, 768, seq_len, own_loops=own, backward=backward)
    assert plan.tile_in_shared
    assert (plan.split, plan.rows, plan.cluster) == (2, rows, 2 if own or backward else 4)
    assert plan.stages >= 3


# d_model, d_ff, tokens: rows, of as many as 128, with which all weights stay in shared memory
@pytest.mark.parametrize(
    ("d_model", "d_ff", "seq_len", "rows"),
    [(64, 256, 32, 64), (64, 256, 20, 60), (64, 128, 32, 128), (64, 256, 64, 64)],
)
def test_rows_give_way_to_weights_that_are_read_once(library, d_model, d_ff, seq_len, rows):
    plan = plan_of(library, BlockSpec(d_model=d_model, n_heads=4, d_ff=d_ff), 1024, seq_len)
    assert plan.stages == plan.tiles
    assert (plan.rows, plan.cluster) == (rows, 1)


def test_rows_do_not_give_way_where_weights_cannot_stay(library):
    plan = plan_of(library, BlockSpec(d_model=128, n_heads=4, d_ff=512), 1024, 64)
    assert plan.stages < plan.tiles
    assert plan.rows == 128
