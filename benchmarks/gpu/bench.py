"""Ours and what people run today, timed: every case by every runner, forward, and forward and backward.

Times are CUDA events around one call, after warm-up, L2 not flushed (a training loop doesn't either). First
eight processes compile side by side; then one runner after another takes all cases, the cheap ones first.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.gpu import device
from benchmarks.gpu.cases import (
    ATTENTION_RUNNERS,
    ATTENTIONS,
    AUTOTUNED,
    BLOCK_RUNNERS,
    BLOCKS,
    CASES,
    DIRECTIONS,
    SLOPES,
    Attention,
    Block,
    serves,
)
from benchmarks.gpu.work import Case, Finding, Group, refused, rehearsing
from shift_kernels import BlockSpec, LoopedBlock, ShiftInputError, attention
from shift_kernels.bench.baseline import PLAIN, sdpa

SECONDS = 1.0
"""Of timed calls, for each runner and direction."""
LIMITS_S = {AUTOTUNED: 300.0, "compile": 150.0, "flex": 150.0}
LIMIT_S = 90.0
COMPILED = ("triton", "compile", "flex")
"""Runners whose kernels are compiled beforehand."""
N_LOOPS = (1, 2) if rehearsing() else (1, 2, 4, 8, 16)
SLOPE_RUNNERS = ("eager", "triton", "cuda")
OURS = ("cuda", "triton", "torch")

Call = Callable[[], Tensor]


# The plan.


def groups() -> list[Group]:
    """Compiling; the device's own ceilings; a process a runner; time against the number of loops."""
    pairs = [(case, runner) for runner in BLOCK_RUNNERS for case in BLOCKS]
    pairs += [(case, runner) for runner in ATTENTION_RUNNERS for case in ATTENTIONS if serves(runner, case)]
    pairs.sort(key=lambda pair: BLOCK_RUNNERS.index(_as_block_runner(pair[1])))  # stable: cases keep theirs
    compiled = [[_case("compile", *pair)] for pair in pairs if pair[1] in COMPILED]
    timed = [
        [timing(*pair, d) for pair in ones for d in DIRECTIONS]
        for _, ones in itertools.groupby(pairs, key=lambda pair: pair[1])
    ]
    slopes = [_case("slope", case, runner) for runner in SLOPE_RUNNERS for case in SLOPES]
    ceilings = Case("bench", "ceilings", LIMIT_S, dict(do="ceilings"))
    return [Group(compiled, workers=8), Group([[ceilings], *timed, slopes])]


def _as_block_runner(runner: str) -> str:
    return {"sdpa": "eager", "flash": "graphed"}.get(runner, runner)


def timing(case: Block | Attention, runner: str, direction: str, stage: str = "bench") -> Case:
    """A case that ends in times of a runner."""
    return dataclasses.replace(_case("time", case, runner, direction=direction), stage=stage)


def _case(do: str, case: Block | Attention, runner: str, **more: Any) -> Case:
    limit = LIMITS_S.get(runner, LIMIT_S)
    name = " / ".join([do, case.name, runner, *more.values()])
    return Case("bench", name, limit, dict(do=do, case=case.name, runner=runner, **more))


def run(case: Case) -> Finding:
    """What the plan says: ceilings, compile, time or slope."""
    arguments = dict(case.arguments)
    if arguments["do"] == "compile":  # eight processes do: each with a pool for the whole machine is too many
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "2"  # read when Inductor is imported, by what follows
    device.here().release()
    torch._dynamo.reset()  # or a runner would be recompiled for shape after shape, up to a limit
    do = {"ceilings": ceilings, "compile": compile_only, "time": timed, "slope": slope}[arguments.pop("do")]
    try:
        return do(**arguments)
    except ShiftInputError as refusal:
        return refused(refusal)


# The runners.


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """PyTorch's flash attention, or an error: it falls back to nothing else. The CPU has no such choice."""
    if not q.is_cuda:
        return sdpa(causal)(q, k, v)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(causal)(q, k, v)


def flex(seq_len: int, causal: bool, where: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """PyTorch's flex attention, to be compiled."""
    if not causal:
        return flex_attention
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, seq_len, seq_len, device=where)
    return lambda q, k, v: flex_attention(q, k, v, block_mask=mask)


def _mode(runner: str) -> dict[str, Any]:
    """Of torch.compile. A rehearsal traces as the others do, but leaves the C++ compiler out."""
    if rehearsing():
        return dict(backend="aot_eager")
    return dict(mode="max-autotune-no-cudagraphs" if runner == AUTOTUNED else None)


def block_call(case: Block, runner: str, e: Tensor, block: LoopedBlock) -> Call:
    """A call that runs the case once."""
    n_loops, causal = case.n_loops, block.spec.causal
    if runner in OURS:
        return lambda: block(e, n_loops, backend=runner)
    attend = {
        "flex": lambda: flex(case.seq_len, causal, e.device.type),
        "graphed": lambda: lambda q, k, v: flash(q, k, v, causal),
    }.get(runner, lambda: sdpa(causal))()
    plain = PLAIN[case.kind](block, attend)
    if runner in ("compile", "flex", AUTOTUNED):
        plain.body = torch.compile(plain.body, **_mode(runner))
    return lambda: plain(e, n_loops)


