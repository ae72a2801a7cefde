"""The functions people call: check the arguments, choose a backend, run it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from typing_extensions import Unpack  # comes with torch

from shift_kernels import dispatch, reference
from shift_kernels.autograd import EagerLoopedBlock, build_of
from shift_kernels.backends import ATTENTION, LOOPED_BLOCK
from shift_kernels.backends.base import ExtendsCache
from shift_kernels.backends.torch import TORCH
from shift_kernels.cache import check_step
from shift_kernels.calibrate import at_first_use
from shift_kernels.call import (
    AttentionProblem,
    CallKeywords,
    CallOptions,
    Problem,
    differentiable,
    named_again,
)
from shift_kernels.call_checks import check_attention, check_call, check_initial_state
from shift_kernels.errors import input_error, refuses_unknown_keywords
from shift_kernels.layouts import Packed, rolled
from shift_kernels.spec import BlockSpec
from shift_kernels.torch_internals import (
    exports_to_onnx,
    is_exporting,
    must_be_observed,
    transforms_are_active,
    without_negations,
)

_FUNCTION, _ATTENTION = "shift_kernels.looped_block", "shift_kernels.attention"


@refuses_unknown_keywords(_FUNCTION, CallKeywords)
def looped_block(
    e: Tensor,
    weights: Mapping[str, Tensor],
    spec: BlockSpec,
    n_loops: int | Tensor,
    **keywords: Unpack[CallKeywords],
) -> Tensor | tuple[Tensor, Tensor]:
    """Apply one block ``n_loops`` times with the same weights.

    Args:
        e: input embeddings, float [batch, seq_len, d_model]; or [total, d_model] with ``cu_seqlens``.
        weights: name -> tensor, names and shapes of :meth:`BlockSpec.weight_shapes`.
        spec: what the block is.
        n_loops: T >= 0; an int tensor [] or [batch] gives T at run time, one per sample. 0 returns h_0.

    Keyword Args:
        seq_lens: int [batch]: sample b's tokens end before position ``seq_lens[b]``. Pads may hold anything,
            NaN included: they reach no result and no gradient, and return 0.
        left_pad: int [batch]: the first ``left_pad[b]`` positions are pads, as tokenizers pad for generation.
            Rotary positions count from the first real token: the result is that of the sequence alone.
        cu_seqlens: int [batch + 1], offsets of sequences packed one behind the other, instead of padding.
        h0: the initial state, as e in shape and dtype, with a gradient of its own; default: e with injection
            "none", otherwise 0. Four more loops from h_4 are eight loops. With injection "none" e is not
            read then, and its gradient is 0.
        position_offset: int [batch], added to rotary positions. Rotary attention sees differences of
            positions alone, so that this changes something beside a cache only.
        residual_scale: factor on every branch in this call instead of the block's: a float > 0, or a float
            tensor [] or [batch], one per sample, without gradient.
        return_all_loops: return h_1 .. h_T, [T, ...]; a sample that is done repeats its last state.
        n_grad_loops: back-propagate only through each sample's last k loops; None: through all.
        halt_threshold: inference only; a sample stops once its relative RMS change in a loop is below it.
        cache: keys and values of earlier tokens, which e's tokens see, and to which they are appended; the
            result is theirs. Inference only, and every call with the same ``n_loops``.
        backend: ``auto`` (the default), or a name from :func:`backends`; a named one never falls back.

    Returns:
        h_T (or all h_t), dtype of e. With ``halt_threshold``: a pair of that and the loops used, [batch].
        Under autocast matmul operands have autocast's dtype; the residual stream keeps e's.

    Raises:
        ShiftInputError: an argument is not usable, or the named backend does not serve this call.

    Source: the looped transformer h_t = f(h_{t-1} [+ e]) of arXiv 2409.15647, section 4, and 2510.10089.
    """
    packed = None
    if (cu_seqlens := keywords.pop("cu_seqlens", None)) is not None:
        packed, e, keywords = _unpacked(e, cu_seqlens, keywords)
    n_loops, checked = check_call(_FUNCTION, e, weights, spec, n_loops, keywords)
    backend, left_pad = checked.pop("backend", "auto"), checked.pop("left_pad", None)
    if left_pad is not None:
        e, checked = _moved_left(e, left_pad, checked)
    compute_dtype = e.dtype
    autocast = e.device.type != "meta" and torch.is_autocast_enabled(e.device.type)
    if autocast and e.dtype != torch.float64:
        compute_dtype = torch.get_autocast_dtype(e.device.type)
    cache = checked.pop("cache", None)
    options = CallOptions(n_loops, compute_dtype, **checked)  # type: ignore[misc]
    step = None
    if cache is not None:
        step = check_step(_FUNCTION, cache, e.shape, e.device, spec, n_loops, options.seq_lens)
    ordered = {name: weights[name] for name in spec.weight_shapes()}
    inputs = differentiable(e, ordered, options)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    problem = Problem(
        spec,
        e.shape[0],
        e.shape[1],
        e.dtype,
        compute_dtype,
        e.device,
        grad,
        halting=options.halt_threshold is not None,
        n_loops=options.known_loops(),
        cache_dtype=None if step is None else step.cache.dtype,
        options=options.names(),
    )
    if step is not None:
        _refuse_with_cache(problem, options.n_grad_loops)
    if exports_to_onnx():
        backend = _for_onnx(backend)
    if isinstance(backend, str) and backend == "auto" and not torch.compiler.is_compiling():
        at_first_use(problem)  # what is no name at all is refused by the plan
    chosen = dispatch.plan_and_warn(problem, backend)
    exported = chosen.backend == "torch" and is_exporting()
    if chosen.backend != "torch" and not torch.compiler.is_compiling():
        _refuse_transforms(chosen.backend, inputs)
    with torch.autocast(e.device.type, enabled=False) if autocast else contextlib.nullcontext():
        if step is not None:
            h = cast(ExtendsCache, LOOPED_BLOCK.get(chosen.backend)).extend(e, ordered, spec, options, step)
            step.commit(n_loops)
        elif exported:  # operator by operator, so that others can run it
            h, used = reference.looped_block(e, ordered, spec, **options.keywords())
        elif torch.compiler.is_compiling() or (chosen.backend != "torch" and must_be_observed(inputs)):
            h, used = _as_operator(e, ordered, spec, options, grad, chosen.backend)
        elif chosen.backend == "torch":
            h, used = TORCH.looped_block(e, ordered, spec, options)
        elif grad:
            inputs = without_negations(inputs)
            plain = options if options.h0 is None else dataclasses.replace(options, h0=None)
            h, used = EagerLoopedBlock.apply(LOOPED_BLOCK.get(chosen.backend), spec, plain, *inputs)
        else:
            if (plain_inputs := without_negations(inputs)) is not inputs:
                e, ordered, options = named_again(plain_inputs, spec, options)
            h, used, _ = LOOPED_BLOCK.get(chosen.backend).forward(
                e, ordered, spec, options, for_backward=False
            )
    if packed is not None:
        h = packed.packed(h)
    if left_pad is not None:
        h = rolled(h, -left_pad)
    return h if options.halt_threshold is None else (h, used)


def _unpacked(e: Tensor, cu_seqlens: Tensor, keywords: CallKeywords) -> tuple[Packed, Tensor, CallKeywords]:
    """Packed sequences as a padded batch."""
    for name in ("seq_lens", "left_pad"):
        if keywords.get(name) is not None:
            raise input_error(
                _FUNCTION, name, "given", "None together with cu_seqlens", "Lengths follow from it."
            )
    packed = Packed.of(_FUNCTION, e, cu_seqlens)
    padded: CallKeywords = {**keywords, "seq_lens": packed.lengths}
    if (h0 := keywords.get("h0")) is not None:
        check_initial_state(_FUNCTION, h0, e)
        padded["h0"] = packed.padded(h0)
    return packed, packed.padded(e), padded


def _moved_left(e: Tensor, left_pad: Tensor, checked: CallKeywords) -> tuple[Tensor, CallKeywords]:
    """A left-padded batch as a right-padded one."""
    lengths = checked.get("seq_lens")
    lengths = (e.shape[1] if lengths is None else lengths.to(left_pad.device)) - left_pad
    moved: CallKeywords = {**checked, "seq_lens": lengths.clamp(min=0)}
    if (h0 := checked.get("h0")) is not None:
        moved["h0"] = rolled(h0, left_pad)
    return rolled(e, left_pad), moved


def _refuse_with_cache(problem: Problem, n_grad_loops: int | None) -> None:
    """Refuse what has no meaning for tokens that are appended to a cache."""
    given = {
        "gradients": problem.grad,
        "halt_threshold": problem.halting,
        "n_grad_loops": n_grad_loops is not None,
    }
    if wrong := [name for name, is_given in given.items() if is_given]:
        raise input_error(
            _FUNCTION,
            "cache",
            f"given together with {' and '.join(wrong)}",
            "inference through all loops of a fixed number",
            "Wrap the call in torch.no_grad(), and leave these out.",
        )


def _for_onnx(backend: str) -> str:
    """The only backend that ONNX can express."""
    if backend not in ("auto", "torch"):
        allowed = "'torch' (or 'auto', which takes it) where a model is exported to ONNX"
        raise input_error(_FUNCTION, "backend", backend, allowed, "A kernel is no operator of ONNX.")
    return "torch"


def _refuse_transforms(backend: str, inputs: tuple[Tensor, ...]) -> None:
    """Kernels know reverse mode alone: a tangent would be lost without a word."""
    if transforms_are_active(inputs):
        raise input_error(
            _FUNCTION,
            "backend",
            backend,
            "'torch' under torch.func and in forward-mode differentiation",
            "Call looped_block(..., backend='torch').",
        )


def _as_operator(
    e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """One opaque call in the graph: how torch.compile sees a looped block."""
    n_loops, per_sample = options.n_loops, isinstance(options.n_loops, Tensor)
    scale = options.residual_scale
    if isinstance(scale, float):  # [], a number
        scale = torch.tensor(scale, dtype=torch.float64, device="cpu")
    h, used, _ = torch.ops.shift_kernels.looped_block(
        e,
        list(weights.values()),
        spec.key,
        0 if per_sample else n_loops,
        n_loops if per_sample else None,
        options.seq_lens,
        options.h0,
        scale,
        options.position_offset,
        options.return_all_loops,
        options.n_grad_loops,
        options.halt_threshold,
        options.compute_dtype,
        grad,
        build_of(backend),
    )
    return h, used


@refuses_unknown_keywords(_ATTENTION)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    seq_lens: Tensor | None = None,
    k_seq_lens: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, for any head_dim, ragged lengths and grouped heads.

    Queries and keys may differ in number, as in decoding and across sequences: positions are aligned to the
    end, a sample's last query being at the position of its last key. Queries that see no key return 0.

    Args:
        q: [batch, n_heads, seq_len, head_dim].
        k, v: [batch, n_kv_heads, k_len, head_dim]; n_kv_heads divides n_heads.
        causal: position i sees positions <= i.
        seq_lens: int [batch], queries of a sample (and its keys, where k_len = seq_len and k_seq_lens is not
            given); pads may hold anything and return 0. A sample of length 0 is all pads.
        k_seq_lens: int [batch], keys of a sample.
        window: position i sees positions j with i - j < window (not causal: |i - j| < window).
        softcap: scores s become softcap * tanh(s / softcap), before the mask.
        scale: instead of 1 / sqrt(head_dim).
        backend: ``auto``, or a name; :func:`shift_kernels.explain_attention` says which serves this, and why.

    Returns:
        [batch, n_heads, seq_len, head_dim], dtype of q.

    Raises:
        ShiftInputError: shapes, dtypes or lengths that do not fit together.
    """
    seq_lens, own = check_attention(
        _ATTENTION, q, k, v, causal, seq_lens, k_seq_lens, window=window, softcap=softcap, scale=scale
    )
    batch, n_heads, seq_len, head_dim = q.shape
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    traced = torch.compiler.is_compiling() or transforms_are_active((q, k, v)) or must_be_observed((q, k, v))
    problem = AttentionProblem(
        batch, n_heads, k.shape[1], seq_len, head_dim, q.dtype, q.device, grad, k.shape[2], tuple(own), traced
    )
    chosen = dispatch.plan_attention(problem, backend)
    return ATTENTION.get(chosen.backend).attention(q, k, v, causal=causal, seq_lens=seq_lens, **own)
