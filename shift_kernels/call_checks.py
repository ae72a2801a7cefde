"""Which calls make sense: shapes, dtypes and values that fit together, before any kernel runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shift_kernels.call import CallKeywords
from shift_kernels.checks import (
    check_bool,
    check_floating,
    check_int,
    check_offsets,
    check_positive,
    is_floating,
    refuse_mapped,
)
from shift_kernels.errors import input_error, near_miss, type_error
from shift_kernels.spec import MAX_LOOPS, MAX_TOKENS, BlockSpec
from shift_kernels.torch_internals import has_no_values, is_exporting


def check_call(
    function: str,
    e: Tensor,
    weights: Mapping[str, Tensor],
    spec: BlockSpec,
    n_loops: int | Tensor,
    given: CallKeywords,
) -> tuple[int | Tensor, CallKeywords]:
    """Refuse a call of the looped block that makes no sense, before any kernel runs.

    Values inside tensors are checked where they lie in host memory; on an accelerator that would cost a
    synchronisation, so kernels clamp them instead (lengths to [0, seq_len], loops to >= 0).

    Returns:
        n_loops and the keywords as backends take them. Tensors of numbers a sample are copies, int64 [batch]:
        what the caller does to theirs after this cannot reach the call or its backward.
    """
    if not isinstance(spec, BlockSpec):
        raise type_error(function, "spec", type(spec).__name__, "a BlockSpec", "Build one: BlockSpec(...).")
    check_floating(function, "e", e)
    if e.ndim != 3 or e.shape[2] != spec.d_model:
        raise input_error(
            function,
            "e",
            list(e.shape),
            f"a tensor of shape [batch, seq_len, {spec.d_model}]",
            "The last dimension is d_model of the spec.",
        )
    if e.shape[0] < 1 or e.shape[1] < 1:
        raise input_error(
            function, "e", list(e.shape), "batch >= 1 and seq_len >= 1", "Skip empty batches before the call."
        )
    _check_weights(function, weights, spec, e.device)
    found = given.copy()
    check_bool(function, "return_all_loops", given.get("return_all_loops", False))
    n_loops = _check_loops(function, n_loops, e)
    largest = {"seq_lens": e.shape[1], "left_pad": e.shape[1], "position_offset": MAX_TOKENS}
    for name, high in largest.items():
        if (x := given.get(name)) is not None:
            found[name] = own_per_sample(function, name, x, e, 0, high)  # type: ignore[literal-required, arg-type]
    _check_pads(function, found.get("seq_lens"), found.get("left_pad"))
    if (h0 := given.get("h0")) is not None:
        check_initial_state(function, h0, e)
    if (scale := given.get("residual_scale")) is not None:
        found["residual_scale"] = _check_scale(function, scale, e)
    if (n_grad_loops := given.get("n_grad_loops")) is not None:
        n_grad_loops = check_int(function, "n_grad_loops", n_grad_loops, 1, None, "None or an int >= 1")
        found["n_grad_loops"] = min(n_grad_loops, MAX_LOOPS)
    if (halt_threshold := given.get("halt_threshold")) is not None:
        tensors = (e, *weights.values()) if h0 is None else (e, h0, *weights.values())
        _check_halting(function, tensors, halt_threshold)
    return n_loops, found


def check_attention(
    function: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    seq_lens: Tensor | None,
    k_seq_lens: Tensor | None,
    *,
    window: int | None,
    softcap: float | None,
    scale: float | None,
) -> tuple[Tensor | None, dict[str, Any]]:
    """Refuse a call of attention that makes no sense, before any kernel runs.

    Returns:
        seq_lens, and the options after it that are given, as backends take them.
    """
    _check_heads(function, q, k, v)
    check_bool(function, "causal", causal)
    own: dict[str, Any] = {}
    if seq_lens is not None:
        seq_lens = own_per_sample(function, "seq_lens", seq_lens, q, 0, q.shape[2])
    if k_seq_lens is not None:
        own["k_seq_lens"] = own_per_sample(function, "k_seq_lens", k_seq_lens, q, 0, k.shape[2])
    if window is not None:
        own["window"] = check_int(function, "window", window, 1, MAX_TOKENS)
    if softcap is not None:
        own["softcap"] = check_positive(function, "softcap", softcap, "None or a finite float > 0")
    if scale is not None:
        own["scale"] = check_positive(function, "scale", scale, "None or a finite float > 0")
    return seq_lens, own


def _check_heads(function: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(function, name, x)
        if x.ndim != 4 or 0 in x.shape:
            raise input_error(
                function,
                name,
                list(x.shape),
                "[batch, heads, seq_len, head_dim], none of them 0",
                "Reshape it.",
            )
        if x.dtype != q.dtype:
            raise type_error(function, name, x.dtype, f"q's dtype {q.dtype}", "Cast one of them.")
        if x.device != q.device:
            raise input_error(function, name, f"on {x.device}", f"q's device {q.device}", "Move one of them.")
    if k.shape != v.shape:
        raise input_error(function, "v", list(v.shape), f"k's shape {list(k.shape)}", "Project both alike.")
    batch, n_heads, _, head_dim = q.shape
    if (k.shape[0], k.shape[3]) != (batch, head_dim):
        raise input_error(
            function,
            "k",
            list(k.shape),
            f"[{batch}, n_kv_heads, k_len, {head_dim}], as q",
            "Match q's shape.",
        )
    if n_heads % k.shape[1]:
        raise input_error(
            function,
            "k",
            list(k.shape),
            f"a number of heads that divides q's {n_heads}",
            "Change n_kv_heads.",
        )


def check_initial_state(function: str, h0: Tensor, e: Tensor) -> None:
    """Refuse an h0 that is not of e's shape, dtype and device."""
    check_floating(function, "h0", h0)
    if h0.dtype != e.dtype:
        raise type_error(function, "h0", h0.dtype, f"e's dtype {e.dtype}", "Cast it: h0.to(e.dtype).")
    if h0.shape != e.shape:
        raise input_error(
            function, "h0", list(h0.shape), f"e's shape {list(e.shape)}", "Give a state a token."
        )
    if h0.device != e.device:
        raise input_error(function, "h0", f"on {h0.device}", f"the device of e ({e.device})", "Move it.")


