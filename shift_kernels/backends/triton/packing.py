"""Weights as the resident kernels read them, and gradients on their way back: a launch a layer each.

A forward packs, its backward reads what it packed: between two forwards weights may change without a trace
(``w.data``, a replayed CUDA graph), so a version counter would not tell when to pack again.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from shift_kernels.backends.device import capturing
from shift_kernels.backends.triton.resident_plan import MIN_SIDE, Layout, layout
from shift_kernels.backends.weight_gradients import NORM_VECTORS
from shift_kernels.rotary import rotary_table
from shift_kernels.spec import BlockSpec

MATRICES = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
"""Of the parts of a layer's packed weights."""
BIASES = ("self_attn.in_proj_bias", None, "linear1.bias", None)
"""Of the same rows; the other two biases are vectors along d_model."""
SLOTS = ("self_attn.out_proj.bias", "linear2.bias", *NORM_VECTORS, "loop_norm.weight", "loop_norm.bias")
"""Vectors along d_model, in the order of ``Packed.v``; the loop norm's stand in the first layer."""

N_SLOTS = tl.constexpr(len(SLOTS))
ROWS = tl.constexpr(MIN_SIDE)  # packed rows a program: every part is a multiple


class Packed(NamedTuple):
    """What the kernels read of a block.

    Args:
        w: [n_layers, weight_rows, d_pad], matmul operands.
        b: float32 [n_layers, weight_rows], a bias for each row.
        v: float32 [n_layers, slots, d_pad], vectors along d_model.
        rotary: float32 [2, seq_len, head_pad]; empty without rope.
    """

    w: Tensor
    b: Tensor
    v: Tensor
    rotary: Tensor


class Layer(NamedTuple):
    """A layer's tensors, or their gradients, by part and by slot; None where there is none."""

    matrices: tuple[Tensor | None, ...]
    biases: tuple[Tensor | None, ...]
    vectors: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, tensors: dict[str, Tensor], i: int) -> Layer:
        """Layer ``i`` of a block's tensors by name."""

        def get(name: str | None) -> Tensor | None:
            if name is not None and name.startswith("loop_norm"):
                return tensors.get(name) if i == 0 else None
            return tensors.get(f"layers.{i}.{name}")

        return cls(*(tuple(map(get, names)) for names in (MATRICES, BIASES, SLOTS)))


