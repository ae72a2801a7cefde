"""The optimiser of a run: what decays, and the learning rate of each step."""

from __future__ import annotations

import math

from torch import nn

from shift.config import OptimiserConfig
from shift.run.flat import FlatAdamW

WSD_DECAY = 0.2
"""Share of all steps that warm-up-stable-decay spends decaying."""


def build_optimizer(model: nn.Module, config: OptimiserConfig) -> FlatAdamW:
    """AdamW of a model on its device; norms, biases and embeddings are not decayed."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p for p in parameters if p.ndim < 2 or id(p) in embeddings]
    decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return FlatAdamW(groups, lr=config.lr, betas=config.betas)


def learning_rate(config: OptimiserConfig, step: int, total_steps: int) -> float:
    """The rate of step ``step`` (0-based): linear warm-up, then ``config.lr_schedule``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "cosine":
        done = (step - config.warmup) / (total_steps - config.warmup)
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    if config.lr_schedule == "wsd":
        return config.lr * min(1.0, (total_steps - step) / (WSD_DECAY * total_steps))
    return config.lr
