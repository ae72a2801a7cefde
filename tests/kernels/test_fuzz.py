"""Any block, call, memory layout, dtype and way of using autograd: "auto" means the same as plain PyTorch.

``make test`` tries a few of each, always the same; ``make fuzz`` thousands, other ones each time. What fails
is shrunk, kept in .hypothesis/ to be tried first from then on, and printed with a line that makes it again.
"""

import contextlib
import dataclasses
import os
from typing import Any

import pytest
import torch
from any_problem import problems
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shift_kernels import BlockSpec, looped_block
from shift_kernels.backends.cpu import CPU

FUZZ = int(os.environ.get("SHIFT_FUZZ", 0))
"""Blocks to try; 0: the few of ``make test``."""

F64 = torch.float64
SLACK = {F64: 1e-9, torch.float32: 2e-4, torch.float16: 0.03, torch.bfloat16: 0.2}
"""Error allowed beyond twice that of plain PyTorch, as a part of the result: rounding is magnified by
softmax, norms and relu's kink, but an option that is not obeyed changes results by their own size."""


def rows_apart(x: Tensor) -> Tensor:
    """Every second row of a tensor that is NaN elsewhere."""
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-2).flatten(-3, -2)[..., ::2, :]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


def offset(x: Tensor) -> Tensor:
    flat = x.flatten()
    return torch.cat([torch.full_like(flat[:3], torch.nan), flat])[3:].view(x.shape)


def of_conjugate(x: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16:  # has no complex numbers
        return negative(x)
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def negative(x: Tensor) -> Tensor:
    return torch._neg_view(-x)


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: transposed(x) if x.ndim > 1 else x,
    "channels last": lambda x: channels_last(x) if x.ndim > 2 else x,
    "rows apart": lambda x: rows_apart(x) if x.ndim > 1 else x,
    "offset": lambda x: offset(x) if x.numel() > 3 else x,
    "negative bit": negative,
    "conjugate": of_conjugate,
    # The same for all: :class:`Case` draws such values for it.
    "expanded": lambda x: x[:1].expand(x.shape),
}

MODES = (
    *("plain", "no_grad", "inference_mode", "checkpoint", "old checkpoint", "saved-tensor hooks"),
    *("retained graph", "used twice", "accumulated", "halting"),
)


