"""One forward and backward of every backend and shape class, held against float64. Small, and each alone.

An error may be twice that of PyTorch in the same dtype. Every shape is called plainly, and ragged: samples'
own lengths and numbers of loops, NaN in the pads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import device
from benchmarks.gpu.cases import KINDS
from benchmarks.gpu.work import OK, WRONG, Case, Finding, Group, refused, rehearsing
from shift_kernels import BlockSpec, LoopedBlock, ShiftInputError, attention, reference
from shift_kernels.accuracy import ALLOWED, error_ratio

LIMIT_S = 120.0

GPT, SWIGLU = KINDS["gpt"], dict(activation="swiglu", norm="rmsnorm", position="rope")
SHAPES: dict[str, dict[str, Any]] = {
    "d64 n32 bf16": dict(d_model=64, n_heads=4, seq_len=32, **GPT),
    "d64 n32 fp32": dict(d_model=64, n_heads=4, seq_len=32, dtype="float32", **GPT),
    "d64 n32 fp16": dict(d_model=64, n_heads=4, seq_len=32, dtype="float16", **GPT),
    "d128 n64 bf16": dict(d_model=128, n_heads=4, seq_len=64, **GPT),
    "d256 n64 bf16": dict(d_model=256, n_heads=8, seq_len=64, **GPT),
    "trm d512 n97 bf16": dict(d_model=512, n_heads=8, seq_len=97, **KINDS["trm"]),
    "d512 n128 bf16": dict(d_model=512, n_heads=8, seq_len=128, **GPT),
    "d512 n512 bf16": dict(d_model=512, n_heads=8, seq_len=512, **GPT),
    "d512 n512 fp32": dict(d_model=512, n_heads=8, seq_len=512, dtype="float32", **GPT),
    "d1024 n64 bf16": dict(d_model=1024, n_heads=16, seq_len=64, **GPT),
    "odd d24 n19 bf16": dict(d_model=24, n_heads=3, seq_len=19, **GPT),
    "grouped, swiglu, rope bf16": dict(d_model=128, n_heads=4, n_kv_heads=2, seq_len=33, **SWIGLU),
    "head_dim 128, sandwich bf16": dict(
        d_model=256, n_heads=2, seq_len=64, norm_placement="sandwich", loop_norm=True, **SWIGLU
    ),
    "post-norm, scaled bf16": dict(
        d_model=64, n_heads=2, seq_len=40, norm_placement="post", residual_scale=0.5, causal=False
    ),
    "attention only bf16": dict(d_model=64, n_heads=2, seq_len=33, d_ff=0, norm="none"),
}
ATTENTIONS: dict[str, dict[str, Any]] = {  # batch, heads, kv_heads, seq_len, head_dim
    "attention hd16 n32 bf16": dict(size=(4, 4, 4, 32, 16)),
    "attention hd4 n64 bf16": dict(size=(4, 8, 8, 64, 4)),
    "attention hd64 n512 bf16": dict(size=(2, 4, 4, 512, 64)),
    "attention hd128 n300 bf16": dict(size=(2, 4, 2, 300, 128)),
    "attention hd24 n151 fp16": dict(size=(2, 6, 2, 151, 24), dtype="float16"),
    "attention hd64 n200 fp32": dict(size=(2, 2, 2, 200, 64), dtype="float32"),
}
if rehearsing():
    SHAPES = {"d64 n9 bf16": dict(d_model=64, n_heads=4, seq_len=9, **GPT)}
    ATTENTIONS = {"attention hd8 n20 bf16": dict(size=(1, 2, 1, 20, 8))}
BATCH, N_LOOPS = (2, 2) if rehearsing() else (5, 3)
CALLS = ("plain", "ragged")
BACKENDS = ("triton", "cuda")

Inputs = list[Tensor]


def cases(stage: str = "smoke", shapes: Sequence[str] | None = None) -> list[Case]:
    """A case a shape, call and backend.

    Args:
        stage: whose cases they are.
        shapes: names of :data:`SHAPES` or :data:`ATTENTIONS`; None: all.
    """
    found = [
        (shape, call, backend)
        for shape in (*SHAPES, *ATTENTIONS)
        for call in CALLS
        for backend in (BACKENDS if shape in SHAPES else BACKENDS[:1])
        if shapes is None or shape in shapes
    ]
    return [
        Case(stage, " / ".join(one), LIMIT_S, dict(zip(("shape", "call", "backend"), one, strict=True)))
        for one in found
    ]


def groups() -> list[Group]:
    """All shapes, each in a process of its own."""
    return [Group([[case] for case in cases()], workers=8)]


def run(case: Case) -> Finding:
    """Try one shape."""
    return check(**case.arguments)


def check(shape: str, call: str, backend: str) -> Finding:
    """Hold a backend's result and gradients against float64."""
    facts: dict[str, Any] = dict(shape=shape, call=call, backend=backend)
    torch.manual_seed(0)
    results = _block(shape, call) if shape in SHAPES else _attention(shape, call)
    try:
        ours = results(backend, None)
    except ShiftInputError as refusal:
        return dataclasses.replace(refused(refusal), data=facts)
    exact, same = results("torch", torch.float64), results("torch", None)
    device.here().synchronize()
    ratios = {name: error_ratio(ours[name], same[name], exact[name]) for name in exact}
    worst = max(ratios, key=ratios.__getitem__)
    facts["error_ratio"] = ratios[worst]
    if ratios[worst] <= ALLOWED:
        return Finding(OK, "", facts)
    return Finding(WRONG, f"{worst}: {ratios[worst]:.3g} times the error of PyTorch", facts)