@triton.jit
def _rows_of(part: tl.constexpr, first, S: tl.constexpr):
    """Where packed rows from ``first`` on stand in their weight (offsets, mask [ROWS, d_pad]) and bias."""
    size: tl.constexpr = S.widths[part][0]
    pad: tl.constexpr = S.widths[part][1]
    packed = first - S.starts[part] + tl.arange(0, ROWS)
    row = (packed // pad).to(tl.int64) * size + packed % pad
    column = tl.arange(0, S.d_pad)
    exists = packed % pad < size
    if part % 2 == 0:
        at = row[:, None] * S.d_model + column[None, :]
    else:
        length: tl.constexpr = (S.starts[part + 1] - S.starts[part]) // pad * size
        at = column[None, :].to(tl.int64) * length + row[:, None]
    return at, exists[:, None] & (column < S.d_model)[None, :], row, exists


@triton.jit
def _pack(layer, W, B, V, S: tl.constexpr):
    first = tl.program_id(0) * ROWS
    packed = first + tl.arange(0, ROWS)
    column = tl.arange(0, S.d_pad)
    parts: tl.constexpr = S.parts
    for part in tl.static_range(parts):
        if (first >= S.starts[part]) & (first < S.starts[part + 1]):
            at, mask, row, exists = _rows_of(part, first, S)
            w = tl.load(layer.matrices[part] + at, mask=mask, other=0.0).to(W.dtype.element_ty)
            tl.store(W + packed[:, None].to(tl.int64) * S.d_pad + column[None, :], w)
            b = tl.zeros([ROWS], tl.float32)
            if layer.biases[part] is not None:
                b = tl.load(layer.biases[part] + row, mask=exists, other=0.0).to(tl.float32)
            tl.store(B + packed, b)
    if first == S.weight_rows:  # the last program
        for slot in tl.static_range(N_SLOTS):
            v = tl.zeros(column.shape, tl.float32)
            if layer.vectors[slot] is not None:
                v = tl.load(layer.vectors[slot] + column, mask=column < S.d_model, other=0.0).to(tl.float32)
            tl.store(V + slot * S.d_pad + column, v)


@triton.jit
def _total(X, splits, stride, mask):
    """The sum over splits of what lies ``stride`` apart, always in the same order."""
    total = tl.load(X, mask=mask, other=0.0)
    for i in range(1, splits):
        total += tl.load(X + i * stride, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["splits"])
def _unpack(W, B, V, layer, splits, S: tl.constexpr):
    first = tl.program_id(0) * ROWS
    packed = first + tl.arange(0, ROWS)
    column = tl.arange(0, S.d_pad)
    stride = tl.cast(S.n_layers * S.weight_rows, tl.int64)  # from split to split, in rows
    parts: tl.constexpr = S.parts
    for part in tl.static_range(parts):
        if (first >= S.starts[part]) & (first < S.starts[part + 1]):
            at, mask, row, exists = _rows_of(part, first, S)
            source = W + packed[:, None].to(tl.int64) * S.d_pad + column[None, :]
            w = _total(source, splits, stride * S.d_pad, mask)
            out = layer.matrices[part]
            tl.store(out + at, w.to(out.dtype.element_ty), mask=mask)
            if layer.biases[part] is not None:
                b = _total(B + packed, splits, stride, exists)
                tl.store(layer.biases[part] + row, b.to(layer.biases[part].dtype.element_ty), mask=exists)
    if first == S.weight_rows:
        for slot in tl.static_range(N_SLOTS):
            if layer.vectors[slot] is not None:
                v = tl.load(V + slot * S.d_pad + column)
                out = layer.vectors[slot]
                tl.store(out + column, v.to(out.dtype.element_ty), mask=column < S.d_model)


def pack(weights: dict[str, Tensor], spec: BlockSpec, seq_len: int, compute_dtype: torch.dtype) -> Packed:
    """Lay all weights of a block out for the kernels, zero-padded."""
    sizes, first = layout(spec), next(iter(weights.values()))
    packed = Packed(*packed_like(first, spec, compute_dtype), rotary(spec, seq_len, first.device))
    if len({w.dtype for w in weights.values()}) > 1:
        weights = {name: w.float() for name, w in weights.items()}
    weights = {name: w.contiguous() for name, w in weights.items()}
    for i in range(spec.n_layers):
        own = packed.w[i], packed.b[i], packed.v[i]
        _pack[_programs(sizes)](Layer.of(weights, i), *own, sizes)
    return packed


def packed_like(x: Tensor, spec: BlockSpec, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Room for w, b and v on x's device."""
    s = layout(spec)
    return (
        x.new_empty(s.n_layers, s.weight_rows, s.d_pad, dtype=compute_dtype),
        x.new_empty(s.n_layers, s.weight_rows, dtype=torch.float32),
        x.new_empty(s.n_layers, len(SLOTS), s.d_pad, dtype=torch.float32),
    )


def unpack(packed: Packed, weights: dict[str, Tensor], spec: BlockSpec) -> list[Tensor]:
    """Gradients in the weights' order, shapes and dtypes, from packed ones: w and b [splits, ...], v."""
    sizes = layout(spec)
    found = {name: torch.empty(w.shape, dtype=w.dtype, device=w.device) for name, w in weights.items()}
    for i in range(spec.n_layers):
        own = packed.w[:, i], packed.b[:, i], packed.v[i]
        _unpack[_programs(sizes)](*own, Layer.of(found, i), len(packed.w), sizes)
    return list(found.values())


def _programs(sizes: Layout) -> tuple[int]:
    return (sizes.weight_rows // MIN_SIDE + 1,)


def rotary(spec: BlockSpec, seq_len: int, device: torch.device) -> Tensor:
    """cos and sin as the kernels read them, float32 [2, seq_len, head_pad]; empty without rope."""
    if spec.position != "rope":
        return torch.empty(0, device=device)
    if capturing(device):
        # No copy from the host, and nothing kept that lies in the graph's memory.
        return _padded_table(spec, seq_len, device)
    return _kept_table(spec, seq_len, device)


@functools.lru_cache(maxsize=64)
def _kept_table(spec: BlockSpec, seq_len: int, device: torch.device) -> Tensor:
    """Made on the host: the copy is complete when it returns, whatever stream reads it later."""
    return _padded_table(spec, seq_len, torch.device("cpu")).to(device)


def _padded_table(spec: BlockSpec, seq_len: int, device: torch.device) -> Tensor:
    table = rotary_table(seq_len, spec, device).float().repeat(1, 1, 2)
    return torch.nn.functional.pad(table, (0, layout(spec).head_pad - spec.head_dim)).contiguous()