@dataclasses.dataclass
class Case:
    """A call and how it is made."""

    spec: BlockSpec
    call: dict[str, Any]
    batch: int
    seq_len: int
    seed: int
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    packed: bool = False
    state: bool = False
    layout: str = "contiguous"
    weights_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    numbers: torch.dtype = torch.int64
    frozen: tuple[bool, ...] = ()
    threads: int = 1

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        lens, left = self.call["seq_lens"], self.call.get("left_pad")
        self.packed = self.packed and lens is not None and left is None
        self.pads = torch.zeros(self.batch, self.seq_len, dtype=torch.bool)
        if lens is not None:
            self.pads |= torch.arange(self.seq_len) >= lens[:, None]
        if left is not None:
            self.pads |= torch.arange(self.seq_len) < left[:, None]
        e, h0 = torch.randn(2, self.batch, self.seq_len, self.spec.d_model)
        if self.packed:
            e, h0 = e[~self.pads], h0[~self.pads]
        if self.layout == "expanded" and len(e):
            e = e[:1].expand(e.shape)
        # Without norms larger weights make scores so large that the softmax magnifies rounding at random.
        std = 0.1 if self.spec.norm == "none" else 0.3
        shapes = self.spec.weight_shapes().items()
        weights = [std * torch.randn(shape) + ("norm" in name) for name, shape in shapes]
        inputs = (e, *weights, *([h0] if self.state else []))
        self.values = [x.to(self.dtype).to(F64) for x in inputs]

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """e, the weights and h0 if there is one, those that are not frozen with gradients."""
        frozen = (*self.frozen, *[False] * len(self.values))
        found = [x.to(dtype).clone() for x in self.values]
        if not self.packed and dtype == self.dtype and self.layout != "expanded":
            found[0][self.pads] = torch.nan
            if self.state:
                found[-1][self.pads] = torch.nan
        return [x.requires_grad_(not f) for x, f in zip(found, frozen, strict=False)]

    def apply(self, leaves: list[Tensor], backend: str, exact: bool, **options: Any) -> Any:
        """What the call returns, of leaves in the case's layouts."""
        e, *weights = leaves
        h0 = weights.pop() if self.state else None
        if len(e) and (not exact or self.layout == "expanded"):  # which sums gradients
            e = LAYOUTS[self.layout](e)
        if not exact:
            weights = [LAYOUTS[self.weights_layout](w) for w in weights]
            if self.weights_layout == "expanded":
                weights = leaves[1 : 1 + len(weights)]
            if h0 is not None and len(h0) and self.layout != "expanded":
                h0 = LAYOUTS[self.layout](h0)
        call = {
            k: v.to(self.numbers) if isinstance(v, Tensor) and not v.is_floating_point() else v
            for k, v in self.call.items()
        }
        if self.packed:
            lens = call.pop("seq_lens")
            call["cu_seqlens"] = torch.nn.functional.pad(lens.cumsum(0, dtype=self.numbers), (1, 0))
        named = dict(zip(self.spec.weight_shapes(), weights, strict=True))
        call["h0"] = h0
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast and not exact):
            return looped_block(e, named, self.spec, backend=backend, **call, **options)

    def cotangent(self, h: Tensor, exact: bool, seed: int = 1) -> Tensor:
        g = torch.randn(h.shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype).to(h.dtype)
        if self.grad_layout == "expanded" and len(g):
            g = g[:1].expand(g.shape)
        elif not exact and g.numel() and g.ndim > 1:
            g = LAYOUTS[self.grad_layout](g)
        if not exact and not self.packed and self.pads.any() and self.grad_layout == "contiguous":
            g = g.masked_fill(self.pads[..., None], torch.nan)
        return g


@st.composite
def cases(draw, mode):
    options, call, batch, seq_len, seed = draw(problems(served=CPU.served.block))
    options |= {
        "norm_eps": draw(st.sampled_from([1e-5, 1e-2])),
        "rope_theta": draw(st.sampled_from([1e4, 50.0])),
    }
    call |= {"n_grad_loops": draw(st.sampled_from([None, None, 1, 2, 2**63]))}
    if draw(st.integers(0, 3)) == 0:
        ends = [seq_len] * batch if call["seq_lens"] is None else call["seq_lens"].tolist()
        call["left_pad"] = torch.tensor([draw(st.integers(0, end)) for end in ends])
    if draw(st.integers(0, 3)) == 0:
        scales = torch.tensor([draw(st.sampled_from([0.25, 0.5, 1.0, 1.5])) for _ in range(batch)])
        call["residual_scale"] = draw(st.sampled_from([0.3, scales]))
    if draw(st.booleans()):
        call["n_loops"] = draw(st.sampled_from([0, 1, 4, torch.tensor(2)]))
    dtype, autocast = draw(
        st.sampled_from(
            [(torch.float32, False)] * 3
            + [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False), (F64, False)]
        )
    )
    if mode == "halting":
        dtype, autocast = torch.float32, False
    layouts = st.sampled_from(list(LAYOUTS))
    return Case(
        BlockSpec(**options), call, batch, seq_len, seed, dtype, autocast, draw(st.booleans()),
        draw(st.booleans()),
        draw(layouts), draw(layouts), draw(layouts), draw(st.sampled_from([torch.int64, torch.int32])),
        tuple(draw(st.lists(st.booleans(), max_size=30))), draw(st.integers(1, 3)),
    )  # fmt: skip


