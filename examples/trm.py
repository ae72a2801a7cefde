"""TRM and HRM, recursive models that solve 4 x 4 Sudokus: two states that take turns, in looped blocks.

    python examples/trm.py

A fast state z takes n steps, z = low(x + y + z), then a slow state y, from which the answer is read, takes
one, y = high(y + z). With ``injection="add"`` a LoopedBlock computes net(h + e) again and again, so that the
n steps are one call that begins at z (``h0``).

* HRM (arXiv 2506.21734): low and high are two blocks. Gradients pass through the last step of each alone.
* TRM (arXiv 2510.04871): they are one block. Gradients pass through all steps of the last pass.

Both are supervised after every round, go on from where they were, and learn when they may stop: here by
TRM's rule, whether the answer is right. (HRM's own is Q-learning.)
"""

import itertools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shift_kernels import BlockSpec, LoopedBlock

D_MODEL, N_HEADS, D_FF = 32, 2, 64
N_INNER, N_OUTER, N_ROUNDS = 4, 2, 2
SPEC = BlockSpec(
    D_MODEL, N_HEADS, n_layers=2, d_ff=D_FF, activation="swiglu", norm="rmsnorm",
    norm_placement="post", bias=False, causal=False, injection="add",
)  # fmt: skip
torch.manual_seed(0)


