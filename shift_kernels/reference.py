"""What a looped block means, in plain PyTorch: every other backend is tested against this file.

    h_0 = h0 where it is given, else e without an injection, else 0
    for t = 1 .. T:  u = inject(h_{t-1}, e);  u = layers(u);  h_t = loop_norm(u) or u

Works in any floating dtype up to float64 and is differentiable any number of times. Nothing is fused;
autograd keeps every activation of every loop (about 68 d_model numbers a token and loop).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shift_kernels.call import CallOptions, differentiable
from shift_kernels.halting import has_settled
from shift_kernels.rotary import rotary_table, rotate
from shift_kernels.spec import GATED, BlockSpec


class Mask(NamedTuple):
    """Which query may see which key."""

    allowed: Tensor
    """bool [batch or 1, 1, seq_len, seq_len]."""
    otherwise: Tensor
    """The score of all other pairs, [] or [batch, 1, seq_len, 1]: -inf, but 0 for a query that may see none,
    whose row would be NaN; it is a pad, so what it holds reaches nothing."""


Heads = Callable[[int, int, Tensor, Tensor, Tensor], Tensor]
"""(loop from 1, layer, q, k, v) -> o: how heads attend, q and o [batch, n_heads, seq_len, head_dim]."""


def looped_block(
    e: Tensor,
    weights: Mapping[str, Tensor],
    spec: BlockSpec,
    n_loops: int | Tensor,
    *,
    heads: Heads | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Apply the block ``n_loops`` times. Arguments are trusted: ``shift_kernels.looped_block`` checks them.

    Args:
        e: input embeddings [batch, seq_len, d_model]; the residual stream keeps this dtype.
        weights: see :meth:`BlockSpec.weight_shapes`; those of linear maps are cast to ``compute_dtype``, all
            others to e's dtype.
        n_loops: T, or an int tensor [batch] with one T per sample.
        heads: how heads attend; default :func:`explicit_heads`.
        options: fields of :class:`CallOptions`; ``compute_dtype`` is e's where it is left out.

    Returns:
        h_T (or all h_t) and the loops used, int64 [batch].
    """
    call = CallOptions(n_loops, **{"compute_dtype": e.dtype, **options})
    inputs, seq_len, max_loops = differentiable(e, weights, call), e.shape[1], call.max_loops()
    valid, h0 = None, call.h0
    if call.seq_lens is not None:
        valid = torch.arange(seq_len, device=e.device) < call.seq_lens.to(e.device)[:, None]
        e = _zero_where_not(valid[..., None], e)
        h0 = None if h0 is None else _zero_where_not(valid[..., None], h0)
    w = _cast(weights, spec, e.dtype, call.compute_dtype)
    if heads is None:
        heads = explicit_heads(spec, attention_mask(seq_len, spec.causal, valid, e.device, spec.window))
    rotary = None
    if spec.position == "rope":
        rotary = rotary_table(seq_len, spec, e.device, call.position_offset)
    scale = call.branch_scale(spec)
    if isinstance(scale, Tensor):
        scale = _column(scale.to(e.device))
    if h0 is None:
        h0 = e if spec.injection == "none" else torch.zeros_like(e)

    def next_state(t: int, h: Tensor, active: Tensor | None) -> Tensor:
        u = inject(h, e, w, spec)
        if active is not None:  # a finished sample's next state may overflow, and spoil the weights' gradient
            u = _zero_where_not(_column(active), u)
        return loop_body(u, w, spec, scale, rotary, functools.partial(heads, t))

    h, used = _repeat(next_state, h0, call, max_loops, valid)
    if valid is not None:
        h = _zero_where_not(valid[..., None], h)
    if max_loops < 1 or call.n_grad_loops is not None or (call.h0 is not None and spec.injection == "none"):
        # What h does not depend on has a gradient all the same, zeros. And what is done to h never changes e.
        h = h + torch.cat([x.flatten()[:0] for x in inputs]).sum()
    return h, used


