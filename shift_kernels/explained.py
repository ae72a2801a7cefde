"""Which backend would run a call, and why, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shift_kernels import measured
from shift_kernels.backends import ATTENTION, LOOPED_BLOCK
from shift_kernels.cache import LoopedCache, check_step
from shift_kernels.call import OWN_ATTENTION_OPTIONS, AttentionProblem, Problem
from shift_kernels.checks import check_bool, check_choice, check_device, check_dtype, check_int
from shift_kernels.dispatch import Plan, plan, plan_attention
from shift_kernels.errors import input_error, refuses_unknown_keywords, type_error
from shift_kernels.spec import MAX_LOOPS, MAX_TOKENS, BlockSpec


@refuses_unknown_keywords("shift_kernels.explain")
def explain(
    spec: BlockSpec,
    batch: int,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    grad: bool = True,
    n_loops: int = 1,
    backend: str = "auto",
    cache: LoopedCache | None = None,
) -> str:
    """Say in words which backend would run this looped block, why, and what it keeps for the backward.

    Args:
        spec: the block.
        batch, seq_len: shape of e, [batch, seq_len, d_model].
        dtype: dtype of e.
        device: where e would live; it need not exist on this machine.
        grad: whether a backward pass follows.
        n_loops: T, for the memory figures and the measured table.
        backend: as for ``looped_block``.
        cache: that the tokens would be appended to; its bytes are told, and nothing is allocated.

    Raises:
        ShiftInputError: no such block can be called, or the named backend does not serve it.
    """
    function = "shift_kernels.explain"
    if not isinstance(spec, BlockSpec):
        raise type_error(function, "spec", type(spec).__name__, "a BlockSpec", "Build one: BlockSpec(...).")
    batch = check_int(function, "batch", batch, 1, MAX_TOKENS)
    seq_len = check_int(function, "seq_len", seq_len, 1, MAX_TOKENS)
    n_loops = check_int(function, "n_loops", n_loops, 0, MAX_LOOPS)
    check_dtype(function, "dtype", dtype)
    place = check_device(function, "device", device)
    check_bool(function, "grad", grad)
    if cache is not None:
        check_step(function, cache, (batch, seq_len), place, spec, n_loops, None)
    grad = grad and cache is None
    cache_dtype = None if cache is None else cache.dtype
    problem = Problem(
        spec, batch, seq_len, dtype, dtype, place, grad, n_loops=n_loops, cache_dtype=cache_dtype
    )
    chosen = plan(problem, backend)
    running = LOOPED_BLOCK.get(chosen.backend)
    lines = [
        f"looped_block [{batch}, {seq_len}, {spec.d_model}] {str(dtype).removeprefix('torch.')} on {device}, "
        f"{n_loops} loop{'s' if n_loops != 1 else ''}, {'with' if grad else 'without'} gradients",
        *_choice_lines(chosen, running.describe(problem)),
    ]
    if grad:
        mib = n_loops * running.saved_bytes(problem) / 2**20
        lines.insert(3, f"  backward  keeps about {mib:.1f} MiB ({n_loops} x {mib / max(n_loops, 1):.2f})")
    if cache is not None:
        lines.append(f"  cache     {cache.describe()}")
    row = (measured.lookup(problem) if cache is None else None) or {}
    lines += [f"  measured  {name}: {verdict}" for name, verdict in row.items()]
    return "\n".join(lines)


@refuses_unknown_keywords("shift_kernels.explain_attention")
def explain_attention(
    batch: int,
    n_heads: int,
    seq_len: int,
    head_dim: int,
    *,
    n_kv_heads: int | None = None,
    k_len: int | None = None,
    options: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    grad: bool = True,
    backend: str = "auto",
) -> str:
    """Say in words which backend would run :func:`shift_kernels.attention`, and why.

    Args:
        batch, n_heads, seq_len, head_dim: shape of q.
        n_kv_heads: heads of k and v; default ``n_heads``.
        k_len: length of k and v; default ``seq_len``.
        options: names of the keywords that the call gives, of ``k_seq_lens``, ``window``, ``softcap`` and
            ``scale``.
        dtype, device: of q, k and v; the device need not exist on this machine.
        grad: whether a backward pass follows.
        backend: as for ``attention``.

    Raises:
        ShiftInputError: no such attention can be called, or the named backend does not serve it.
    """
    function = "shift_kernels.explain_attention"
    shape = dict(batch=batch, n_heads=n_heads, seq_len=seq_len, head_dim=head_dim)
    shape |= {"n_kv_heads": n_heads if n_kv_heads is None else n_kv_heads}
    shape |= {"k_len": seq_len if k_len is None else k_len}
    for name in options:
        check_choice(function, "options", name, OWN_ATTENTION_OPTIONS)
    sizes: dict[str, Any]
    sizes = {name: check_int(function, name, size, 1, MAX_TOKENS) for name, size in shape.items()}
    if sizes["n_heads"] % sizes["n_kv_heads"]:
        raise input_error(
            function, "n_kv_heads", n_kv_heads, f"a divisor of n_heads = {n_heads}", "Change either."
        )
    check_dtype(function, "dtype", dtype)
    check_bool(function, "grad", grad)
    place = check_device(function, "device", device)
    problem = AttentionProblem(**sizes, dtype=dtype, device=place, grad=grad, options=tuple(options))
    chosen = plan_attention(problem, backend)
    how = ATTENTION.get(chosen.backend).describe(problem)
    shown = f"{str(dtype).removeprefix('torch.')} on {device}"
    keys = "" if problem.k_len == seq_len else f" over {k_len} keys"
    head = f"attention [{batch}, {n_heads}, {seq_len}, {head_dim}]{keys} {shown}"
    return "\n".join([head, *_choice_lines(chosen, how)])


def _choice_lines(chosen: Plan, how: str) -> list[str]:
    lines = [f"  runs on   {chosen.backend}: {chosen.why}", f"  how       {how}"]
    return lines + [f"  not       {name}: {no.words}" for name, no in chosen.refused]
