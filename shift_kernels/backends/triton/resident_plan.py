"""What a resident program holds: tile, warps, chunks, what fits on chip. Pure arithmetic, no Triton.

The limits below come from compiling every tile offline (``benchmarks/offline/compile_triton.py``,
figures in ``benchmarks/results/offline/triton.json``).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import torch

from shift_kernels.backends.triton import tuned
from shift_kernels.spec import GATED, BlockSpec

MIN_SIDE = 16  # the smallest side of a tile that tl.dot accepts
PACKED_ROWS = 64  # short sequences share a tile of up to this many rows
APART = 64  # d_pad up to which two sequences take fewer instructions apart than in one tile (NOTES.md)
# Elements of the fp32 residual tile (rows x padded d_model) that a program may hold, by operand bytes.
FORWARD_TILE = {2: 64 * 256, 4: 64 * 64}
BACKWARD_TILE = {2: 64 * 256, 4: 64 * 64}
MAX_ROWS = 128
# Numbers that a thread may hold at a time. Beyond, a backward spills 5 to 15 KB, and a forward whose products
# read operands from registers 3 to 61 KB; half of it where a backward must fit tensor memory (NOTES.md).
HELD, TENSOR_MEMORY_HELD = 256, 128
MOST_FF_CHUNK = 64  # hidden columns at a time, at most; d_ff is padded to a multiple
# With compute capability 10 accumulators live in tensor memory, 512 columns of it: the backward holds many.
BLACKWELL_BACKWARD_ROWS, BLACKWELL_BACKWARD_TILE = 64, 64 * 128
BUSY = 132  # programs that keep a large GPU busy (H100, H200: 132 SMs): beyond them tiles may grow


class Chip(NamedTuple):
    """What the planner asks of a device: compute capability (86 for 8.6), shared memory a program may use."""

    sm: int
    shared_bytes: int

    @property
    def tensor_memory(self) -> bool:
        """Whether accumulators live in tensor memory: with compute capability 10, not with 12."""
        return self.sm // 10 in (10, 11)

    @property
    def warpgroups(self) -> bool:
        """Whether products read their operands from shared memory, not from registers."""
        return self.sm // 10 in (9, 10, 11)


HOPPER = Chip(90, 227 * 1024)
"""The device taken where there is none."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of a block and how its weights are packed, whatever the tile; with ``_pad``: zero-padded.

    A layer's packed weights are ``weight_rows`` rows of length d_pad, in four parts: in_proj (heads of q, k,
    v), out_proj transposed (heads), linear1 (with swiglu gate, then values), linear2 transposed.

    Args:
        d_model, n_heads, n_kv_heads, head_dim, d_ff, n_layers: sizes of the block, d_ff 0 without an MLP.
        hidden: widths of d_ff in linear1.
        d_pad, head_pad, ff_pad: what tl.dot takes.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    n_layers: int
    hidden: int
    d_pad: int
    head_pad: int
    ff_pad: int

    @property
    def starts(self) -> tuple[int, ...]:
        """First packed row of each part, and behind the last."""
        heads = self.n_heads + 2 * self.n_kv_heads
        rows = (heads * self.head_pad, self.n_heads * self.head_pad, self.hidden * self.ff_pad, self.ff_pad)
        return tuple(itertools.accumulate(rows, initial=0))

    @property
    def weight_rows(self) -> int:
        """Packed rows of a layer."""
        return self.starts[-1]

    @property
    def parts(self) -> int:
        """Parts that there are: two without an MLP."""
        return 4 if self.d_ff else 2

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """Of each part: columns of a head or of the hidden layer, and the same padded."""
        head, ff = (self.head_dim, self.head_pad), (self.d_ff, self.ff_pad)
        return head, head, ff, ff

    @property
    def halves(self) -> int:
        """Half layers of a layer, each with a state of its own: attention, and where there is one the MLP."""
        return 2 if self.d_ff else 1