def _repeat(
    next_state: Callable[[int, Tensor, Tensor | None], Tensor],
    h: Tensor,
    call: CallOptions,
    max_loops: int,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """h_T of the initial state h (or all h_t), and the loops used.

    Args:
        next_state: (t, h_{t-1}, active) -> h_t; active: which samples still run, [batch], None where all do.
        max_loops: the largest T.
        valid: which positions are no pads, bool [batch, seq_len]; None: all.
    """
    batch, device, n_grad_loops = h.shape[0], h.device, call.n_grad_loops
    own_loops, threshold = call.sample_loops(device), call.halt_threshold
    per_sample = own_loops is not None
    may_stop_early = per_sample or threshold is not None
    # A number is filled in on the device: a copy from the host could be in no CUDA graph.
    loops = torch.full((batch,), max_loops, device=device) if own_loops is None else own_loops.expand(batch)
    min_loops = int(loops.min()) if per_sample else max_loops
    running = torch.ones(batch, dtype=torch.bool, device=device)
    used = torch.zeros(batch, dtype=torch.int64, device=device)
    history = []
    for t in range(1, max_loops + 1):
        active = running & (t <= loops) if may_stop_early else None
        carries_grad = n_grad_loops is None or t > min_loops - n_grad_loops
        with torch.set_grad_enabled(torch.is_grad_enabled() and carries_grad):
            u = next_state(t, h, active)
        if n_grad_loops is not None and carries_grad and per_sample:
            u = torch.where(_column(t > loops - n_grad_loops), u, u.detach())
        if active is None:
            used += 1
        else:
            used += active
            if threshold is not None:
                running = active & ~has_settled(u, h, threshold, valid)
            u = torch.where(_column(active), u, h)
        h = u
        if call.return_all_loops:
            history.append(h)
        if threshold is not None and not running.any():
            history += [h] * (max_loops - t if call.return_all_loops else 0)
            break
    if call.return_all_loops:
        h = torch.stack(history) if history else h.new_empty(0, *h.shape)
    return h, used


def inject(h: Tensor, e: Tensor, w: Mapping[str, Tensor], spec: BlockSpec) -> Tensor:
    """What a loop's layers read: the state with the input, as ``injection`` says."""
    if spec.injection == "add":
        return h + e
    if spec.injection == "concat":
        return _linear(torch.cat([h, e], dim=-1), w, "injection.weight", "injection.bias").to(h.dtype)
    if spec.injection == "diagonal":
        return torch.sigmoid(-w["injection.decay"]) * h + w["injection.gain"] * e
    if spec.injection == "norm_add":
        return norm(h, w, spec, "injection.norm") + w["injection.alpha"] * e
    return h


def loop_body(
    x: Tensor,
    w: Mapping[str, Tensor],
    spec: BlockSpec,
    scale: float | Tensor,
    rotary: Tensor | None,
    heads: Callable[[int, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """One application of the block: ``n_layers`` layers, then the loop's own norm if it has one.

    Args:
        scale: of the branches; a number, or [batch, 1, 1].
        heads: as of :func:`looped_block`, from the layer on.
    """
    for i in range(spec.n_layers):
        p = f"layers.{i}."
        attention_branch = functools.partial(
            self_attention,
            w=w,
            spec=spec,
            prefix=p + "self_attn.",
            rotary=rotary,
            heads=functools.partial(heads, i),
        )
        x = residual(x, attention_branch, w, spec, scale, p + "norm1")
        if spec.d_ff:
            x = residual(x, functools.partial(mlp, w=w, spec=spec, prefix=p), w, spec, scale, p + "norm2")
    return norm(x, w, spec, "loop_norm") if spec.loop_norm else x


def residual(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    w: Mapping[str, Tensor],
    spec: BlockSpec,
    scale: float | Tensor,
    norm_name: str,
) -> Tensor:
    """``x + scale * branch(x)``, with the norms where ``norm_placement`` puts them."""
    y = branch(x if spec.norm_placement == "post" else norm(x, w, spec, norm_name))
    if spec.norm_placement == "sandwich":
        y = norm(y, w, spec, norm_name + "_post")
    x = x + (y if isinstance(scale, float) and scale == 1 else (scale * y).to(x.dtype))
    if spec.norm_placement == "post":
        return norm(x, w, spec, norm_name)
    return norm(x, w, spec, norm_name + "_post") if spec.norm_placement == "sandwich_post" else x


def norm(x: Tensor, w: Mapping[str, Tensor], spec: BlockSpec, name: str) -> Tensor:
    """Over the last dimension, with the weights of this name as ``norm_weight`` says."""
    gain, shift = w.get(f"{name}.weight"), w.get(f"{name}.bias")
    if gain is not None and spec.norm_weight == "one_plus":
        gain = 1 + gain
    if spec.norm == "layernorm":
        return F.layer_norm(x, x.shape[-1:], gain, shift, spec.norm_eps)
    return F.rms_norm(x, x.shape[-1:], gain, spec.norm_eps) if spec.norm == "rmsnorm" else x


def self_attention(
    x: Tensor,
    w: Mapping[str, Tensor],
    spec: BlockSpec,
    prefix: str,
    rotary: Tensor | None,
    heads: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Project to heads, let them attend, project back. x: [batch, seq_len, d_model]."""
    qkv = _linear(x, w, prefix + "in_proj_weight", prefix + "in_proj_bias")
    q, k, v = (
        part.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)
        for part in qkv.split(
            [spec.n_heads * spec.head_dim] + 2 * [spec.n_kv_heads * spec.head_dim],
            dim=-1,
        )
    )
    if spec.qk_norm:
        q = norm(q.to(x.dtype), w, spec, prefix + "q_norm").to(q.dtype)
        k = norm(k.to(x.dtype), w, spec, prefix + "k_norm").to(k.dtype)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    o = heads(q, k, v).transpose(1, 2).flatten(-2)
    return _linear(o, w, prefix + "out_proj.weight", prefix + "out_proj.bias").to(x.dtype)


def explicit_heads(spec: BlockSpec, mask: Mask | None) -> Heads:
    """Heads with their scores in memory."""

    def heads(loop: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask, spec.score_scale, spec.softcap)

    return heads


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
    heads: Callable[[Tensor, Tensor, Tensor, Callable[[], Mask | None]], Tensor] | None = None,
) -> Tensor:
    """Attention over padded batches; q [batch, n_heads, q_len, head_dim], k and v may have fewer heads.

    Positions are aligned to the end: a sample's last query is at the position of its last key. Queries that
    see no key return 0, as pads do.

    Args:
        seq_lens, k_seq_lens: [batch], queries and keys of a sample; None: all. Where there are as many keys
            as queries, ``seq_lens`` alone speaks of both.
        window, softcap, scale: as ``window``, ``softcap`` and ``attn_scale`` of :class:`BlockSpec`.
        heads: (q, k, v, mask, when it is called) -> o; default :func:`attend`.
    """
    q_len, k_len, device = q.shape[2], k.shape[2], q.device
    if k_seq_lens is None and q_len == k_len:
        k_seq_lens = seq_lens
    n_queries, n_keys = (
        torch.as_tensor(most if lens is None else lens, device=device).reshape(-1, 1)
        for most, lens in ((q_len, seq_lens), (k_len, k_seq_lens))
    )
    query, key = torch.arange(q_len, device=device), torch.arange(k_len, device=device)
    position = query + n_keys - n_queries  # [batch or 1, q_len]
    ahead = 0 if causal else k_len + q_len if window is None else window - 1
    sees = (query < n_queries) & (n_keys > 0) & (position + ahead >= 0)
    q = _zero_where_not((query < n_queries)[:, None, :, None], q)
    k, v = (_zero_where_not((key < n_keys)[:, None, :, None], x) for x in (k, v))

    def mask() -> Mask | None:
        if not causal and window is None and k_seq_lens is None:
            return None
        allowed = in_reach(position[..., None] - key, causal, window) & (key < n_keys)[:, None, :]
        allowed = allowed[:, None]
        otherwise = torch.full((), -torch.inf, device=device)
        return Mask(allowed, torch.where(allowed.any(-1, keepdim=True), otherwise, 0))

    o = heads(q, k, v, mask) if heads else attend(q, k, v, mask(), scale, softcap)
    return _zero_where_not(sees[:, None, :, None], o)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the allowed pairs.

    A masked pair has weight 0 whatever its score is. Half precision is computed in float32, as PyTorch's own
    attention does: scores and their gradients leave float16's range long before q, k and v do.

    Args:
        scale: default 1 / sqrt(head_dim).
        softcap: scores s become ``softcap * tanh(s / softcap)``, before the mask.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = torch.where(mask.allowed, scores, mask.otherwise.to(scores.dtype))
    return (torch.softmax(scores, dim=-1) @ v).to(dtype)


def attention_mask(
    seq_len: int, causal: bool, valid: Tensor | None, device: torch.device, window: int | None = None
) -> Mask | None:
    """Of right-padded samples; None where every query may see every key.

    Args:
        valid: which positions are no pads, bool [batch, seq_len]; None: all.
        window: as in :class:`BlockSpec`.
    """
    if not causal and valid is None and window is None:
        return None
    position = torch.arange(seq_len, device=device)
    allowed = in_reach(position[:, None] - position, causal, window)[None, None]
    otherwise = torch.full((), -torch.inf, device=device)
    if valid is not None:
        allowed = allowed & valid[:, None, None, :]
        otherwise = torch.where(allowed.any(-1, keepdim=True), otherwise, 0)
    return Mask(allowed, otherwise)


def in_reach(distance: Tensor, causal: bool, window: int | None) -> Tensor:
    """Whether a query may see a key that is ``distance`` positions before it."""
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance.abs() < window)


def mlp(x: Tensor, w: Mapping[str, Tensor], spec: BlockSpec, prefix: str) -> Tensor:
    """linear -> activation -> linear; with a gate the first map's rows are the gate, then the values."""
    y = activate(_linear(x, w, prefix + "linear1.weight", prefix + "linear1.bias"), spec.activation)
    return _linear(y, w, prefix + "linear2.weight", prefix + "linear2.bias").to(x.dtype)


def activate(y: Tensor, activation: str) -> Tensor:
    """The activation of linear1's result; gated ones halve its width."""
    if activation in GATED:
        gate, up = y.chunk(2, dim=-1)
        return (F.silu(gate) if activation == "swiglu" else F.gelu(gate, approximate="tanh")) * up
    if activation == "relu":
        return F.relu(y)
    if activation == "relu2":
        return F.relu(y).square()
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def _linear(x: Tensor, w: Mapping[str, Tensor], weight: str, bias: str) -> Tensor:
    return F.linear(x.to(w[weight].dtype), w[weight], w.get(bias))


def _cast(
    weights: Mapping[str, Tensor], spec: BlockSpec, state: torch.dtype, compute: torch.dtype
) -> dict[str, Tensor]:
    """Linear maps in the compute dtype, the rest in the residual stream's: once, not once a loop."""
    linear = spec.linear_weights()
    return {name: w.to(compute if name in linear else state) for name, w in weights.items()}


def _zero_where_not(keep: Tensor, x: Tensor) -> Tensor:
    # where, not multiplication: a NaN in a pad must reach neither the result nor the gradient.
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))


def _column(per_sample: Tensor) -> Tensor:
    return per_sample[:, None, None]