def run(case: Case, mode: str, backend: str, exact: bool = False) -> list[Tensor]:
    """h and the gradients of what is not frozen, used as ``mode`` says; ``exact``: in float64, plainly."""
    leaves = case.leaves(F64 if exact else case.dtype)
    wanted = [x for x in leaves if x.requires_grad]

    def f(*leaves: Tensor) -> Tensor:
        return case.apply(list(leaves), backend, exact)

    if mode in ("no_grad", "inference_mode") or not wanted:
        with torch.inference_mode() if mode == "inference_mode" else torch.no_grad():
            return [f(*leaves)]
    with saved_elsewhere() if mode == "saved-tensor hooks" and not exact else contextlib.nullcontext():
        if "checkpoint" in mode and not exact:
            h = checkpoint(f, *leaves, use_reentrant=mode == "old checkpoint")
        else:
            h = f(*leaves)
    if mode == "used twice":
        first = h if not case.call["return_all_loops"] else h[-1] if len(h) else leaves[0]
        h = f(first, *leaves[1:])
    cotangent = case.cotangent(h, exact)
    if mode in ("accumulated", "old checkpoint"):
        h.backward(cotangent)
        if mode == "accumulated":
            again = f(*leaves)
            again.backward(case.cotangent(again, exact, seed=2))
        return [h.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in wanted)]
    for _ in range(2 if mode == "retained graph" else 1):
        grads = torch.autograd.grad(
            h, wanted, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    return [h.detach(), *grads]


def saved_elsewhere() -> torch.autograd.graph.saved_tensors_hooks:
    """What autograd saves is copied, as by those who move it to another device and back."""

    def copied(x: Tensor) -> Tensor:
        return x.detach().clone(memory_format=torch.contiguous_format)

    return torch.autograd.graph.saved_tensors_hooks(copied, copied)


def check(case: Case, mode: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        truth = run(case, mode, "torch", exact=True)
        assume(all(not x.numel() or x.abs().max() < 1e4 for x in truth))  # float16 holds it, too
        plain, ours = run(case, mode, "torch"), run(case, mode, "auto")
    finally:
        torch.set_num_threads(before)
    most = max(float(torch.linalg.vector_norm(x)) for x in truth[1:] or truth)
    slack = SLACK[torch.bfloat16 if case.autocast else case.dtype]
    names = ["h", *(f"gradient {i}" for i in range(1, len(truth)))]
    for name, a, b, c in zip(names, ours, plain, truth, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        size = torch.linalg.vector_norm
        room = slack * (float(size(c)) + 0.05 * (most if name != "h" else 0.0))
        assert size(b - c) <= 10 * room + 1e-9, f"{name}: plain PyTorch is {float(size(b - c)):.2e} off"
        error, allowed = float(size(a - c)), 2 * float(size(b - c)) + room + 1e-9
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def check_halting(case: Case) -> None:
    """Samples stop after the same loops; the threshold lies where no rounding decides."""
    leaves = case.leaves(F64)
    case.call |= {"n_grad_loops": None, "return_all_loops": False}
    with torch.no_grad():
        _, never = case.apply(leaves, "torch", True, halt_threshold=1e-300)
        plain = {}
        for threshold in (0.03, 0.3, 1.0, 3.0):
            low, high = (
                case.apply(leaves, "torch", True, halt_threshold=threshold * x)[1] for x in (0.99, 1.01)
            )
            if torch.equal(low, high):
                plain[threshold] = low
        leaves = case.leaves(case.dtype)
        for threshold, expected in plain.items():
            for backend in ("torch", "auto"):
                h, used = case.apply(leaves, backend, False, halt_threshold=threshold)
                assert torch.equal(used, expected), (backend, threshold)
                assert (used <= never).all()
                truth, _ = case.apply(case.leaves(F64), "torch", True, halt_threshold=threshold)
                torch.testing.assert_close(h.double(), truth, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.filterwarnings(
    "ignore:shift_kernels.looped_block. slow path"
)  # which Triton's interpreter is not
@pytest.mark.parametrize("mode", MODES)
def test_auto_means_the_same_as_plain_pytorch(mode):
    @settings(
        max_examples=FUZZ // len(MODES) if FUZZ else 4,
        deadline=None,
        derandomize=not FUZZ,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(mode))
    def every_case(case):
        check_halting(case) if mode == "halting" else check(case, mode)

    every_case()
