"""The optimiser of a run: who moves which parameter, what decays, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shift.config import DECAYED, OptimiserConfig
from shift.run.flat import FlatAdamW
from shift.run.muon import FlatMuon

WSD_DECAY = 0.2
"""Share of all steps that warm-up-stable-decay spends decaying."""


class RunOptimizer(Protocol):
    """What a run asks of its optimiser; :class:`FlatAdamW` says more."""

    param_groups: list[dict[str, Any]]

    @property
    def state(self) -> Any: ...
    @property
    def pieces(self) -> list[Tensor]: ...
    def gradient_norm(self) -> Tensor: ...
    def clip_and_step(self, norm: Tensor, clip: float, skipped: Tensor) -> None: ...
    def scale_moments(self, share: float) -> None: ...
    def zero_grad(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def kinds_of(model: nn.Module) -> dict[str, str]:
    """The kind of each parameter, a key of :data:`shift.config.DECAYED`, by its name."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}  # a block has none

    def kind(p: Tensor) -> str:
        if p.ndim < 2:
            return "vectors"
        return "embeddings" if id(p) in embeddings else "head" if id(p) in heads else "matrices"

    return {name: kind(p) for name, p in model.named_parameters() if p.requires_grad}


def parameter_groups(model: nn.Module, config: OptimiserConfig) -> list[dict[str, Any]]:
    """Groups of parameters of one learning rate and one decay; what decays by default comes first."""
    kinds, parameters = kinds_of(model), dict(model.named_parameters())
    groups: dict[tuple[Any, ...], list[Tensor]] = {}
    for name, kind in kinds.items():
        decay = config.weight_decay * config.decay_factors.get(kind, DECAYED[kind])  # type: ignore[operator]
        by_muon = config.kind == "muon" and kind == "matrices"
        key = (DECAYED[kind] == 0, decay, config.lr_factors.get(kind, 1.0), by_muon)
        groups.setdefault(key, []).append(parameters[name])
    order = sorted(groups, key=lambda key: key[0])
    return [{"params": groups[key], "weight_decay": key[1]} for key in order]


def lr_factors(model: nn.Module, config: OptimiserConfig, optimizer: RunOptimizer) -> list[float]:
    """What multiplies the learning rate of each of an optimiser's groups."""
    kinds, parameters = kinds_of(model), dict(model.named_parameters())
    factor = {id(parameters[name]): config.lr_factors.get(kind, 1.0) for name, kind in kinds.items()}
    return [factor[id(group["params"][0])] for group in optimizer.param_groups]  # type: ignore[misc]


def build_optimizer(model: nn.Module, config: OptimiserConfig) -> FlatAdamW | FlatMuon:
    """The optimiser of a model on its device."""
    groups = parameter_groups(model, config)
    if config.kind == "adamw":
        return FlatAdamW(groups, lr=config.lr, betas=config.betas)
    return FlatMuon(*for_muon(model, groups), config.momentum, lr=config.lr, betas=config.betas)


def for_muon(
    model: nn.Module, groups: Iterable[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups that Muon moves, matrices of blocks, and those that AdamW does."""
    kinds, parameters = kinds_of(model), dict(model.named_parameters())
    matrices = {id(parameters[name]) for name, kind in kinds.items() if kind == "matrices"}
    own: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in groups:
        (own if id(group["params"][0]) in matrices else others).append(group)
    return own, others


def learning_rate(
    config: OptimiserConfig, step: int, total_steps: int, switch_step: int | None = None
) -> float:
    """The rate of step ``step`` (0-based): linear warm-up, then ``config.lr_schedule``.

    Args:
        config: of the optimiser.
        step: steps done before it.
        total_steps: of the run.
        switch_step: the last switch so far, after which ``config.rewarm`` steps warm up again.
    """
    if step < config.warmup:
        rate = config.lr * (step + 1) / config.warmup
    elif config.lr_schedule == "cosine":
        done = (step - config.warmup) / (total_steps - config.warmup)
        rate = config.lr * 0.5 * (1 + math.cos(math.pi * done))
    elif config.lr_schedule == "wsd":
        rate = config.lr * min(1.0, (total_steps - step) / (WSD_DECAY * total_steps))
    else:
        rate = config.lr
    if switch_step is not None and step < switch_step + config.rewarm:
        rate *= (step - switch_step + 1) / config.rewarm
    return rate


@torch.no_grad()
def go_back(optimizer: RunOptimizer, to: Iterable[Tensor], keep: float) -> None:
    """Move the weights towards others and forget the moments.

    Args:
        optimizer: of the weights.
        to: like its ``pieces``: where ``keep`` = 0 would end.
        keep: the share of the way from there that is kept, in [0, 1].
    """
    for weights, target in zip(optimizer.pieces, to, strict=True):
        weights.lerp_(target, 1 - keep)
    optimizer.scale_moments(0.0)
