"""The streamed looped block: for shapes whose residual stream does not fit on chip.

Each layer is a few fused launches around the library's matmuls and our attention:
    y = norm(h [+ e]);  qkv = y Wqkv^T;  o = attention(rotate(qkv));  z = o Wo^T
    u = h + scale (z + bias), y = norm(u)            one pass over memory (rows.py)
    a = y W1^T;  g = act(a + bias);  z = g W2^T;     and so on to the next residual
    backward: from h_{t-1} alone, each loop is recomputed, then walked in reverse
    dW = G^T Y over the rows of many loops at once: one matmul a weight
Memory: kept for the backward is h_0 .. h_{T-1} in e's dtype. The batch is walked in chunks, all T loops of
    one before the next, so that a chunk's intermediates (about 40 d_model numbers a token) stay in L2, unless
    a chunk that small would leave multiprocessors idle. Operands of weight gradients take OPERAND_BYTES at
    most (or what one loop body needs).
Grid: that of each kernel (attention.py, rows.py).
Samples with loops of their own are sorted by them: those that are done leave the end of the chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shift_kernels.backends import weight_gradients
from shift_kernels.backends.device import refuse_in_capture
from shift_kernels.backends.triton import rows as row_kernels
from shift_kernels.backends.triton.attention import attention_backward, attention_forward, needs_exact
from shift_kernels.backends.weight_gradients import WeightGradients, in_order
from shift_kernels.backends.windows import seq_lens_on
from shift_kernels.call import CallOptions
from shift_kernels.halting import has_settled
from shift_kernels.rotary import rotary_table
from shift_kernels.spec import BlockSpec

# Intermediates of one loop body, in numbers a token and d_model: what a chunk keeps in L2.
_LIVE = 40

Alloc = Callable[[str, int, int], Tensor]


def chunk_samples(spec: BlockSpec, batch: int, seq_len: int, itemsize: int, l2_bytes: int, n_sms: int) -> int:
    """Samples in a chunk: as many as L2 holds, or all where that would not fill the device.

    A matmul of rows x d_model gives rows d_model / 128^2 tiles; below one a multiprocessor the device idles.
    At any d_model both hold only where L2 has 0.8 l2_bytes >= 40 itemsize 128^2 n_sms (bf16, 132
    multiprocessors: 173 MB): benchmarks/gpu/tune.py measures whether smaller chunks pay all the same.
    """
    per_sample = _LIVE * spec.d_model * itemsize * seq_len
    fits = int(0.8 * l2_bytes) // per_sample
    fills = -(-n_sms * 128 * 128 // (spec.d_model * seq_len))
    return fits if fills <= fits < batch else batch


def _chunk_size(spec: BlockSpec, e: Tensor, itemsize: int) -> int:
    if not e.is_cuda:
        return e.shape[0]
    device = torch.cuda.get_device_properties(e.device)
    return chunk_samples(
        spec, e.shape[0], e.shape[1], itemsize, device.L2_cache_size, device.multi_processor_count
    )


@dataclasses.dataclass
class _Tape:
    """What the backward of one loop body reads, in the order in which the forward made it."""

    u: list[Tensor] = dataclasses.field(default_factory=list)  # what each norm read
    z: list[Tensor] = dataclasses.field(default_factory=list)  # each branch's result, for sandwich norms
    attention: list[tuple[Tensor, Tensor, Tensor]] = dataclasses.field(default_factory=list)  # qkv, o, lse
    mlp: list[Tensor] = dataclasses.field(default_factory=list)  # before the activation


@dataclasses.dataclass
class Body:
    """One loop body over [rows, d_model], rows = samples x seq_len.

    Args:
        spec: the block.
        w: contiguous weights; linear ones in the compute dtype, norms in the residual stream's.
        seq_len: rows of a sample.
        compute: dtype of matmul operands.
        table: cos and sin, float32 [2, seq_len, head_dim / 2], with rotary positions.
    """

    spec: BlockSpec
    w: dict[str, Tensor]
    seq_len: int
    compute: torch.dtype
    table: Tensor | None

    def __post_init__(self) -> None:
        s = self.spec
        self.branches = [(kind, i) for i in range(s.n_layers) for kind in ("attn", "mlp")[: 1 + bool(s.d_ff)]]
        self.out_weight = [
            f"layers.{i}." + ("self_attn.out_proj" if kind == "attn" else "linear2")
            for kind, i in self.branches
        ]
        inner = [
            f"layers.{i}." + ("self_attn.in_proj_" if kind == "attn" else "linear1.")
            for kind, i in self.branches
        ]
        self.in_weight = [name + "weight" for name in inner]
        self.in_bias = [name + "bias" for name in inner]
        self.norm_name = [f"layers.{i}.norm{1 if kind == 'attn' else 2}" for kind, i in self.branches]

    def _norm(self, name: str | None) -> tuple[Tensor, Tensor | None] | None:
        if name is None or self.spec.norm == "none":
            return None
        return self.w[name + ".weight"], self.w.get(name + ".bias")

    def _add(self, x, z, bias, scale, branch_norm, norm, u, y) -> None:
        names = self._norm(branch_norm), self._norm(norm)
        row_kernels.add_norm(
            row_kernels.AddNorm(x, z, bias, *names, u, y), scale, self.spec.norm, self.spec.norm_eps
        )

    def forward(
        self, h: Tensor, e: Tensor | None, seq_lens: Tensor | None, alloc: Alloc, tape: _Tape | None = None
    ) -> Tensor:
        """h_t from h_{t-1}. ``alloc(weight, rows, width)`` gives the memory for that matmul's left operand.

        With a tape what the backward needs is noted, and what it does not need is not computed: the result
        is then of no use.
        """
        s, post = self.spec, self.spec.norm_placement == "post"
        n_rows, d = h.shape
        first_norm = None if post or s.norm == "none" else self.norm_name[0]
        y = alloc(self.in_weight[0], n_rows, d)
        u = h if e is None else torch.empty_like(h)
        self._add(h, e, None, 1.0, None, first_norm, None if e is None else u, y)
        norms_read = [] if post else [u]
        for k in range(len(self.branches)):
            last = k + 1 == len(self.branches)
            left = self._branch(k, y, seq_lens, alloc, tape)
            if tape is not None and last and s.norm_placement == "pre" and not s.loop_norm:
                break
            z = left @ self.w[self.out_weight[k] + ".weight"].t()
            if tape is not None and s.norm_placement == "sandwich":
                tape.z.append(z)
            bias = self.w.get(self.out_weight[k] + ".bias")
            after = self.norm_name[k] + "_post" if s.norm_placement == "sandwich" else None
            if post:
                norm: str | None = self.norm_name[k]
                y = torch.empty_like(h)
            elif last:
                norm = "loop_norm" if s.loop_norm else None
                y = torch.empty_like(h) if s.loop_norm else None  # type: ignore[assignment]
            else:
                norm, y = self.norm_name[k + 1], alloc(self.in_weight[k + 1], n_rows, d)
            x, u = u, torch.empty_like(h)
            self._add(x, z, bias, s.residual_scale, after, norm, u, y)
            norms_read.append(u)
            if post:  # the norm's result is the residual stream
                u = y
                if not last:
                    y = alloc(self.in_weight[k + 1], n_rows, d)
                    y.copy_(u)
        if s.loop_norm and post:
            norms_read.append(u)
            y = torch.empty_like(h)
            self._add(u, None, None, 1.0, None, "loop_norm", None, y)
        if tape is not None:
            tape.u = norms_read
        return y if s.loop_norm else u

    def _branch(self, k: int, y: Tensor, seq_lens: Tensor | None, alloc: Alloc, tape: _Tape | None) -> Tensor:
        """The left operand of branch k's last matmul: what attention or the activation gives."""
        s, w, out = self.spec, self.w, self.out_weight[k] + ".weight"
        weight, bias = w[self.in_weight[k]], w.get(self.in_bias[k])
        if self.branches[k][0] == "mlp":
            a = y @ weight.t()
            g = alloc(out, len(y), s.d_ff)
            row_kernels.activation(a, bias, s.activation, g)
            if tape is not None:
                tape.mlp.append(a)
            return g
        qkv = torch.nn.functional.linear(y, weight, bias)
        self._rotate(qkv, inverse=False)
        o = alloc(out, len(y), s.n_heads * s.head_dim)
        q, k_, v = self._heads(qkv)
        # For a backward o is kept as exact as its kernel wants it: [batch, n_heads, seq_len, head_dim].
        exact = torch.empty(q.shape, device=q.device) if tape is not None and needs_exact(q) else None
        _, lse = attention_forward(q, k_, v, s.causal, seq_lens, out=self._per_head(o), exact=exact)
        if tape is not None:
            tape.attention.append((qkv, self._per_head(o) if exact is None else exact, lse))
        return o

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.spec
        per_sample = qkv.view(-1, self.seq_len, s.n_heads + 2 * s.n_kv_heads, s.head_dim).transpose(1, 2)
        q, k, v = per_sample.split([s.n_heads, s.n_kv_heads, s.n_kv_heads], dim=1)
        return q, k, v

    def _per_head(self, o: Tensor) -> Tensor:
        return o.view(-1, self.seq_len, self.spec.n_heads, self.spec.head_dim).transpose(1, 2)

    def _rotate(self, qkv: Tensor, inverse: bool) -> None:
        if self.table is not None:
            s = self.spec
            heads = s.n_heads + s.n_kv_heads
            row_kernels.rotate(qkv, self.table, heads, s.head_dim, self.seq_len, inverse=inverse)

    def backward(self, dh: Tensor, tape: _Tape, seq_lens: Tensor | None, grads: _Gradients) -> Tensor:
        """The gradient of what the first layer read, h_{t-1} [+ e]; those of the weights go to ``grads``."""
        s, post, sandwich = (
            self.spec,
            self.spec.norm_placement == "post",
            self.spec.norm_placement == "sandwich",
        )
        u, last = tape.u, len(self.branches) - 1
        d = dh
        if s.loop_norm:
            d = torch.empty_like(dh)
            self._norm_backward("loop_norm", dh, u.pop(), grads, dx=d)
        elif not post and len(u) > len(self.branches):
            u.pop()  # the result, which no norm read
        for k in range(last, -1, -1):
            if post:
                dy, d = d, torch.empty_like(dh)
                self._norm_backward(self.norm_name[k], dy, u.pop(), grads, dx=d)
            dz = grads.right(self.out_weight[k] + ".weight", s.d_model)
            if sandwich:
                bias = self.w.get(self.out_weight[k] + ".bias")
                name, z, scale = self.norm_name[k] + "_post", tape.z.pop(), float(s.residual_scale)
                self._norm_backward(name, d, z, grads, bias=bias, dx=dz, dy_scale=scale)
            else:
                torch.mul(d, float(s.residual_scale), out=dz)
            dy = self._branch_backward(k, dz, tape, seq_lens, grads)
            above, d = d, torch.empty_like(dh)
            if post or s.norm == "none":
                torch.add(above, dy, out=d)
            else:
                self._norm_backward(self.norm_name[k], dy, u.pop(), grads, carry=above, dx=d)
        return d

    def _norm_backward(
        self, name: str, dy: Tensor, src: Tensor, grads: _Gradients, *, dx: Tensor,
        bias: Tensor | None = None, carry: Tensor | None = None, dy_scale: float = 1.0,
    ) -> None:  # fmt: skip
        gamma, beta = self.w[name + ".weight"], self.w.get(name + ".bias")
        dbeta = None if beta is None else grads.partial(name + ".bias")
        io = row_kernels.NormBackward(dy, src, bias, gamma, carry, dx, grads.partial(name + ".weight"), dbeta)
        row_kernels.norm_backward(io, self.spec.norm, self.spec.norm_eps, dy_scale)

    def _branch_backward(
        self, k: int, dz: Tensor, tape: _Tape, seq_lens: Tensor | None, grads: _Gradients
    ) -> Tensor:
        s, w, weight = self.spec, self.w, self.in_weight[k]
        dleft = dz @ w[self.out_weight[k] + ".weight"]
        dout = grads.right(weight, w[weight].shape[0])
        if self.branches[k][0] == "mlp":
            bias = w.get(self.in_bias[k])
            row_kernels.activation_backward(tape.mlp.pop(), bias, s.activation, dleft, dout)
        else:
            qkv, o, lse = tape.attention.pop()
            q, k_, v = self._heads(qkv)
            attention_backward(self._per_head(dleft), q, k_, v, o, lse, s.causal, seq_lens, self._heads(dout))
            self._rotate(dout, inverse=True)
        return dout @ w[weight]


