"""What the planner gives the kernels for sm_90a: arithmetic and order of plan.h's opening comment again."""

import dataclasses
import random
import shutil
from pathlib import Path

import pytest
import torch
from cuda_emulation import LIBRARY, emulated

from benchmarks.gpu.cases import KINDS
from shift_kernels import BlockSpec, compiled
from shift_kernels.backends import cuda as cuda_backend

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

BF16 = torch.bfloat16
KB = 1024
WIDTHS = (256, 128, 64, 32, 16)


@pytest.fixture(scope="module")
def library():
    return compiled.load("_native_cuda", Path(emulated(*LIBRARY).library._name))[0]


def plan_of(library, spec, batch, seq_len, limit=227 * KB, sms=132, backward=False, sm90a=True, **more):
    limits = cuda_backend.Limits(limit, sms, sm90a)
    call = cuda_backend.sizes(spec, batch, seq_len, BF16, BF16, limits, library)
    for name, value in more.items():
        setattr(call, name, value)
    return library.plan(call, backward=backward)


@dataclasses.dataclass
class Arrangement:
    """Rows of a program, and what it does at a time."""

    spec: BlockSpec
    backward: bool
    rows: int
    split: int
    kv_heads: int
    ff_chunk: int
    stages: int
    in_shared: bool
    tile_columns: int = 128
    remote_rows: int = 16
    in_registers: bool = False

    @property
    def queries(self):
        return self.kv_heads * self.spec.n_heads // self.spec.n_kv_heads * self.spec.head_dim

    @property
    def qkv(self):
        return self.queries + 2 * self.kv_heads * self.spec.head_dim

    def bytes(self):
        spec, chunk = self.spec, self.ff_chunk
        a_row = 4 * self.in_shared * (spec.d_model + 8) + 8
        others, most = 2 * self.kv_heads * spec.head_dim, chunk if spec.d_ff else 0
        shared_operand = 0
        if self.in_registers:
            most = 0  # neither are hidden columns in shared memory, nor xn of up to 128 columns
            shared_operand = 128 * 64 * -(-spec.d_model // 64) * 2 if spec.d_model > 128 else 0
        work = least = 0
        if self.backward:
            if most and spec.activation == "swiglu":
                most += 2 * chunk
            others = 2 * self.queries
            work = 2 * (max(2 * self.qkv + self.queries, most) + 8)
            least = 8 * 64 * 2 * 4  # sums of a norm's gradient, by warp
            a_row += self.queries // spec.head_dim * 8 + 8
        else:
            work = 2 * (max(self.qkv, most) + 8)
            a_row += 0 if self.in_registers else 2 * (spec.d_model + 8)
        others = self.remote_rows * (others + 8) * 2 if self.split > 1 else 0
        ring = self.stages * (self.tile_columns * 64 * 2 + 16) + 32
        return self.rows * a_row + max(self.rows * work, least) + others + ring + shared_operand + 128

    def passes(self, is_mlp):
        """Columns of what a pass of half a layer makes, and of what it makes that of."""
        if not is_mlp:
            return [(self.qkv, self.queries)] * (self.spec.n_kv_heads // self.kv_heads)
        ff, parts = -(-self.spec.d_ff // 16) * 16, 2 if self.spec.activation == "swiglu" else 1
        some = [min(self.ff_chunk, ff - first) for first in range(0, ff, self.ff_chunk)]
        return [(parts * n, n) for n in some]

    def tiles(self):
        """Weight tiles of a loop: of 64 k and tile_columns, or, with x in registers, of all of d_model."""
        spec, d = self.spec, self.spec.d_model

        def tiles(n, k):
            if self.in_registers:
                return -(-(k if n == d else n) // 64)
            return -(-n // self.tile_columns) * -(-k // 64)

        halves = [False, True] * spec.n_layers if spec.d_ff else [False] * spec.n_layers
        needs_last = not self.backward or spec.norm_placement != "pre" or spec.loop_norm
        found = 0
        for half in halves if needs_last else halves[:-1]:
            found += sum(tiles(hidden, d) + tiles(d, k) for hidden, k in self.passes(half))
        for half in halves if self.backward else []:
            found += sum(tiles(k, d) + tiles(hidden, d) + tiles(d, hidden) for hidden, k in self.passes(half))
        return found

    def subtiles(self):
        """Of 64 x 64, in all layers."""

        def subtiles(n, k):
            return -(-n // 64) * -(-k // 64)

        spec, d = self.spec, self.spec.d_model
        passes = self.passes(False) + (self.passes(True) if spec.d_ff else [])
        return spec.n_layers * sum(subtiles(hidden, d) + subtiles(d, k) for hidden, k in passes)


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
        norm_placement=rng.choice(["pre", "post"]),
        loop_norm=rng.random() < 0.5,
    )


@pytest.mark.parametrize("backward", [False, True])
def test_planner_takes_the_first_arrangement_that_fits(library, backward):
    rng = random.Random(0)
    kinds = dict.fromkeys(["stay", "whole", "split", "L2", "two", "none"], 0)
    for _ in range(400):
        spec, seq_len, batch = any_spec(rng), rng.randint(1, 128), rng.choice([1, 40, 4096])
        limit, own = rng.choice([75, 99, 163, 227]) * KB, rng.random() < 0.3
        plan = plan_of(library, spec, batch, seq_len, limit, backward=backward, own_loops=own)

        def fits(stages, split, in_shared, spec=spec, seq_len=seq_len, limit=limit):
            small = Arrangement(
                spec, backward, -(-seq_len // split), split, 1, min(16, spec.d_ff), stages, in_shared
            )
            small.stages = min(stages, small.tiles())
            return small.bytes() <= limit

        splits = [s for s in (2, 4) if seq_len > 16 * s]
        fitting = [
            (stages, split, in_shared)
            for stages in (3, 2)
            for split, in_shared in [(1, True), *((s, True) for s in splits), (1, False)]
            if fits(stages, split, in_shared)
        ]
        if plan.refusal:
            kinds["none"] += 1
            assert not fitting
            # ... and the kernels for all architectures, which would do otherwise, find no room either.
            assert plan_of(library, spec, batch, seq_len, limit, backward=backward, sm90a=False).refusal
            continue
        narrow = plan.tile_columns == 64  # all of a loop's fit, where three of 128 columns may not
        least, split, in_shared = (plan.tiles, 1, True) if narrow else fitting[0]
        mine = Arrangement(
            spec, backward, plan.rows, plan.split, plan.kv_heads, plan.ff_chunk, plan.stages, in_shared,
            plan.tile_columns, plan.remote_rows,
        )  # fmt: skip
        assert plan.tile_columns == 128 or (plan.rows > 64 and plan.stages == plan.tiles)
        assert (plan.split, plan.residual == "shared") == (split, in_shared)
        assert plan.shared_bytes == mine.bytes() <= limit
        assert plan.tiles == mine.tiles()
        assert plan.stages >= min(least, plan.tiles)
        fewest = dataclasses.replace(mine, remote_rows=16)
        assert plan.stages == plan.tiles or fewest.bytes() + 128 * 64 * 2 + 16 > limit
        more = dataclasses.replace(mine, remote_rows=plan.remote_rows + 16)
        assert split == 1 or plan.remote_rows >= plan.rows or more.bytes() > limit
        assert plan.remote_rows % 16 == 0
        assert (plan.remote_rows > 0) == (split > 1)
        assert plan.packed_bytes > mine.subtiles() * 64 * 64 * 2
        assert plan.rows == -(-plan.sequences * seq_len // plan.split) <= 128
        assert plan.programs == -(-batch // plan.sequences) * plan.split
        assert plan.programs % plan.cluster == plan.cluster % plan.split == 0
        assert 2 * plan.programs > 132 or plan.rows <= -(-seq_len // 64) * 64
        assert plan.threads == 288
        if own:
            assert (plan.sequences, plan.cluster) == (1, plan.split)
        stay = plan.stages == plan.tiles
        kinds["two"] += least == 2
        kinds["stay" if stay else "L2" if not in_shared else "split" if split > 1 else "whole"] += 1
    assert min(kinds.values()) > 2, kinds


@pytest.mark.parametrize("backward", [False, True])
def test_registers_hold_the_residual_stream_where_they_have_room(library, backward):
    rng = random.Random(2)
    found = dict.fromkeys(["stay", "ring", "no"], 0)
    for _ in range(600):
        spec = dataclasses.replace(any_spec(rng), d_model=rng.choice([64, 80, 128, 192, 256, 272]))
        batch, seq_len, limit = (
            rng.choice([1, 40, 4096]),
            rng.randint(1, 128),
            rng.choice([75, 163, 227]) * KB,
        )
        plan = plan_of(library, spec, batch, seq_len, limit, backward=backward, own_kernel=True)
        other = plan_of(library, spec, batch, seq_len, limit, backward=backward)
        columns = 256 if not backward else 64 if spec.activation == "swiglu" else 128
        d_pad, chunk = -(-spec.d_model // 64) * 64, min(64, plan.ff_pad)

        def arranged(rows, kv_heads, stages, spec=spec, d_pad=d_pad, chunk=chunk):
            return Arrangement(
                spec, backward, rows, 1, kv_heads, chunk, stages, False, d_pad, in_registers=True
            )

        # Half of the multiprocessors have something to do, or there are no fewer rows.
        most = [n for n in range(1, 129) if 64 < n * seq_len <= 128 and (n == 1 or 2 * -(-batch // n) > 132)]
        if plan.residual != "registers":
            assert all(getattr(plan, name) == getattr(other, name) for name in plan.FIELDS)
            fits = any(arranged(n * seq_len, 1, 3).bytes() <= limit for n in most)
            assert spec.d_model > columns or not fits
            found["no"] += 1
            continue
        assert spec.d_model <= columns
        assert plan.rows == plan.sequences * seq_len
        assert plan.sequences in most
        mine = arranged(plan.rows, plan.kv_heads, plan.stages)
        assert plan.shared_bytes == mine.bytes() <= limit
        assert plan.tiles == mine.tiles()
        assert plan.stages == plan.tiles or dataclasses.replace(mine, stages=plan.stages + 1).bytes() > limit
        # A product's weights, those of the one under way, and the next's.
        assert plan.stages >= min(3, plan.tiles)
        assert (plan.tile_columns, plan.ff_chunk, plan.threads) == (d_pad, chunk, 384)
        found["stay" if plan.stages == plan.tiles else "ring"] += 1
    assert min(found.values()) > 1, found


@pytest.mark.parametrize("backward", [False, True])
def test_hidden_columns_are_whole_subtiles_where_there_is_room(library, backward):
    spec = BlockSpec(d_model=256, n_heads=8, d_ff=1000)
    plan = plan_of(library, spec, 64, 64, backward=backward)
    assert plan.ff_chunk % 64 == 0
    assert plan.ff_chunk < plan.ff_pad == 1008


@pytest.mark.parametrize(("seq_len", "rows"), [(81, 41), (97, 49)])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_tiny_recursive_models_are_resident(library, seq_len, rows, own, backward):
    spec = BlockSpec(d_model=512, n_heads=8, **KINDS["trm"])
    plan = plan_of(library, spec, 768, seq_len, own_loops=own, backward=backward)
    assert plan.residual == "shared"
    assert (plan.split, plan.rows, plan.cluster) == (2, rows, 2 if own else 4)
    assert plan.tiles > plan.stages >= 3


# d_model, d_ff, tokens: rows, of as many as 128, with which all weights stay; columns of a tile
@pytest.mark.parametrize(
    ("d_model", "d_ff", "seq_len", "rows", "tile_columns"),
    [(64, 256, 32, 128, 64), (64, 256, 20, 120, 64), (64, 384, 32, 128, 64), (96, 96, 32, 64, 128)],
)
def test_rows_give_way_to_weights_that_are_read_once(library, d_model, d_ff, seq_len, rows, tile_columns):
    spec = BlockSpec(d_model=d_model, n_heads=4, head_dim=16, d_ff=d_ff)
    plan = plan_of(library, spec, 1024, seq_len)
    assert plan.stages == plan.tiles
    assert (plan.rows, plan.cluster, plan.tile_columns) == (rows, 1, tile_columns)


def test_rows_do_not_give_way_where_weights_cannot_stay(library):
    plan = plan_of(library, BlockSpec(d_model=128, n_heads=4, d_ff=512), 1024, 64)
    assert plan.stages < plan.tiles
    assert plan.rows == 128


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize(("placement", "states"), [("pre", 4), ("post", 4), ("sandwich", 8)])
def test_what_a_backward_puts_aside_is_bounded_by_the_device(library, placement, states, dtype):
    spec = BlockSpec(d_model=512, n_heads=8, **KINDS["trm"] | {"norm_placement": placement})
    limits, found = cuda_backend.Limits(227 * KB, 132, True), set()
    for batch in (256, 4096):
        call = cuda_backend.sizes(spec, batch, 97, dtype, BF16, limits, library)
        plan = library.plan(call, backward=True)
        assert (plan.blocks, plan.rows, plan.residual == "shared") == (132, 49, True)
        found.add(plan.workspace_bytes)
    assert found == {132 * states * 49 * (512 + 8) * dtype.itemsize}


def test_blocks_are_whole_clusters_of_what_runs_at_once(library):
    rng = random.Random(1)
    rounds = 0
    for _ in range(200):
        spec, seq_len, batch = any_spec(rng), rng.randint(1, 128), rng.choice([1, 40, 4096])
        sms, limit, sm90a = rng.choice([1, 6, 132]), rng.choice([99, 227]) * KB, rng.random() < 0.7
        forward, backward = (
            plan_of(library, spec, batch, seq_len, limit, sms, backward, sm90a) for backward in (False, True)
        )
        assert forward.blocks == forward.programs
        if backward.refusal:
            continue
        at_once = sms * min((limit + KB) // (backward.shared_bytes + KB), 2048 // backward.threads)
        whole = max(at_once // backward.cluster, 1) * backward.cluster
        assert backward.blocks == min(backward.programs, whole)
        rounds += backward.blocks < backward.programs
    assert rounds > 20
