"""Loop the encoder of your own model: a PyTorch encoder layer out, a looped block with its weights in.

    python examples/own_model.py

The model sorts out which of two sequences of digits has the larger sum. Its nn.TransformerEncoderLayer is
replaced by a LoopedBlock: with one loop nothing changes, with more the same weights are applied again.
"""

import torch
from torch import Tensor, nn

from shift_kernels import LoopedBlock, explain

torch.manual_seed(0)


class Classifier(nn.Module):
    """Digits [batch, seq_len] -> logits [batch, 2]: is the first half's sum the larger one?"""

    def __init__(self, d_model: int = 32, seq_len: int = 8) -> None:
        super().__init__()
        self.digits = nn.Embedding(10, d_model)
        self.positions = nn.Parameter(0.1 * torch.randn(seq_len, d_model))
        self.encoder = nn.TransformerEncoderLayer(
            d_model, nhead=4, dim_feedforward=64, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(d_model, 2)

    def forward(self, x: Tensor, **options: int) -> Tensor:
        h = self.encoder(self.digits(x) + self.positions, **options)
        return self.head(h.mean(1))


def batch(size: int = 64) -> tuple[Tensor, Tensor]:
    x = torch.randint(10, (size, 8))
    return x, (x[:, :4].sum(1) > x[:, 4:].sum(1)).long()


model = Classifier()
x, _ = batch()
with torch.no_grad():
    before = model(x)
    model.encoder = LoopedBlock.from_torch(model.encoder, causal=False)
    after = model(x, n_loops=1)
print(f"one loop: outputs differ by {float((before - after).abs().max()):.1e}")
print(explain(model.encoder.spec, *x.shape))

optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(150):
    n_loops = 1 if step < 50 else 3  # the same weights; nothing is rebuilt
    x, larger = batch()
    loss = nn.functional.cross_entropy(model(x, n_loops=n_loops), larger)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

x, larger = batch(512)
right = (model(x, n_loops=3).argmax(1) == larger).float().mean()
print(f"after {step + 1} steps: {float(right):.0%} right")