def attention_call(case: Attention, runner: str, qkv: list[Tensor]) -> Call:
    """A call that runs the case once."""
    if runner == "flex":
        compiled = torch.compile(flex(case.seq_len, True, qkv[0].device.type), **_mode(runner))
        return lambda: compiled(*qkv)
    if runner == "triton":
        return lambda: attention(*qkv, causal=True, backend="triton")
    return lambda: {"sdpa": sdpa(), "flash": flash}[runner](*qkv)


def steps(case: Block | Attention, runner: str, where: str) -> tuple[Call, dict[str, Callable[[], object]]]:
    """The call, and what is timed of it by direction."""
    torch.manual_seed(0)
    new: dict[str, Any] = dict(device=where, dtype=torch.bfloat16)
    if isinstance(case, Block):
        block = LoopedBlock(BlockSpec(**case.options), **new)
        e = torch.randn(case.batch, case.seq_len, case.d_model, **new).requires_grad_()
        call, inputs = block_call(case, runner, e, block), [e, *block.parameters()]
    else:
        shape = (case.batch, case.n_heads, case.seq_len, case.head_dim)
        inputs = [torch.randn(shape, **new).requires_grad_() for _ in range(3)]
        call = attention_call(case, runner, inputs)
    grad = torch.randn(inputs[0].shape, **new)

    def forward() -> None:
        with torch.no_grad():
            call()

    def both() -> None:
        torch.autograd.grad(call(), inputs, grad)

    return call, {"forward": forward, "both": both}


# What is measured.


def compile_only(case: str, runner: str) -> Finding:
    """Both directions once, for the compilers' caches; the row's seconds are the answer."""
    here = device.here()
    for step in steps(CASES[case], runner, here.torch)[1].values():
        step()
    here.synchronize()
    return Finding()


def timed(case: str, runner: str, direction: str) -> Finding:
    """Times in ms, and the bytes that a forward leaves allocated for its backward (None without one)."""
    here, sizes = device.here(), CASES[case]
    call, directions = steps(sizes, runner, here.torch)
    step = directions[direction]
    here.on_side_stream(step, 3)
    kept = _kept(here, call) if direction == "both" else None
    ms = device.times(here, here.graphed(step) if runner == "graphed" else step, SECONDS)
    passes = 3 if direction == "both" else 1  # a backward has twice the forward's FLOPs, and more traffic
    data = dict(case=case, runner=runner, direction=direction, times_ms=[round(x, 6) for x in ms])
    floor = device.floor_ms(here, passes * sizes.flops, passes * sizes.bytes)
    return Finding(data=data | dict(kept_bytes=kept, floor_ms=floor))


def _kept(here: device.Device, call: Call) -> int:
    before = here.allocated()
    out = call()
    return here.allocated() - before - out.nbytes


def slope(case: str, runner: str) -> Finding:
    """Time against the number of loops: the slope is what a loop costs, the intercept all else.

    A resident block moves no activations between loops: its slope may be less than one reading and writing of
    the residual stream (``stream_ms``), which no implementation that keeps it in device memory can undercut.
    """
    here, sizes = device.here(), CASES[case]
    assert isinstance(sizes, Block)
    ms = []
    for n_loops in N_LOOPS:
        step = steps(dataclasses.replace(sizes, n_loops=n_loops), runner, here.torch)[1]["forward"]
        here.on_side_stream(step, 3)
        ms.append(statistics.median(device.times(here, step, SECONDS / 4)))
    found = statistics.linear_regression(N_LOOPS, ms)
    stream = _copy_ms(here, sizes.batch * sizes.seq_len * sizes.d_model)
    data = dict(case=case, runner=runner, n_loops=N_LOOPS, ms=ms, stream_ms=stream)
    return Finding(data=data | dict(slope_ms=found.slope, intercept_ms=found.intercept))


def _copy_ms(here: device.Device, numbers: int) -> float:
    """Copying so many bf16 numbers at the rate of a copy that no cache holds."""
    x = torch.empty(2**12 if rehearsing() else 2**29, dtype=torch.bfloat16, device=here.torch)
    y = torch.empty_like(x)
    return statistics.median(device.times(here, lambda: y.copy_(x), SECONDS / 4)) * numbers / x.numel()


def ceilings() -> Finding:
    """What this device reaches at most: a large copy, and a large bf16 product of random numbers."""
    here = device.here()
    n = 64 if rehearsing() else 8192
    a, b = (torch.randn(n, n, device=here.torch, dtype=torch.bfloat16) for _ in range(2))
    here.on_side_stream(lambda: a @ b, 3)
    product = statistics.median(device.times(here, lambda: a @ b, SECONDS))
    rate = 4 * n**2 / _copy_ms(here, n**2) / 1e9  # 2 bytes read and 2 written
    return Finding(data=dict(tb_per_s=rate, tflops=2 * n**3 / product / 1e9))