def _check_scale(function: str, scale: float | Tensor, e: Tensor) -> float | Tensor:
    """A number as it is; a tensor as a copy, float64 [batch]."""
    if not isinstance(scale, Tensor):
        return check_positive(function, "residual_scale", scale, "a finite float > 0, or a tensor of such")
    check_floating(function, "residual_scale", scale)
    refuse_mapped(function, "residual_scale", scale)
    if scale.requires_grad and torch.is_grad_enabled():
        raise input_error(
            function, "residual_scale", "a tensor that requires a gradient", "a constant",
            "Detach it; a factor to be learned belongs into the weights.",
        )  # fmt: skip
    if tuple(scale.shape) not in ((), (len(e),)):
        allowed = f"shape [] or [{len(e)}], one per sample"
        raise input_error(function, "residual_scale", list(scale.shape), allowed, "One entry a sample.")
    if scale.device.type != "cpu" and scale.device != e.device:
        allowed = f"the CPU or the device of e ({e.device})"
        raise input_error(function, "residual_scale", f"on {scale.device}", allowed, "Move it.")
    if torch.compiler.is_compiling():
        return _traced_copy(scale.expand(len(e)), torch.float64)
    scale = scale.detach().expand(len(e)).to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    if scale.device.type == "cpu" and not has_no_values(scale):
        smallest, largest = map(float, scale.aminmax())
        if not 0 < smallest <= largest < math.inf:
            allowed = "finite numbers > 0"
            raise input_error(
                function, "residual_scale", scale.tolist(), allowed, "Check how it was computed."
            )
    return scale


def _check_halting(function: str, tensors: tuple[Tensor, ...], halt_threshold: float) -> None:
    check_positive(function, "halt_threshold", halt_threshold, "None or a finite float > 0")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise input_error(
            function,
            "halt_threshold",
            halt_threshold,
            "None while gradients are recorded (halting is for inference)",
            "Wrap the call in torch.no_grad().",
        )


