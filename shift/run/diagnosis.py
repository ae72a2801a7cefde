"""Where numbers went bad: the first tensor that is not finite in one pass of the plain backend.

The pass goes layer by layer, loop by loop, through public calls alone, so that each state can be looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from shift.config import TrainConfig
from shift.model import LoopedTransformer
from shift.run.evaluate import autocast, loops_of
from shift.run.global_batch import GlobalBatch
from shift.run.ranks import Ranks
from shift.tasks.base import IGNORE, Batch
from shift_kernels import LoopedBlock, looped_block
from shift_kernels.reference import inject
from shift_kernels.spec import ONE_OVER_T

NOTHING = "nothing in a pass of the torch backend with the weights of now"


def culprit(
    model: LoopedTransformer,
    batch: Batch,
    row: Mapping[str, Any],
    config: TrainConfig,
    batches: GlobalBatch,
    ranks: Ranks,
) -> str:
    """What went bad first, and how to make its batch again, in a sentence; called on all ranks.

    Args:
        model: with the weights to look at.
        batch: of this rank.
        row: the metrics of the step.
        config, batches, ranks: of the run.
    """
    own = first_not_finite(model, batch, row["n_loops"], config)
    found = ranks.gather((own, recipe(config, row["step"] - 1, batches.streams, batches.n_streams)))
    what, how = next(((what, how) for what, how in found if what != NOTHING), found[0])
    return f"First not finite: {what} ({row['n_loops']} loops; the batch: {how})."


def first_not_finite(model: LoopedTransformer, batch: Batch, n_loops: int, config: TrainConfig) -> str:
    """The first tensor that is not finite, in words: weights, then the forward, then the gradients.

    Args:
        model: with the weights to look at.
        batch: on any device.
        n_loops: that the schedule allowed.
        config: of the run.
    """
    device = model.tokens.weight.device
    loops = loops_of(batch, n_loops)
    batch = batch.to(device)
    try:
        with autocast(device, config.precision == "bf16"):
            for what, tensor in _tensors(model, batch, loops, config.n_grad_loops):
                if not bool(tensor.isfinite().all()):
                    return what
    except (torch.OutOfMemoryError, MemoryError):
        return "not found, for want of memory"
    return NOTHING


def recipe(config: TrainConfig, step: int, streams: range, n_streams: int) -> str:
    """The call that makes a training batch again, or batches, of a rank.

    Args:
        config: of the run.
        step: steps done before it.
        streams: whose batches (:mod:`shift.run.global_batch`), of how many.
    """
    options = "".join(f", {name}={value!r}" for name, value in config.task.options.items())
    task = f"make_task({config.task.name!r}, seed={config.task.seed}{options})"
    dealt = f", n_ranks={n_streams}" if n_streams > 1 else ""
    calls = (f"{task}.batch({config.batch_size}, {step}, rank={stream}{dealt})" for stream in streams)
    return " and ".join(calls)


def _tensors(
    model: LoopedTransformer, batch: Batch, loops: int | Tensor, n_grad_loops: int | None
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a step with their names, in the order in which they come to be."""
    parameters = dict(model.named_parameters())
    yield from ((f"weight {name}", p.detach()) for name, p in parameters.items())
    with torch.no_grad():
        yield from _states(model, batch, loops)
    logits = model(
        batch.tokens,
        loops,
        context=batch.context,
        cu_seqlens=batch.cu_seqlens,
        n_grad_loops=n_grad_loops,
        backend="torch",
    )
    yield "activation: the logits", logits.detach()
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    yield "the loss", loss.detach()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in reversed(list(zip(parameters, gradients, strict=True))):  # from the loss backwards
        if gradient is not None:
            yield f"gradient of {name}", gradient


def _states(model: LoopedTransformer, batch: Batch, loops: int | Tensor) -> Iterator[tuple[str, Tensor]]:
    """The embeddings, and the residual stream after each half of each layer of each loop."""
    e, packed = model.embed(batch.tokens, batch.context, batch.cu_seqlens), batch.cu_seqlens
    yield "activation: the input embeddings", e
    if packed is not None:
        e = e.flatten(0, 1)
    if model.prelude is not None:
        for what, after in _layers(model.prelude, e, packed):
            yield f"{what} of the prelude", after
        e = after
    spec, weights = model.block.spec, dict(model.block.named_parameters())
    own = torch.as_tensor(loops, device=e.device).expand(e.shape[0]).view(-1, *(e.ndim - 1) * [1])
    # A model that draws its first state draws another one here.
    h = e if spec.injection == "none" else torch.zeros_like(e) if (h0 := model.initial(e)) is None else h0
    scale = 1 / int(own.max()) if spec.residual_scale == ONE_OVER_T else None
    for t in range(1, int(own.max()) + 1):
        for what, after in _layers(model.block, inject(h, e, weights, spec), packed, scale):
            yield f"{what}, loop {t}", after
        h = torch.where(t <= own, after, h)
    if model.coda is not None:
        yield from ((f"{what} of the coda", after) for what, after in _layers(model.coda, h, packed))


def _layers(
    block: LoopedBlock, u: Tensor, packed: Tensor | None, scale: float | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What attention and MLP of each layer leave of a state; the last one is the block's own output."""
    spec, weights = block.spec, dict(block.named_parameters())
    for layer in range(spec.n_layers):
        last = layer == spec.n_layers - 1
        whole = dataclasses.replace(spec, n_layers=1, injection="none", loop_norm=spec.loop_norm and last)
        half = dataclasses.replace(whole, d_ff=0, loop_norm=False)
        prefix = f"layers.{layer}."
        for name, part in (("attention", half), ("MLP" if spec.d_ff else "last norm", whole)):
            needed = {name: weights[name.replace("layers.0.", prefix, 1)] for name in part.weight_shapes()}
            after = looped_block(u, needed, part, 1, cu_seqlens=packed, residual_scale=scale, backend="torch")
            out = cast(Tensor, after)
            yield f"activation after the {name} of layer {layer} of {spec.n_layers}", out
        u = out
