"""LoopedTransformer: embedding -> prelude -> looped core -> coda -> read-out.

One object is Single-Attn and Looped-Attn. Prelude and coda run once and may be empty, as may not the core.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shift.generation import Sampling, check, check_tokens, generate
from shift.readout import logits_of, summed_loss
from shift.tasks.base import Task
from shift_kernels import BlockSpec, LoopedBlock
from shift_kernels.checks import check_int
from shift_kernels.errors import input_error
from shift_kernels.spec import MAX_TOKENS


@dataclasses.dataclass(frozen=True)
class Layout:
    """What stands around the looped core. The defaults are nothing.

    Args:
        n_prelude: layers between embedding and core, of the core's kind; run once.
        n_coda: layers between core and read-out; run once.
        initial_state: h_0. ``default``: that of the block's injection. ``learned``: a vector, the same at all
            positions. ``random``: normal, standard deviation 1, drawn for every position at every call in
            training (the idea of Huginn, arXiv 2502.05171) that brings none; in evaluation one vector, always
            the same.
        tied: the read-out's weights are the token embedding's, without bias.
        logit_softcap: c of logits c tanh(z / c); None: logits z.
        init_loops: T, so that maps into the residual stream start 1 / sqrt(2 L) as large, L = n_prelude +
            T n_layers + n_coda being the layers that add to it (as GPT-2 counts; Radford et al. 2019,
            section 2.3); None: all linear maps as ``nn.Linear``.
    """

    n_prelude: int = 0
    n_coda: int = 0
    initial_state: str = "default"
    tied: bool = False
    logit_softcap: float | None = None
    init_loops: int | None = None


INITIAL_STATES = ("default", "learned", "random")


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
        layout: what stands around the loop.

    Raises:
        ShiftInputError: a size out of range; a tied read-out with n_classes other than vocab_size; an initial
            state with injection "none", whose loops would then read nothing of the input.
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
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "n_classes": n_classes, "max_seq_len": max_seq_len}
        for name, size in sizes.items():
            check_int("LoopedTransformer", name, size, 1, MAX_TOKENS)
        check_int("LoopedTransformer", "n_contexts", n_contexts, 0, MAX_TOKENS)
        d = spec.d_model
        self.layout = layout = layout or Layout()
        self.max_seq_len, self.n_classes = max_seq_len, n_classes
        if layout.tied and n_classes != vocab_size:
            raise input_error(
                "LoopedTransformer", "layout.tied", True, f"False where vocab_size = {vocab_size} is not "
                f"n_classes = {n_classes}", "Leave the read-out its own weights.",
            )  # fmt: skip
        if layout.initial_state != "default" and spec.injection == "none":
            raise input_error(
                "LoopedTransformer", "layout.initial_state", layout.initial_state,
                "'default' with injection 'none'", "Choose injection 'add'.",
            )  # fmt: skip
        self.tokens = nn.Embedding(vocab_size, d)
        self.positions = nn.Embedding(max_seq_len, d) if learned_positions else None
        self.contexts = nn.Embedding(n_contexts, d) if n_contexts else None
        self.prelude = _once(spec, layout.n_prelude)
        self.block = LoopedBlock(spec)
        self.start = nn.Parameter(torch.zeros(d)) if layout.initial_state == "learned" else None
        self.coda = _once(spec, layout.n_coda)
        self.norm = nn.LayerNorm(d) if final_norm else None
        self.head = None if layout.tied else nn.Linear(d, n_classes)
        for embedding in (self.tokens, self.positions, self.contexts):
            if embedding is not None:
                # Small beside the block's own updates: with 0.5 the looped model took 1.8x the steps on hop.
                nn.init.normal_(embedding.weight, std=0.1)
        if layout.tied:
            # A token's own logit starts at std times d_model: with 0.1 a model begins by repeating its input.
            nn.init.normal_(self.tokens.weight, std=0.02)
        if layout.init_loops is not None:
            self._shrink_branches(layout.init_loops)

    @classmethod
    def for_task(
        cls,
        spec: BlockSpec,
        task: Task,
        *,
        learned_positions: bool = True,
        final_norm: bool = True,
        layout: Layout | None = None,
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
            layout=layout,
        )

    @property
    def parts(self) -> dict[str, LoopedBlock]:
        """The blocks that are there, by name, in the order in which they run."""
        blocks = {"prelude": self.prelude, "block": self.block, "coda": self.coda}
        return {name: block for name, block in blocks.items() if block is not None}

    @torch.no_grad()
    def _shrink_branches(self, n_loops: int) -> None:
        layers = sum(
            block.spec.n_layers * (n_loops if block is self.block else 1) for block in self.parts.values()
        )
        for block in self.parts.values():
            for name, p in block.named_parameters():
                if name.endswith(("out_proj.weight", "linear2.weight")):
                    p.div_(math.sqrt(2 * layers))

    def embed(
        self,
        tokens: Tensor,
        context: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Input embeddings, [batch, seq_len, d_model], of ids [batch, seq_len]; what the prelude reads.

        ``starts``: position of each sample's first token here, int64 [batch]; None: 0.
        """
        check_tokens("LoopedTransformer", tokens, self.tokens.num_embeddings)
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
            if starts is not None:
                e = e + weight[starts[:, None] + torch.arange(seq_len, device=starts.device)]
            else:
                e = e + (weight[:seq_len] if cu_seqlens is None else weight[positions_in(cu_seqlens, tokens)])
        if self.contexts is not None:
            e = e + self.contexts(context)[:, None]
        return e

    def readout(self) -> tuple[Tensor, Tensor | None]:
        """Weight [n_classes, d_model] and bias of the read-out."""
        return (self.tokens.weight, None) if self.head is None else (self.head.weight, self.head.bias)

    def read(self, h: Tensor) -> Tensor:
        """Logits [..., n_classes] of states [..., d_model] that the coda, or the core without one, left."""
        weight, bias = self.readout()
        return logits_of(self._normed(h), weight, bias, self.layout.logit_softcap)

    def _normed(self, h: Tensor) -> Tensor:
        return h if self.norm is None else self.norm(h)

    def states(
        self,
        tokens: Tensor,
        n_loops: int | Tensor,
        *,
        context: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        h0: Tensor | None = None,
        n_grad_loops: int | None = None,
        return_all_loops: bool = False,
        **options: Any,
    ) -> Tensor:
        """What :meth:`read` reads, [batch, seq_len, d_model] or [T, ...]; arguments as :meth:`forward`."""
        h = self.embed(tokens, context, cu_seqlens)
        if cu_seqlens is not None:
            h, options["cu_seqlens"] = h.flatten(0, 1), cu_seqlens
            h0 = None if h0 is None else h0.flatten(0, 1)
        if self.prelude is not None:
            h = self.prelude(h, 1, **options)
        h = self.block(
            h,
            n_loops,
            h0=self.initial(h) if h0 is None else h0,
            n_grad_loops=n_grad_loops,
            return_all_loops=return_all_loops,
            **options,
        )
        if self.coda is not None and return_all_loops and len(h):
            h = torch.stack([self.coda(after, 1, **options) for after in h])
        elif self.coda is not None:
            h = self.coda(h, 1, **options)
        return h if cu_seqlens is None else h.unflatten(-2, tokens.shape)

    def initial(self, e: Tensor) -> Tensor | None:
        """h_0 for the core's input e; None: the block's own."""
        if self.start is not None:
            return self.start.expand_as(e)
        if self.layout.initial_state != "random":
            return None
        if self.training:
            return torch.randn_like(e)
        # One for all positions: a sample's answer depends neither on its batch nor on what is cached.
        fixed = torch.Generator(e.device).manual_seed(0)
        return e.new_empty(e.shape[-1]).normal_(generator=fixed).expand_as(e)

    def forward(
        self,
        tokens: Tensor,
        n_loops: int | Tensor,
        *,
        context: Tensor | None = None,
        seq_lens: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        h0: Tensor | None = None,
        n_grad_loops: int | None = None,
        return_all_loops: bool = False,
        targets: Tensor | None = None,
        loop_weights: Sequence[float] = (),
        backend: str = "auto",
    ) -> Tensor:
        """Logits; with ``targets`` their loss instead.

        Args:
            tokens: int64 [batch, seq_len].
            n_loops: T, or an int tensor [] or [batch].
            context: int64 [batch], for models with ``n_contexts``.
            cu_seqlens: int64 [n_sequences + 1] on the CPU, offsets of the sequences in the rows laid end to
                end, where rows hold several (:class:`shift.tasks.base.Batch`).
            h0: first state of the loops, [batch, seq_len, d_model]; None: what the layout says.
            seq_lens, n_grad_loops, return_all_loops, backend: see :func:`shift_kernels.looped_block`.
            targets: int64 [batch, seq_len], :data:`shift.tasks.base.IGNORE` where nothing is read.
            loop_weights: of the losses after every loop; see :func:`shift.readout.summed_loss`.

        Returns:
            [batch, seq_len, n_classes]; with ``return_all_loops`` [T, batch, seq_len, n_classes]. With
            ``targets`` the cross-entropy summed over the read positions, 0-d; logits then stand in memory a
            chunk at a time.

        Raises:
            ShiftInputError: no ids, too long a sequence, or a context where the model has none.
        """
        h = self.states(
            tokens,
            n_loops,
            context=context,
            seq_lens=seq_lens,
            cu_seqlens=cu_seqlens,
            h0=h0,
            n_grad_loops=n_grad_loops,
            return_all_loops=return_all_loops or bool(targets is not None and loop_weights),
            backend=backend,
        )
        if targets is None:
            return self.read(h)
        weight, bias = self.readout()
        cap = self.layout.logit_softcap
        return summed_loss(self._normed(h), weight, bias, targets, softcap=cap, loop_weights=loop_weights)

    def generate(
        self,
        tokens: Tensor,
        n_loops: int | Tensor,
        max_new_tokens: int,
        *,
        seq_lens: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | Collection[int] = (),
        halt_threshold: float | None = None,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Tokens that follow. Every loop of every layer has its own cache, so a token costs one token's work.

        Args:
            tokens: prompts, int64 [batch, seq_len], right-padded.
            n_loops: T, or an int tensor [batch].
            max_new_tokens: at most so many; fewer once all samples have stopped.
            seq_lens: int [batch], lengths of the prompts.
            temperature: divides the logits before a token is drawn; 0: the likeliest token.
            top_k: only the k likeliest tokens are drawn.
            top_p: of these only the likeliest, as few as together have the probability p.
            stop: ids, one or several, after which a sample has ended; its row repeats the id from there on.
            halt_threshold: as for :func:`shift_kernels.looped_block`, T being the most loops; all tokens are
                then computed anew for each one, since a token that halts has no keys for deeper loops.
            context: int64 [batch], for models with ``n_contexts``.
            generator: what draws; None: torch's own.
            backend: of the blocks.

        Returns:
            The new tokens, int64 [batch, up to max_new_tokens].

        Raises:
            ShiftInputError: a block that is not causal, classes that are not the vocabulary, more tokens than
                ``max_seq_len``, an empty prompt.
        """
        lengths = check(self, tokens, max_new_tokens, seq_lens)
        return generate(
            self,
            tokens,
            lengths,
            n_loops,
            max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, generator),
            stop=stop,
            halt_threshold=halt_threshold,
            context=context,
            backend=backend,
        )


def once_spec(core: BlockSpec, n_layers: int) -> BlockSpec:
    """What prelude and coda are: layers of the core's kind."""
    return dataclasses.replace(core, n_layers=n_layers, injection="none", loop_norm=False)


def _once(core: BlockSpec, n_layers: int) -> LoopedBlock | None:
    return LoopedBlock(once_spec(core, n_layers)) if n_layers else None


def positions_in(cu_seqlens: Tensor, tokens: Tensor) -> Tensor:
    """Each token's place in its own sequence, int64 like ``tokens`` [batch, seq_len]."""
    first = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
    return (torch.arange(tokens.numel()) - first).view(tokens.shape).to(tokens.device)
