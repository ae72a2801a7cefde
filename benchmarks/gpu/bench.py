"""Time one case: ``python -m benchmarks.gpu.bench CASE``, one JSON line a runner and direction on stdout.

A runner that fails leaves a line with its error; the others go on. Times are CUDA events around one call,
after warm-up, L2 not flushed (a training loop doesn't either).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.gpu.cases import CASES, DIRECTIONS, Attention, Block, runners
from shift_kernels import BlockSpec, LoopedBlock, attention
from shift_kernels.bench.baseline import PLAIN, sdpa
from shift_kernels.call import CallOptions

SECONDS_A_RUNNER = 1.0  # of timed calls
ROUNDS = (10, 200)
# Dense bf16 matmul ceiling as measured on the device, TFLOP/s; elsewhere no share of a roofline is printed.
CEILING_TFLOPS = {"NVIDIA H200": 790}


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa()(q, k, v)


def flex(seq_len: int, causal: bool = True) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if not causal:
        return flex_attention
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, seq_len, seq_len, device="cuda")
    return lambda q, k, v: flex_attention(q, k, v, block_mask=mask)


def block_call(case: Block, runner: str, e: Tensor, block: LoopedBlock) -> Callable[[], Tensor]:
    """A call that runs the case once."""
    n_loops, causal = case.n_loops, block.spec.causal
    if runner in ("cuda", "triton"):
        return lambda: block(e, n_loops, backend=runner)
    if runner == "streamed":
        return _streamed(e, block, n_loops)
    plain = PLAIN[case.kind](block, flex(case.seq_len, causal) if runner == "flex" else sdpa(causal))
    if runner in ("compile", "flex", "max-autotune"):
        plain.compile("max-autotune-no-cudagraphs" if runner == "max-autotune" else None)
    return lambda: plain(e, n_loops)


def _streamed(e: Tensor, block: LoopedBlock, n_loops: int) -> Callable[[], Tensor]:
    from shift_kernels.backends.triton import streamed as layer

    names = list(block.spec.weight_shapes())
    asked = CallOptions(n_loops, e.dtype)

    class Streamed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, e, *weights):
            w = dict(zip(names, weights, strict=True))
            keep = any(ctx.needs_input_grad)
            h, _, saved = layer.forward(e, w, block.spec, asked, for_backward=keep)
            ctx.save_for_backward(e, *weights, *saved)
            return h

        @staticmethod
        def backward(ctx, grad_h):
            e, *tensors = ctx.saved_tensors
            w = dict(zip(names, tensors, strict=False))
            grad_e, grads = layer.backward(grad_h, e, w, block.spec, asked, tensors[len(names) :])
            return grad_e, *grads

    weights = block.weights()
    return lambda: Streamed.apply(e, *[weights[name] for name in names])


def attention_call(case: Attention, runner: str, qkv: list[Tensor]) -> Callable[[], Tensor]:
    if runner == "flex":
        compiled = torch.compile(flex(case.seq_len))
        return lambda: compiled(*qkv)
    if runner == "triton":
        return lambda: attention(*qkv, causal=True, backend="triton")
    return lambda: {"sdpa": sdpa(), "flash": flash}[runner](*qkv)


def measure(case: Block | Attention, runner: str, direction: str) -> tuple[list[float], int | None]:
    """Times in ms, and the bytes that a forward leaves allocated for its backward (None without one)."""
    torch.manual_seed(0)
    new = dict(device="cuda", dtype=torch.bfloat16)
    if isinstance(case, Block):
        block = LoopedBlock(BlockSpec(**case.options), **new)
        e = torch.randn(case.batch, case.seq_len, case.d_model, **new).requires_grad_()
        call, inputs = block_call(case, runner, e, block), [e, *block.parameters()]
    else:
        shape = (case.batch, case.n_heads, case.seq_len, case.head_dim)
        inputs = [torch.randn(shape, **new).requires_grad_() for _ in range(3)]
        call = attention_call(case, runner, inputs)
    with torch.no_grad():
        grad = torch.randn_like(call())

    def step() -> None:
        if direction == "forward":
            with torch.no_grad():
                call()
        else:
            torch.autograd.grad(call(), inputs, grad)

    stream = torch.cuda.Stream()  # a graph is captured after warm-up on a side stream
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    kept = _kept(call) if direction == "both" else None
    if runner == "graphed":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return times(graph.replay), kept
    return times(step), kept


def _kept(call: Callable[[], Tensor]) -> int:
    before = torch.cuda.memory_allocated()
    out = call()
    return torch.cuda.memory_allocated() - before - out.nbytes


def times(step: Callable[[], object], seconds: float = SECONDS_A_RUNNER) -> list[float]:
    """Times of calls in ms."""
    found: list[float] = []
    start = time.monotonic()
    while len(found) < ROUNDS[0] or (len(found) < ROUNDS[1] and time.monotonic() - start < seconds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return found


def floor_ms(case: Block | Attention, direction: str) -> float | None:
    """Time of the matmul FLOPs alone at the ceiling; the backward has twice the forward's."""
    ceiling = CEILING_TFLOPS.get(torch.cuda.get_device_name())
    return None if ceiling is None else case.flops * (3 if direction == "both" else 1) / ceiling / 1e9


def main() -> None:
    case = CASES[sys.argv[1]]
    for direction in DIRECTIONS:
        for runner in runners(case):
            line = dict(case=case.name, runner=runner, direction=direction, error=None)
            try:
                line["times_ms"], line["kept_bytes"] = measure(case, runner, direction)
            except Exception as error:  # one runner's failure is a line in the table, not the end of the case
                line["times_ms"], line["kept_bytes"] = [], None
                line["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            print(json.dumps(line | {"floor_ms": floor_ms(case, direction)}), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