class _Gradients:
    """Weight gradients: operands of many loop bodies side by side, then one matmul a weight.

    Args:
        body: whose weights.
        most_rows: rows of the largest loop body.
        all_rows: rows of all loop bodies together.
    """

    def __init__(self, body: Body, most_rows: int, all_rows: int) -> None:
        self.w, self.compute = body.w, body.compute
        linear = {name: w for name, w in body.w.items() if w.ndim == 2}
        row_bytes = sum(sum(w.shape) for w in linear.values()) * body.compute.itemsize
        self.capacity = min(max(most_rows, weight_gradients.OPERAND_BYTES // row_bytes), all_rows)
        device = next(iter(body.w.values())).device

        def empty(width: int) -> Tensor:
            return torch.empty(self.capacity, width, dtype=body.compute, device=device)

        self.operands = {name: (empty(w.shape[1]), empty(w.shape[0])) for name, w in linear.items()}
        self.sums = WeightGradients(bias=body.spec.bias)
        self.partials: dict[str, Tensor] = {}
        self.start = self.end = 0

    def begin(self, n_rows: int) -> None:
        """Make room for the operands of one loop body."""
        if self.end + n_rows > self.capacity:
            self.flush()
        self.start, self.end = self.end, self.end + n_rows

    def left(self, weight: str, n_rows: int, width: int) -> Tensor:
        return self.operands[weight][0][self.start : self.end]

    def right(self, weight: str, width: int) -> Tensor:
        return self.operands[weight][1][self.start : self.end]

    def partial(self, name: str) -> Tensor:
        """Sums of a norm's weight gradient, one row a program."""
        if name not in self.partials:
            w = self.w[name]
            self.partials[name] = torch.zeros(
                row_kernels.PROGRAMS, len(w), dtype=torch.float32, device=w.device
            )
        return self.partials[name]

    def flush(self) -> None:
        """Turn the operands that wait into gradients."""
        for name, (left, right) in self.operands.items():
            self.sums.add(name, right[: self.end], left[: self.end])
        self.start = self.end = 0

    def finish(self) -> dict[str, Tensor]:
        """Every gradient by name, fp32; what no loop reached is missing."""
        if self.end:
            self.flush()
        biases = {name.removesuffix("weight") + "bias": x for name, x in self.sums.biases.items()}
        norms = {name: partial.sum(0) for name, partial in self.partials.items()}
        return self.sums.weights | biases | norms


def _alloc(body: Body) -> Alloc:
    device = next(iter(body.w.values())).device
    return lambda weight, n_rows, width: torch.empty(n_rows, width, dtype=body.compute, device=device)


def _body(e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, compute: torch.dtype) -> Body:
    w = {
        name: x.detach().to(e.dtype if "norm" in name else compute).contiguous()
        for name, x in weights.items()
    }
    table = None
    if spec.position == "rope":
        table = rotary_table(e.shape[1], spec, e.device).float()
    return Body(spec, w, e.shape[1], compute, table)


def _loops(n_loops: int | Tensor, batch: int) -> list[int]:
    """T of each sample, on the host: launches are made there."""
    return [max(t, 0) for t in n_loops.tolist()] if isinstance(n_loops, Tensor) else [n_loops] * batch


def _chunks(loops: list[int], size: int, device: torch.device) -> Iterator[tuple[slice | Tensor, list[int]]]:
    """Samples by falling T, ``size`` at a time: their places in the batch and their T."""
    alike = len(set(loops)) == 1
    order = sorted(range(len(loops)), key=lambda b: -loops[b])
    for start in range(0, len(loops), size):
        chunk = order[start : start + size]
        at = slice(start, start + len(chunk)) if alike else torch.tensor(chunk, device=device)
        yield at, [loops[b] for b in chunk]


def _clean(x: Tensor, seq_lens: Tensor | None) -> Tensor:
    """Contiguous, 0 in the pads."""
    if seq_lens is not None:
        valid = torch.arange(x.shape[-2], device=x.device) < seq_lens[:, None]
        x = torch.where(valid[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    return x.contiguous()


def forward(
    e: Tensor, weights: dict[str, Tensor], spec: BlockSpec, options: CallOptions, for_backward: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """h_T (or all h_t), the loops used, and for the backward [h_0 .. h_{T-1}]; see ``torch_backend``."""
    batch, seq_len, d = e.shape
    refuse_in_capture(e, options, asks_for_loops=True)  # launches are made by the host
    e = e.detach()
    lens = seq_lens_on(e, options)
    e = _clean(e, lens)
    body = _body(e, weights, spec, options.compute_dtype)
    loops, halt_threshold = _loops(options.n_loops, batch), options.halt_threshold
    most, add = max(loops), spec.injection == "add"
    used = torch.zeros(batch, dtype=torch.int64, device=e.device)
    out = torch.empty_like(e)
    history = e.new_empty((most, *e.shape)) if options.return_all_loops else None
    # A boundary beyond a sample's own loops is never read; zeros, so that it is never garbage either.
    boundaries = e.new_zeros((most, *e.shape)) if for_backward else None
    for at, own in _chunks(loops, _chunk_size(spec, e, body.compute.itemsize), e.device):
        x = e[at]
        h = torch.zeros_like(x) if add else x.clone()
        own_lens = None if lens is None else lens[at]
        running = torch.ones(len(own), dtype=torch.bool, device=e.device)
        chunk_used = torch.zeros(len(own), dtype=torch.int64, device=e.device)
        for t in range(1, most + 1):
            n = sum(t <= T for T in own)  # the samples still at work come first
            if n and boundaries is not None:
                boundaries[t - 1][at] = h
            if n:
                before = h[:n].reshape(-1, d)
                inject = x[:n].reshape(-1, d) if add else None
                own_n = None if own_lens is None else own_lens[:n]
                after = body.forward(before, inject, own_n, _alloc(body)).view(n, seq_len, d)
                chunk_used[:n] += running[:n]
                if halt_threshold is not None:
                    after = _halt(after, h[:n], own_n, running[:n], halt_threshold)
                h[:n] = after
            if history is not None:
                history[t - 1][at] = h
        out[at], used[at] = h, chunk_used
    result = out if history is None else history
    return _clean(result, lens), used, [] if boundaries is None else [boundaries]


def _halt(after: Tensor, before: Tensor, lens: Tensor | None, running: Tensor, threshold: float) -> Tensor:
    """Samples that had halted keep their state; those that change too little halt. Updates ``running``."""
    valid = None
    if lens is not None:
        valid = torch.arange(after.shape[1], device=after.device) < lens[:, None]
    settled = has_settled(after, before, threshold, valid)
    after = torch.where(running[:, None, None], after, before)
    running &= ~settled
    return after


def backward(
    grad_h: Tensor,
    e: Tensor,
    weights: dict[str, Tensor],
    spec: BlockSpec,
    options: CallOptions,
    saved: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of e and of the weights, in the order of ``weights``, from the loop boundaries."""
    batch, seq_len, d = e.shape
    lens = seq_lens_on(e, options)
    e, grad_h = _clean(e.detach(), lens), _clean(grad_h.detach(), lens)
    body = _body(e, weights, spec, options.compute_dtype)
    loops = _loops(options.n_loops, batch)
    size, most, add = _chunk_size(spec, e, body.compute.itemsize), max(loops), spec.injection == "add"
    window = max(most, 1) if options.n_grad_loops is None else options.n_grad_loops
    grads = _Gradients(body, size * seq_len, seq_len * max(1, sum(min(t, window) for t in loops)))
    grad_e = torch.zeros_like(e)
    for at, own in _chunks(loops, size, e.device):
        x, own_lens = e[at], None if lens is None else lens[at]
        dh = torch.zeros_like(x) if options.return_all_loops else grad_h[at].clone()
        de = torch.zeros_like(x, dtype=torch.float32)
        for t in range(most, 0, -1):
            if options.return_all_loops:
                dh += grad_h[t - 1][at]
            n = sum(t <= T for T in own)
            cut = sum(t <= T - window for T in own)  # their last loops have been passed: no gradient below
            dh[:cut] = 0
            if cut == n:
                continue
            rows = (n - cut) * seq_len
            before = saved[0][t - 1][at][cut:n].reshape(rows, d)
            inject = x[cut:n].reshape(rows, d) if add else None
            own_n = None if own_lens is None else own_lens[cut:n].contiguous()
            tape = _Tape()
            grads.begin(rows)
            body.forward(before, inject, own_n, grads.left, tape)
            du = body.backward(dh[cut:n].reshape(rows, d), tape, own_n, grads).view(n - cut, seq_len, d)
            dh[cut:n] = du
            if add:
                de[cut:n] += du
        grad_e[at] = (de if add else dh).to(e.dtype)
    return _clean(grad_e, lens), in_order(grads.finish(), weights)
