"""A tiny recursive model (TRM, arXiv 2510.04871) that solves 4 x 4 Sudokus: two states, one looped block.

    python examples/trm.py

A latent state z and an answer y take turns: n times z = net(x + y + z), then y = net(y + z). With
``injection="add"`` a LoopedBlock computes net(h + e) again and again, so that the n inner steps are one call
that begins at z (``h0``). The model is supervised after every round, goes on from where it was, and learns
when it may stop.
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
torch.manual_seed(0)


class TRM(nn.Module):
    """Cells [batch, 16], 0 where empty -> logits of the digits and of having solved it."""

    def __init__(self) -> None:
        super().__init__()
        spec = BlockSpec(
            D_MODEL, N_HEADS, n_layers=2, d_ff=D_FF, activation="swiglu", norm="rmsnorm",
            norm_placement="post", bias=False, causal=False, injection="add",
        )  # fmt: skip
        self.net = LoopedBlock(spec)
        self.cells, self.places = nn.Embedding(5, D_MODEL), nn.Parameter(torch.randn(16, D_MODEL))
        self.first = nn.Parameter(torch.randn(2, D_MODEL), requires_grad=False)
        self.digits, self.solved = nn.Linear(D_MODEL, 4), nn.Linear(D_MODEL, 1)

    def embed(self, cells: Tensor) -> Tensor:
        return self.cells(cells) + self.places

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first answer and the first latent state."""
        return self.first[0].expand_as(x), self.first[1].expand_as(x)

    def recurse(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """One pass: the n inner steps on z, then one on y."""
        z = self.net(x + y, N_INNER, h0=z)
        return self.net(z, 1, h0=y), z

    def round(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """All passes of a round; gradients flow through the last one alone."""
        with torch.no_grad():
            for _ in range(N_OUTER - 1):
                y, z = self.recurse(x, y, z)
        return self.recurse(x, y, z)


def recurse_in_plain_pytorch(w: dict[str, Tensor], x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """What :meth:`TRM.recurse` computes, written down."""

    def net(h: Tensor) -> Tensor:
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

    for _ in range(N_INNER):
        z = net(x + y + z)
    return net(y + z), z


def all_grids() -> Tensor:
    """The 288 solved grids [288, 16], digits 0 .. 3."""
    rows, grids = list(itertools.permutations(range(4))), []
    for grid in itertools.product(rows, repeat=4):
        boxes = [grid[r][c : c + 2] + grid[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2)]
        if all(len(set(unit)) == 4 for unit in (*zip(*grid, strict=True), *boxes)):
            grids.append(sum(grid, ()))
    return torch.tensor(grids)


GRIDS = all_grids()[torch.randperm(288)]


def puzzles(grids: Tensor, size: int = 32) -> tuple[Tensor, Tensor]:
    """Puzzles with about half of their cells empty, and their solutions."""
    solution = grids[torch.randint(len(grids), (size,))]
    return torch.where(torch.rand(size, 16) < 0.5, 0, solution + 1), solution


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(5):
        f()
    return (time.perf_counter() - start) / 5


model = TRM()
cells, _ = puzzles(GRIDS)
with torch.no_grad():
    x = model.embed(cells)
    state, w = (x, *model.begin(x)), model.net.weights()
    ours, plain = model.recurse(*state), recurse_in_plain_pytorch(w, *state)
    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, plain, strict=True))
    print(f"{N_INNER} inner steps and one on the answer: relative difference {difference:.1e}", end="; ")
    both = (lambda: model.recurse(*state), lambda: recurse_in_plain_pytorch(w, *state))
    best = [1000 * min(times) for times in zip(*(map(seconds, both) for _ in range(4)), strict=True)]
    print(f"{best[0]:.1f} ms, in plain PyTorch {best[1]:.1f} ms")

train, held_out = GRIDS[:256], GRIDS[256:]
optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1)
for _ in range(120):
    cells, solution = puzzles(train)
    x = model.embed(cells)
    y, z = model.begin(x)
    for _ in range(N_ROUNDS):  # deep supervision: each round is a step of the optimiser
        x = model.embed(cells)
        y, z = model.round(x, y.detach(), z.detach())
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

with torch.no_grad():
    cells, solution = puzzles(held_out, 256)
    x = model.embed(cells)
    y, z = model.begin(x)
    running, rounds = torch.ones(256, dtype=torch.bool), torch.zeros(256)
    for _ in range(2 * N_ROUNDS):
        state = model.round(x, y, z)
        y, z = (torch.where(running[:, None, None], new, old) for new, old in zip(state, (y, z), strict=True))
        rounds += running
        running &= model.solved(y.mean(1))[:, 0] < 0
    right = (model.digits(y).argmax(-1) == solution).float().mean()
print(f"cells right of grids never seen: {float(right):.0%}; stopped after {rounds.mean():.1f} rounds")
