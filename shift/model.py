"""LoopedTransformer: embedding -> looped block -> head. One object is Single-Attn and Looped-Attn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shift.tasks.base import Task
from shift_kernels import BlockSpec, LoopedBlock
from shift_kernels.errors import input_error


class LoopedTransformer(nn.Module):
    """Token model around a :class:`shift_kernels.LoopedBlock`.

    ``n_loops=1`` is Single-Attn (Stage I of SHIFT), ``n_loops=T`` is Looped-Attn (Stage II): the parameters
    are the same, all of them are used in both, and no option of the module changes at the switch.

    Args:
        spec: the loop body.
        vocab_size: input ids lie in [0, vocab_size).
        n_classes: outputs per position.
        max_seq_len: longest sequence; also the number of learned positions.
        n_contexts: if > 0, ``context`` selects one of so many embeddings, added at every position.
        learned_positions: add a learned position embedding (off: NoPE, or rotary by the spec).
        final_norm: a layernorm before the head; wanted where the block leaves an unnormalised residual
            stream (pre-norm without ``loop_norm``).
    """

    def __init__(
        self,
        spec: BlockSpec,
        *,
        vocab_size: int,
        n_classes: int,
        max_seq_len: int,
        n_contexts: int = 0,
        learned_positions: bool = True,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        d = spec.d_model
        self.max_seq_len = max_seq_len
        self.tokens = nn.Embedding(vocab_size, d)
        self.positions = nn.Embedding(max_seq_len, d) if learned_positions else None
        self.contexts = nn.Embedding(n_contexts, d) if n_contexts else None
        self.block = LoopedBlock(spec)
        self.norm = nn.LayerNorm(d) if final_norm else None
        self.head = nn.Linear(d, n_classes)
        for embedding in (self.tokens, self.positions, self.contexts):
            if embedding is not None:
                # Small beside the block's own updates: with 0.5 the looped model took 1.8x the steps on hop.
                nn.init.normal_(embedding.weight, std=0.1)

    @classmethod
    def for_task(
        cls, spec: BlockSpec, task: Task, *, learned_positions: bool = True, final_norm: bool = True
    ) -> LoopedTransformer:
        """The model whose sizes are those of a task; the other arguments are the class's.

        Raises:
            ShiftInputError: the block sees other positions than the task lets it (``causal``).
        """
        if spec.causal != task.causal:
            raise input_error(
                "LoopedTransformer.for_task", "spec.causal", spec.causal, f"{task.causal}, as the task's",
                "Build the spec with causal=task.causal.",
            )  # fmt: skip
        return cls(
            spec,
            vocab_size=task.vocab_size,
            n_classes=task.n_classes,
            max_seq_len=task.max_seq_len,
            n_contexts=task.n_contexts,
            learned_positions=learned_positions,
            final_norm=final_norm,
        )

    def embed(
        self, tokens: Tensor, context: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Input embeddings e, [batch, seq_len, d_model], of ids [batch, seq_len]."""
        seq_len = tokens.shape[1]
        if seq_len > self.max_seq_len:
            raise input_error(
                "LoopedTransformer",
                "tokens",
                list(tokens.shape),
                f"seq_len <= max_seq_len = {self.max_seq_len}",
                "Build the model with a larger max_seq_len.",
            )
        if (context is None) != (self.contexts is None):
            raise input_error(
                "LoopedTransformer",
                "context",
                None if context is None else list(context.shape),
                "an int tensor [batch] if and only if the model has n_contexts > 0",
                "Pass batch.context.",
            )
        e = self.tokens(tokens)
        if self.positions is not None:
            weight = self.positions.weight
            e = e + (weight[:seq_len] if cu_seqlens is None else weight[positions_in(cu_seqlens, tokens)])
        if self.contexts is not None:
            e = e + self.contexts(context)[:, None]
        return e

    def read(self, h: Tensor) -> Tensor:
        """Logits [..., n_classes] of states [..., d_model]."""
        return self.head(h if self.norm is None else self.norm(h))

    def forward(
        self,
        tokens: Tensor,
        n_loops: int | Tensor,
        *,
        context: Tensor | None = None,
        seq_lens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        n_grad_loops: int | None = None,
        return_all_loops: bool = False,
        backend: str = "auto",
    ) -> Tensor:
        """Logits.

        Args:
            tokens: int64 [batch, seq_len].
            n_loops: T, or an int tensor [] or [batch].
            context: int64 [batch], for models with ``n_contexts``.
            cu_seqlens: int64 [n_sequences + 1] on the CPU, offsets of the sequences in the rows laid end to
                end, where rows hold several (:class:`shift.tasks.base.Batch`).
            seq_lens, n_grad_loops, return_all_loops, backend: see :func:`shift_kernels.looped_block`.

        Returns:
            [batch, seq_len, n_classes]; with ``return_all_loops`` [T, batch, seq_len, n_classes].

        Raises:
            ShiftInputError: too long a sequence, or a context where the model has none.
        """
        e = self.embed(tokens, context, cu_seqlens)
        h = self.block(
            e if cu_seqlens is None else e.flatten(0, 1),
            n_loops,
            seq_lens=seq_lens,
            cu_seqlens=cu_seqlens,
            n_grad_loops=n_grad_loops,
            return_all_loops=return_all_loops,
            backend=backend,
        )
        return self.read(h if cu_seqlens is None else h.unflatten(-2, tokens.shape))


def positions_in(cu_seqlens: Tensor, tokens: Tensor) -> Tensor:
    """Each token's place in its own sequence, int64 like ``tokens`` [batch, seq_len]."""
    first = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
    return (torch.arange(tokens.numel()) - first).view(tokens.shape).to(tokens.device)