@dataclasses.dataclass(frozen=True)
class Tile(Layout):
    """Compile-time facts of one resident kernel.

    Args:
        rows: tokens a program owns, a power of two.
        packed: several whole sequences share those rows, one behind the other; else one has them.
        ff_chunk: hidden columns at a time.
        warps, stages: warps a program, stages of Triton's pipeline.
        saves: states a loop saves: one a half layer, one more for the loop's own norm.
        direct: a branch is accumulated straight into the residual tile (pre norm, no scale).
        precision: tl.dot's input_precision (matters for fp32 operands only).
    """

    rows: int
    packed: bool
    ff_chunk: int
    warps: int
    stages: int
    saves: int
    activation: str
    norm: str
    placement: str
    causal: bool
    rope: bool
    inject: bool
    loop_norm: bool
    direct: bool
    scale: float
    eps: float
    precision: str

    def programs(self, batch: int, seq_len: int) -> int:
        """Programs that serve a batch."""
        return -(-batch // (self.rows // seq_len if self.packed else 1))

    @property
    def ff_end(self) -> int:
        """Behind the last hidden column that is computed."""
        return -(-self.d_ff // self.ff_chunk) * self.ff_chunk

    @property
    def step(self) -> int:
        """Rows at a time of what the backward does row by row."""
        return min(self.rows, 32 if self.d_pad <= 128 else 16)

    @property
    def half(self) -> int:
        """Half of head_dim, by which rope pairs columns."""
        return self.head_dim // 2

    @property
    def score_factor(self) -> float:
        """Factor on q k^T: 1 / sqrt(head_dim)."""
        return self.head_dim**-0.5

    @property
    def score_scale(self) -> float:
        """The same in base 2, for exp2."""
        return self.score_factor * math.log2(math.e)


def power_of_two(n: int) -> int:
    """The smallest power of two >= n that may be a side of a matmul tile."""
    return max(MIN_SIDE, 1 << (n - 1).bit_length())


@functools.lru_cache(maxsize=256)
def layout(spec: BlockSpec) -> Layout:
    """The sizes of a block, padded."""
    step = min(power_of_two(spec.d_ff), MOST_FF_CHUNK)
    return Layout(
        d_model=spec.d_model,
        n_heads=spec.n_heads,
        n_kv_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        d_ff=spec.d_ff,
        n_layers=spec.n_layers,
        hidden=2 if spec.activation in GATED else 1,
        d_pad=power_of_two(spec.d_model),
        head_pad=power_of_two(spec.head_dim),
        ff_pad=-(-spec.d_ff // step) * step,
    )


def states(spec: BlockSpec) -> int:
    """States that a loop keeps for the backward: the inputs of every half layer and of the loop norm."""
    return spec.n_layers * layout(spec).halves + spec.loop_norm


def limits(itemsize: int, *, grad: bool, chip: Chip) -> tuple[int, int]:
    """Most rows, and most elements (rows x d_pad), of a tile."""
    if grad and chip.tensor_memory and itemsize == 2:
        return BLACKWELL_BACKWARD_ROWS, BLACKWELL_BACKWARD_TILE
    return MAX_ROWS, (BACKWARD_TILE if grad else FORWARD_TILE)[itemsize]


def tile(
    spec: BlockSpec,
    seq_len: int,
    batch: int,
    *,
    itemsize: int,
    pack: bool,
    precision: str,
    grad: bool,
    chip: Chip = HOPPER,
) -> Tile:
    """The tile for a block and a padded length.

    Args:
        spec, seq_len, batch: the problem.
        itemsize: bytes of a matmul operand.
        pack: several short sequences may share a tile: they then leave together, so not with a T each.
        precision: ``ieee`` or ``tf32``.
        grad: for the backward kernel, which holds more and takes smaller chunks.
        chip: the device.
    """
    rows = alone = power_of_two(seq_len)
    sizes = layout(spec)
    if pack:
        most_rows, most = limits(itemsize, grad=grad, chip=chip)
        while (
            2 * rows <= min(PACKED_ROWS, most_rows)
            and 2 * rows * sizes.d_pad <= most
            and batch * seq_len >= 2 * rows * BUSY
            and shared_bytes(spec, 2 * rows, itemsize, grad=grad, chip=chip) <= chip.shared_bytes
        ):
            rows *= 2
        if rows // seq_len == 2 and sizes.d_pad <= APART:
            rows = alone
    config = tuned.config(rows, sizes.d_pad, itemsize, grad=grad, sm=chip.sm)
    return Tile(
        **dataclasses.asdict(sizes),
        rows=rows,
        packed=2 * seq_len <= rows and pack,
        ff_chunk=min(power_of_two(spec.d_ff), config.ff_chunk),
        warps=config.warps,
        stages=config.stages,
        saves=states(spec),
        activation=spec.activation,
        norm=spec.norm,
        placement=spec.norm_placement,
        causal=spec.causal,
        rope=spec.position == "rope",
        inject=spec.injection == "add",
        loop_norm=spec.loop_norm,
        direct=adds_directly(spec),
        scale=float(spec.residual_scale),
        eps=float(spec.norm_eps),
        precision=precision,
    )


def unserved(spec: BlockSpec) -> str | None:
    """Why no kernel here, resident or streamed, serves this block, or None."""
    return f"head_dim = {spec.head_dim} > 128" if spec.head_dim > 128 else None


def too_large(
    spec: BlockSpec, seq_len: int, compute_dtype: torch.dtype, *, grad: bool, chip: Chip = HOPPER
) -> str | None:
    """Why no tile holds this block, or None."""
    rows, d_pad = power_of_two(seq_len), power_of_two(spec.d_model)
    most_rows, most = limits(compute_dtype.itemsize, grad=grad, chip=chip)
    if rows > most_rows:
        return f"seq_len = {seq_len} > {most_rows}{' with gradients' if grad else ''}"
    if rows * d_pad > most:
        return (
            f"a tile of {rows} x {d_pad} (seq_len x d_model, padded) > {most} elements"
            f"{' with gradients' if grad else ''} in {str(compute_dtype).removeprefix('torch.')}"
        )
    numbers = held(spec, rows, compute_dtype.itemsize)
    most_held = TENSOR_MEMORY_HELD if grad and chip.tensor_memory else HELD
    if numbers > most_held and (grad or chip.tensor_memory or not chip.warpgroups):
        return f"{numbers} numbers a thread > {most_held}{' with gradients' if grad else ' on this device'}"
    shared = shared_bytes(spec, rows, compute_dtype.itemsize, grad=grad, chip=chip)
    if shared > chip.shared_bytes:
        return f"up to {shared} bytes of shared memory a program > {chip.shared_bytes} on this device"
    return None


def held(spec: BlockSpec, rows: int, itemsize: int) -> int:
    """Numbers of tiles that a thread holds at a time: residual, a branch beside it, one head's q, k and v."""
    s = layout(spec)
    tiles = s.d_pad * (1 if adds_directly(spec) else 2) + 3 * s.head_pad
    return rows * tiles // (32 * tuned.warps(rows, itemsize))


def adds_directly(spec: BlockSpec) -> bool:
    """Whether a branch is accumulated straight into the residual tile."""
    return spec.norm_placement != "sandwich" and spec.residual_scale == 1


def shared_bytes(spec: BlockSpec, rows: int, itemsize: int, *, grad: bool, chip: Chip) -> int:
    """Shared memory that a program takes at most: what its products read from there at a time.

    A model of what Triton 3.6 does, held against every kernel that was compiled (test_triton_offline.py).
    """
    s = layout(spec)
    chunk = tuned.config(rows, s.d_pad, itemsize, grad=grad, sm=chip.sm).ff_chunk
    tiles = 2 if grad else 1  # xn, and dy
    # q, k, v, do; p, ds. Tensor cores that read left operands from registers leave fewer of them there.
    staged = chip.warpgroups or itemsize == 4
    heads = 4 if grad and staged else 2
    scores = grad + staged
    head, square = rows * s.head_pad, rows * rows
    attention = s.head_pad * s.d_pad + heads * head + scores * square
    if scores:
        attention = max(attention, 2 * square + head)
    if staged and spec.position == "rope":  # a product with a signed permutation of head_dim
        attention = max(attention, s.head_pad * (s.d_pad + s.head_pad) + head + 256)
    mlp = (s.hidden + 1) * chunk * s.d_pad + chip.warpgroups * rows * chunk if s.d_ff else 0
    return itemsize * (tiles * rows * s.d_pad + max(attention, mlp))


@functools.lru_cache(maxsize=4096)
def plan(
    spec: BlockSpec,
    seq_len: int,
    batch: int,
    *,
    compute_dtype: torch.dtype,
    pack: bool,
    precision: str,
    training: bool,
    backward: bool,
    chip: Chip,
) -> Tile | None:
    """The tile of a call's kernel; None where a block (in ``training``: its backward) is too large."""
    if too_large(spec, seq_len, compute_dtype, grad=training, chip=chip):
        return None
    return tile(
        spec,
        seq_len,
        batch,
        itemsize=compute_dtype.itemsize,
        pack=pack,
        precision=precision,
        grad=backward,
        chip=chip,
    )
