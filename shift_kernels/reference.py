"""What a looped block means, in plain PyTorch: every other backend is tested against this file.

    h_0 = 0 if injection == "add" else e
    for t = 1 .. T:  u = h_{t-1} + e  (or h_{t-1});  u = layers(u);  h_t = loop_norm(u) or u

Works in any floating dtype up to float64 and is differentiable any number of times. Nothing is fused;
autograd keeps every activation of every loop (about 68 d_model numbers a token and loop).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shift_kernels.halting import has_settled
from shift_kernels.rotary import rotary_table, rotate
from shift_kernels.spec import BlockSpec


class Mask(NamedTuple):
    """Which query may see which key."""

    allowed: Tensor
    """bool [batch or 1, 1, seq_len, seq_len]."""
    otherwise: Tensor
    """The score of all other pairs, [] or [batch, 1, 1, 1]: -inf, but 0 in a sample without any tokens, whose
    rows would be NaN; they are pads, so what they hold reaches nothing."""


Attend = Callable[[int, int, Tensor, Tensor, Tensor, "Mask | None"], Tensor]
"""(loop from 1, layer, q, k, v, mask) -> o: how heads attend, q and o [batch, n_heads, seq_len, head_dim]."""


def looped_block(
    e: Tensor,
    weights: Mapping[str, Tensor],
    spec: BlockSpec,
    n_loops: int | Tensor,
    *,
    seq_lens: Tensor | None = None,
    return_all_loops: bool = False,
    n_grad_loops: int | None = None,
    halt_threshold: float | None = None,
    compute_dtype: torch.dtype | None = None,
    position_offset: Tensor | None = None,
    attend: Attend | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply the block ``n_loops`` times. Arguments are trusted: ``shift_kernels.looped_block`` checks them.

    Args:
        e: input embeddings [batch, seq_len, d_model]; the residual stream keeps this dtype.
        weights: see :meth:`BlockSpec.weight_shapes`; cast to ``compute_dtype`` (norms: to e's dtype).
        n_loops: T, or an int tensor [batch] with one T per sample.
        seq_lens: [batch]; positions at or beyond a sample's length may hold anything and return 0.
        return_all_loops: return all h_t, [T, batch, seq_len, d_model]; a finished sample repeats its last.
        n_grad_loops: only each sample's last k loops carry gradient.
        halt_threshold: a sample stops after loop t once rms(h_t - h_{t-1}) < threshold * rms(h_{t-1}).
        compute_dtype: dtype of matmul operands; default e's dtype.
        position_offset: int [batch], added to a sample's rotary positions.
        attend: how heads attend; default :func:`attend`, the scores in memory.

    Returns:
        h_T (or all h_t) and the loops used, int64 [batch].
    """
    batch, seq_len, _ = e.shape
    valid = None
    if seq_lens is not None:
        valid = torch.arange(seq_len, device=e.device) < seq_lens.to(e.device)[:, None]
        e = _zero_where_not(valid[..., None], e)
    w = _cast(weights, e.dtype, compute_dtype or e.dtype)
    mask = attention_mask(seq_len, spec.causal, valid, e.device)
    rotary = rotary_table(seq_len, spec, e.device, position_offset) if spec.position == "rope" else None

    loops = torch.as_tensor(n_loops, device=e.device).expand(batch).to(torch.int64)
    per_sample = isinstance(n_loops, Tensor)
    max_loops = int(loops.max()) if isinstance(n_loops, Tensor) else n_loops
    min_loops = int(loops.min()) if isinstance(n_loops, Tensor) else n_loops
    running = torch.ones(batch, dtype=torch.bool, device=e.device)
    used = torch.zeros(batch, dtype=torch.int64, device=e.device)
    h = torch.zeros_like(e) if spec.injection == "add" else e
    history = []
    for t in range(1, max_loops + 1):
        if per_sample or halt_threshold is not None:
            active = running & (t <= loops)
        carries_grad = n_grad_loops is None or t > min_loops - n_grad_loops
        with torch.set_grad_enabled(torch.is_grad_enabled() and carries_grad):
            u = h + e if spec.injection == "add" else h
            if per_sample:  # a finished sample's next state may overflow, and spoil the weights' gradient
                u = _zero_where_not(_column(active), u)
            u = loop_body(u, w, spec, mask, rotary, attend and functools.partial(attend, t))
        if n_grad_loops is not None and carries_grad and per_sample:
            u = torch.where(_column(t > loops - n_grad_loops), u, u.detach())
        if per_sample or halt_threshold is not None:
            used += active
            if halt_threshold is not None:
                running = active & ~has_settled(u, h, halt_threshold, valid)
            u = torch.where(_column(active), u, h)
        else:
            used += 1
        h = u
        if return_all_loops:
            history.append(h)
        if halt_threshold is not None and not running.any():
            if return_all_loops:
                history += [h] * (max_loops - t)
            break
    if return_all_loops:
        h = torch.stack(history) if history else e.new_empty(0, *e.shape)
    if valid is not None:
        h = _zero_where_not(valid[..., None], h)
    if max_loops < 1 or n_grad_loops is not None:
        # What h does not depend on has a gradient all the same, zeros. And what is done to h never changes e.
        h = h + torch.cat([x.flatten()[:0] for x in (e, *weights.values())]).sum()
    return h, used