def _check_weights(
    function: str, weights: Mapping[str, Tensor], spec: BlockSpec, device: torch.device
) -> None:
    if not isinstance(weights, Mapping):
        raise type_error(
            function,
            "weights",
            type(weights).__name__,
            "a dict of tensors",
            "Pass dict(block.named_parameters()).",
        )
    shapes = spec.weight_shapes()
    if weights.keys() != shapes.keys():
        missing, unknown = [n for n in shapes if n not in weights], [n for n in weights if n not in shapes]
        given, remedy = f"without {missing}", "See BlockSpec.weight_shapes()."
        if not missing:
            given, remedy = (
                f"with {unknown}",
                near_miss(unknown[0], shapes, "Remove what the spec does not have."),
            )
        raise input_error(function, "weights", given, f"exactly the keys {list(shapes)}", remedy)
    for name, shape in shapes.items():
        w = weights[name]
        if is_floating(w) and w.shape == shape and w.device == device:
            continue  # without making the words for it: every call comes here
        check_floating(function, f"weights[{name!r}]", w)
        if tuple(w.shape) != shape:
            raise input_error(
                function,
                f"weights[{name!r}]",
                list(w.shape),
                f"shape {list(shape)}",
                "It follows from the spec.",
            )
        if w.device != device:
            raise input_error(
                function,
                f"weights[{name!r}]",
                f"on {w.device}",
                f"the device of e ({device})",
                "Move one of them.",
            )


def _check_loops(function: str, n_loops: int | Tensor, e: Tensor) -> int | Tensor:
    if isinstance(n_loops, Tensor):
        if n_loops.is_meta:
            raise input_error(function, "n_loops", "on meta", "loops whose number is known", "Pass an int.")
        if n_loops.ndim == 0:
            n_loops = n_loops.expand(e.shape[0])
        return own_per_sample(function, "n_loops", n_loops, e, 0, MAX_LOOPS)
    allowed = f"an int from 0 to {MAX_LOOPS}, or an int tensor of shape [] or [batch]"
    return check_int(function, "n_loops", n_loops, 0, MAX_LOOPS, allowed)


def own_per_sample(function: str, name: str, x: Tensor, e: Tensor, low: int, high: int) -> Tensor:
    """A copy of one int per sample, int64 [batch], on the same device: copied once, then checked."""
    batch = e.shape[0]
    if not isinstance(x, Tensor):
        raise type_error(
            function, name, type(x).__name__, f"an int tensor of shape [{batch}]", "Use torch.tensor(...)."
        )
    check_offsets(function, name, x)
    if tuple(x.shape) != (batch,):
        raise input_error(
            function, name, list(x.shape), f"shape [{batch}], one per sample", "One entry a sample."
        )
    if x.device.type != "cpu" and x.device != e.device:
        raise input_error(
            function, name, f"on {x.device}", f"the CPU or the device of e ({e.device})", "Move it."
        )
    if torch.compiler.is_compiling():
        return _traced_copy(x, torch.int64)
    x = x.detach().to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    if x.device.type == "cpu" and not has_no_values(x):
        smallest, largest = map(int, x.aminmax())
        if smallest < low or largest > high:
            bad = smallest if smallest < low else largest
            raise input_error(
                function, name, bad, f"values from {low} to {high}", "Check how it was computed."
            )
    return x


def _check_pads(function: str, seq_lens: Tensor | None, left_pad: Tensor | None) -> None:
    """Refuse pads on the left that go on behind a sample's end, where the host sees both."""
    if seq_lens is None or left_pad is None or torch.compiler.is_compiling():
        return
    if any(x.device.type != "cpu" or has_no_values(x) for x in (seq_lens, left_pad)):
        return
    if wrong := (left_pad > seq_lens).nonzero().flatten().tolist():
        b = wrong[0]
        raise input_error(
            function,
            "left_pad",
            f"{int(left_pad[b])} of sample {b}",
            f"at most its seq_lens, {int(seq_lens[b])}",
            "Both count from the left: seq_lens is where the last token ends.",
        )


def _traced_copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in a graph; a graph that is exported has operators of torch alone, and its inputs to itself."""
    if is_exporting():
        return x.detach().to(dtype)
    return torch.ops.shift_kernels.own_copy(x, dtype)