Results = Callable[[str, torch.dtype | None], dict[str, Tensor]]
"""Backend and dtype (None: the shape's) -> name -> result or gradient."""


def _block(shape: str, call: str) -> Results:
    options = dict(SHAPES[shape])
    seq_len, dtype = options.pop("seq_len"), getattr(torch, options.pop("dtype", "bfloat16"))
    where = device.here().torch
    block = LoopedBlock(BlockSpec(**options)).to(where)
    for p in block.parameters():
        torch.nn.init.normal_(
            p, mean=float(p.ndim == 1) * 0.5, std=0.3 / p.shape[-1] ** 0.5 if p.ndim > 1 else 0.1
        )
    e = torch.randn(BATCH, seq_len, options["d_model"]).to(where, dtype)
    weights = {name: p.detach().to(dtype) for name, p in block.named_parameters()}
    keywords: dict[str, Any] = dict(n_loops=N_LOOPS)
    if call == "ragged":
        lens = torch.randint(1, seq_len + 1, (BATCH,))
        lens[0] = 0
        e[(torch.arange(seq_len) >= lens[:, None]).to(where)] = torch.nan
        keywords = dict(n_loops=torch.randint(0, N_LOOPS + 1, (BATCH,)).to(where), seq_lens=lens.to(where))
        keywords["n_loops"][-1] = N_LOOPS
    grad = torch.randn(e.shape).to(where)

    def results(backend: str, wide: torch.dtype | None) -> dict[str, Tensor]:
        inputs = {n: x.to(wide or dtype).requires_grad_() for n, x in {"e": e.clone(), **weights}.items()}
        own = {name: inputs[name] for name in weights}
        h = torch.func.functional_call(block, own, inputs["e"], keywords | {"backend": backend})
        return _with_gradients(h, inputs, grad)

    return results


def _attention(shape: str, call: str) -> Results:
    options = ATTENTIONS[shape]
    batch, n_heads, n_kv_heads, seq_len, head_dim = options["size"]
    dtype, where = getattr(torch, options.get("dtype", "bfloat16")), device.here().torch
    heads = dict(q=n_heads, k=n_kv_heads, v=n_kv_heads)
    qkv = {name: torch.randn(batch, n, seq_len, head_dim).to(where, dtype) for name, n in heads.items()}
    ragged = call == "ragged"
    lens = torch.randint(0, seq_len + 1, (batch,)).to(where) if ragged else None
    grad = torch.randn(qkv["q"].shape).to(where)

    def results(backend: str, wide: torch.dtype | None) -> dict[str, Tensor]:
        inputs = {name: x.clone().to(wide or dtype).requires_grad_() for name, x in qkv.items()}
        if backend == "torch":
            o = reference.attention(*inputs.values(), causal=True, seq_lens=lens)
        else:
            o = attention(*inputs.values(), causal=True, seq_lens=lens, backend=backend)
        return _with_gradients(o, inputs, grad)

    return results


def _with_gradients(out: Tensor, inputs: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    leaves = list(inputs.values())
    grads = torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True, materialize_grads=True)
    names = [f"gradient of {name}" for name in inputs]
    return {"result": out.detach(), **dict(zip(names, grads, strict=True))}