def loop_body(
    x: Tensor,
    w: Mapping[str, Tensor],
    spec: BlockSpec,
    mask: Mask | None,
    rotary: Tensor | None,
    attend_in_layer: Callable[..., Tensor] | None = None,
) -> Tensor:
    """One application of the block: ``n_layers`` layers, then the loop's own norm if it has one.

    Args:
        attend_in_layer: ``attend`` of :func:`looped_block` from its second argument on.
    """
    for i in range(spec.n_layers):
        p = f"layers.{i}."
        heads = functools.partial(attend_in_layer, i) if attend_in_layer else attend
        x = _residual(
            x,
            lambda y, p=p, heads=heads: self_attention(y, w, spec, p + "self_attn.", mask, rotary, heads),
            w,
            spec,
            p + "norm1",
        )
        if spec.d_ff:
            x = _residual(x, lambda y, p=p: mlp(y, w, spec, p), w, spec, p + "norm2")
    return _norm(x, w, spec, "loop_norm") if spec.loop_norm else x


def _residual(x: Tensor, branch, w: Mapping[str, Tensor], spec: BlockSpec, norm_name: str) -> Tensor:
    """``x + scale * branch``, with the norm where ``norm_placement`` puts it."""
    if spec.norm_placement == "post":
        return _norm(x + spec.residual_scale * branch(x), w, spec, norm_name)
    y = branch(_norm(x, w, spec, norm_name))
    if spec.norm_placement == "sandwich":
        y = _norm(y, w, spec, norm_name + "_post")
    return x + (y if spec.residual_scale == 1 else spec.residual_scale * y)


def _norm(x: Tensor, w: Mapping[str, Tensor], spec: BlockSpec, name: str) -> Tensor:
    if spec.norm == "layernorm":
        return F.layer_norm(x, (spec.d_model,), w[f"{name}.weight"], w.get(f"{name}.bias"), spec.norm_eps)
    if spec.norm == "rmsnorm":
        return F.rms_norm(x, (spec.d_model,), w[f"{name}.weight"], spec.norm_eps)
    return x


def self_attention(
    x: Tensor,
    w: Mapping[str, Tensor],
    spec: BlockSpec,
    prefix: str,
    mask: Mask | None,
    rotary: Tensor | None,
    heads: Callable[[Tensor, Tensor, Tensor, Mask | None], Tensor],
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
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    o = heads(q, k, v, mask).transpose(1, 2).flatten(-2)
    return _linear(o, w, prefix + "out_proj.weight", prefix + "out_proj.bias").to(x.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, seq_lens: Tensor | None = None
) -> Tensor:
    """Attention over padded batches; q [batch, n_heads, seq_len, head_dim], k and v may have fewer heads."""
    valid = None
    if seq_lens is not None:
        valid = torch.arange(q.shape[2], device=q.device) < seq_lens.to(q.device)[:, None]
        q, k, v = (_zero_where_not(valid[:, None, :, None], x) for x in (q, k, v))
    o = attend(q, k, v, attention_mask(q.shape[2], causal, valid, q.device))
    return o if valid is None else _zero_where_not(valid[:, None, :, None], o)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over the allowed pairs.

    A masked pair has weight 0 whatever its score is. Half precision is computed in float32, as PyTorch's own
    attention does: scores and their gradients leave float16's range long before q, k and v do.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = torch.where(mask.allowed, scores, mask.otherwise.to(scores.dtype))
    return (torch.softmax(scores, dim=-1) @ v).to(dtype)


def attention_mask(seq_len: int, causal: bool, valid: Tensor | None, device: torch.device) -> Mask | None:
    """Of right-padded samples; None where every query may see every key.

    Args:
        valid: which positions are no pads, bool [batch, seq_len]; None: all.
    """
    if not causal and valid is None:
        return None
    allowed = torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool, device=device)
    otherwise = torch.full((), -torch.inf, device=device)
    if causal:
        allowed = allowed.tril()
    if valid is not None:
        allowed = allowed & valid[:, None, None, :]
        otherwise = torch.where(valid[:, :1, None, None], otherwise, 0)
    return Mask(allowed, otherwise)


def mlp(x: Tensor, w: Mapping[str, Tensor], spec: BlockSpec, prefix: str) -> Tensor:
    """linear -> activation -> linear; with swiglu the first map's rows are the gate, then the values."""
    y = _linear(x, w, prefix + "linear1.weight", prefix + "linear1.bias")
    if spec.activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    elif spec.activation == "relu":
        y = F.relu(y)
    elif spec.activation == "relu2":
        y = F.relu(y).square()
    else:
        y = F.gelu(y, approximate="tanh" if spec.activation == "gelu_tanh" else "none")
    return _linear(y, w, prefix + "linear2.weight", prefix + "linear2.bias").to(x.dtype)


def _linear(x: Tensor, w: Mapping[str, Tensor], weight: str, bias: str) -> Tensor:
    return F.linear(x.to(w[weight].dtype), w[weight], w.get(bias))


def _cast(weights: Mapping[str, Tensor], state: torch.dtype, compute: torch.dtype) -> dict[str, Tensor]:
    """Matmul weights in the compute dtype, norms in the residual stream's: once, not once a loop."""
    return {name: w.to(state if "norm" in name else compute) for name, w in weights.items()}


def _zero_where_not(keep: Tensor, x: Tensor) -> Tensor:
    # where, not multiplication: a NaN in a pad must reach neither the result nor the gradient.
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))


def _column(per_sample: Tensor) -> Tensor:
    return per_sample[:, None, None]
