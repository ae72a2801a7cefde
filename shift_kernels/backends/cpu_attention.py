"""The ``cpu`` backend of :func:`shift_kernels.attention`: one C++ call (csrc/cpu/attention_batch.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shift_kernels import reference
from shift_kernels.backends import cpu
from shift_kernels.backends.base import Kind, WhyNot
from shift_kernels.call import AttentionProblem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of q, k and v; all is computed in float32."""


class CpuAttention:
    """Attention in blocks with an online softmax; see the top of this file."""

    name = "cpu"

    def why_not(self, problem: AttentionProblem | None) -> WhyNot | None:
        """Absent without the library; of foreign tensors, dtypes and tracers."""
        missing = cpu.CPU.why_not(None)
        if missing is not None or problem is None:
            return missing
        if problem.device.type != "cpu":
            return WhyNot(Kind.FOREIGN, f"is for CPU tensors, not {problem.device.type}")
        if problem.dtype not in DTYPES:
            return WhyNot(Kind.FOREIGN, f"is for float32 and half precision, not {problem.dtype}")
        if problem.traced:
            return WhyNot(Kind.FOREIGN, "is for eager calls on plain tensors")
        return None

    def describe(self, problem: AttentionProblem) -> str:
        """In a phrase."""
        return "one C++ call, in blocks with an online softmax, in float32"

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """As :func:`shift_kernels.attention`, whose checks came before."""
        return _Attention.apply(options, *(x.resolve_neg() for x in (q, k, v)))


class _Attention(torch.autograd.Function):
    """``apply(options, q, k, v)``; options as the keywords of :func:`reference.attention`."""

    @staticmethod
    def forward(ctx: Any, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call, keep = _call(q, k, v, options)
        o = torch.zeros(q.shape, dtype=torch.float32, device="cpu")  # pads are never written
        kept = torch.empty((*q.shape[:3], 2), dtype=torch.float32, device="cpu")
        call.o, call.kept = o.data_ptr(), kept.data_ptr()
        cpu._NATIVE.attention(call, backward=False)
        del keep
        ctx.options = options
        ctx.save_for_backward(q, k, v, o, kept)
        return o.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: of scores in memory, any number of times
            wanted = [x for x in (q, k, v) if x.requires_grad]
            h = reference.attention(q, k, v, **ctx.options)
            grads = iter(torch.autograd.grad(h, wanted, grad, create_graph=True))
            return None, *(next(grads) if x.requires_grad else None for x in (q, k, v))
        call, keep = _call(q, k, v, ctx.options)
        d_o = grad.resolve_neg().to(torch.float32).contiguous()
        found = [torch.zeros(x.shape, dtype=torch.float32, device="cpu") for x in (q, k, v)]
        call.o, call.kept, call.d_o = o.data_ptr(), kept.data_ptr(), d_o.data_ptr()
        call.dq, call.dk, call.dv = (x.data_ptr() for x in found)
        cpu._NATIVE.attention(call, backward=True)
        del keep
        return None, *(x.to(q.dtype) for x in found)


def _call(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Any, tuple[Tensor, ...]]:
    """What both directions share, and what must live as long as it."""
    seq_lens, k_seq_lens = options.get("seq_lens"), options.get("k_seq_lens")
    if k_seq_lens is None and q.shape[2] == k.shape[2]:
        k_seq_lens = seq_lens
    batch, n_heads, q_len, head_dim = q.shape
    q_lens, k_lens = (
        torch.full((batch,), most, dtype=torch.int64, device="cpu") if lens is None else lens
        for most, lens in ((q_len, seq_lens), (k.shape[2], k_seq_lens))
    )
    q, k, v = (x.to(torch.float32).contiguous() for x in (q, k, v))
    scale = options.get("scale")
    call = cpu._NATIVE.AttentionCall(
        batch=batch,
        n_heads=n_heads,
        n_kv_heads=k.shape[1],
        q_len=q_len,
        k_len=k.shape[2],
        head_dim=head_dim,
        n_threads=torch.get_num_threads(),
        causal=options["causal"],
        window=options.get("window") or 0,
        scale=head_dim**-0.5 if scale is None else scale,
        softcap=options.get("softcap") or 0.0,
        q_lens=q_lens.data_ptr(),
        k_lens=k_lens.data_ptr(),
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
    )
    return call, (q, k, v, q_lens, k_lens)


CPU_ATTENTION = CpuAttention()