class HRM(nn.Module):
    """Cells [batch, 16], 0 where empty -> logits of the digits and of having solved it."""

    n_grad_loops: int | None = 1
    """Steps of z, in the last pass, that the gradient passes through; None: all."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = self.blocks()
        self.cells, self.places = nn.Embedding(5, D_MODEL), nn.Parameter(torch.randn(16, D_MODEL))
        self.first = nn.Parameter(torch.randn(2, D_MODEL), requires_grad=False)
        self.digits, self.solved = nn.Linear(D_MODEL, 4), nn.Linear(D_MODEL, 1)

    def blocks(self) -> tuple[LoopedBlock, LoopedBlock]:
        return LoopedBlock(SPEC), LoopedBlock(SPEC)

    def embed(self, cells: Tensor) -> Tensor:
        return self.cells(cells) + self.places

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first y and z."""
        return self.first[0].expand_as(x), self.first[1].expand_as(x)

    def recurse(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """One pass: the n steps of z, then one of y."""
        z = self.low(x + y, N_INNER, h0=z, n_grad_loops=self.n_grad_loops)
        return self.high(z, 1, h0=y), z

    def round(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """All passes of a round; gradients flow through the last one alone."""
        with torch.no_grad():
            for _ in range(N_OUTER - 1):
                y, z = self.recurse(x, y, z)
        return self.recurse(x, y, z)


class TRM(HRM):
    """The same in one block, a "tiny network", with more gradient."""

    n_grad_loops = None

    def blocks(self) -> tuple[LoopedBlock, LoopedBlock]:
        block = LoopedBlock(SPEC)
        return block, block


def recurse_in_plain_pytorch(model: HRM, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """What ``model.recurse`` computes, written down."""

    def net(w: dict[str, Tensor], h: Tensor) -> Tensor:
        for i in range(2):
            p = f"layers.{i}."
            qkv = F.linear(h, w[p + "self_attn.in_proj_weight"]).unflatten(-1, (3, N_HEADS, -1))
            q, k, v = qkv.movedim(2, 0).transpose(2, 3)
            o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            h = h + F.linear(o, w[p + "self_attn.out_proj.weight"])
            h = F.rms_norm(h, (D_MODEL,), w[p + "norm1.weight"], 1e-5)
            gate, up = F.linear(h, w[p + "linear1.weight"]).chunk(2, -1)
            h = h + F.linear(F.silu(gate) * up, w[p + "linear2.weight"])
            h = F.rms_norm(h, (D_MODEL,), w[p + "norm2.weight"], 1e-5)
        return h

    low, high = model.low.weights(), model.high.weights()
    for step in range(N_INNER):
        if N_INNER - step == model.n_grad_loops:
            z = z.detach()
        z = net(low, x + y + z)
    return net(high, y + z), z


def with_gradients(model: HRM, recurse: Callable[..., tuple[Tensor, Tensor]], x: Tensor) -> list[Tensor]:
    """Both states after a pass, and the gradients of all weights."""
    model.zero_grad()
    y, z = recurse(x, *model.begin(x))
    model.digits(y).logsumexp(-1).sum().backward()
    return [y.detach(), z.detach()] + [p.grad for p in model.parameters() if p.grad is not None]


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(5):
        f()
    return (time.perf_counter() - start) / 5


def compare(model: HRM, cells: Tensor) -> None:
    """A pass beside plain PyTorch: differences and time."""
    both = (model.recurse, lambda *state: recurse_in_plain_pytorch(model, *state))
    ours, plain = (with_gradients(model, recurse, model.embed(cells)) for recurse in both)
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, plain, strict=True))
    print(f"  a pass and its gradients: relative difference {difference:.1e}", end="; ")
    with torch.no_grad():
        state = (x := model.embed(cells), *model.begin(x))
        calls = [lambda f=f: f(*state) for f in both]
        best = [1000 * min(times) for times in zip(*(map(seconds, calls) for _ in range(4)), strict=True)]
    print(f"forward {best[0]:.1f} ms, in plain PyTorch {best[1]:.1f} ms")


def all_grids() -> Tensor:
    """The 288 solved grids [288, 16], digits 0 .. 3."""
    rows, grids = list(itertools.permutations(range(4))), []
    for grid in itertools.product(rows, repeat=4):
        boxes = [grid[r][c : c + 2] + grid[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2)]
        if all(len(set(unit)) == 4 for unit in (*zip(*grid, strict=True), *boxes)):
            grids.append(sum(grid, ()))
    return torch.tensor(grids)


def puzzles(grids: Tensor, size: int = 32) -> tuple[Tensor, Tensor]:
    """Puzzles with about half of their cells empty, and their solutions."""
    solution = grids[torch.randint(len(grids), (size,))]
    return torch.where(torch.rand(size, 16) < 0.5, 0, solution + 1), solution


def train(model: HRM, grids: Tensor) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1)
    for _ in range(80):
        cells, solution = puzzles(grids)
        y, z = model.begin(model.embed(cells))
        for _ in range(N_ROUNDS):  # deep supervision: each round is a step of the optimiser
            y, z = model.round(model.embed(cells), y.detach(), z.detach())
            logits = model.digits(y)
            right = (logits.argmax(-1) == solution).all(-1)
            halt = model.solved(y.mean(1))[:, 0]
            loss = F.cross_entropy(logits.flatten(0, 1), solution.flatten())
            loss = loss + 0.5 * F.binary_cross_entropy_with_logits(halt, right.float())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if bool((halt > 0).all()):
                break


@torch.no_grad()
def test(model: HRM, grids: Tensor) -> None:
    cells, solution = puzzles(grids, 256)
    x = model.embed(cells)
    y, z = model.begin(x)
    running, rounds = torch.ones(256, dtype=torch.bool), torch.zeros(256)
    for _ in range(2 * N_ROUNDS):
        state = model.round(x, y, z)
        y, z = (torch.where(running[:, None, None], new, old) for new, old in zip(state, (y, z), strict=True))
        rounds += running
        running &= model.solved(y.mean(1))[:, 0] < 0
    right = (model.digits(y).argmax(-1) == solution).float().mean()
    print(f"  cells right of grids never seen: {float(right):.0%}; stopped after {rounds.mean():.1f} rounds")


grids = all_grids()[torch.randperm(288)]
for kind in (HRM, TRM):
    model = kind()
    print(f"{kind.__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
    compare(model, puzzles(grids)[0])
    train(model, grids[:256])
    test(model, grids[256:])
