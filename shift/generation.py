"""Tokens out of a model, one after the other; with a cache a new token costs one token's work."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor, nn

from shift_kernels import LoopedBlock, LoopedCache
from shift_kernels.cache import dtype_beside
from shift_kernels.call_checks import own_per_sample
from shift_kernels.checks import check_int, check_offsets, check_positive
from shift_kernels.errors import input_error, type_error
from shift_kernels.torch_internals import has_no_values

FUNCTION = "LoopedTransformer.generate"


class TokenModel(Protocol):
    """What generation needs of :class:`shift.model.LoopedTransformer`."""

    tokens: nn.Embedding
    block: LoopedBlock
    max_seq_len: int
    n_classes: int

    @property
    def parts(self) -> dict[str, LoopedBlock]: ...

    def embed(
        self,
        tokens: Tensor,
        context: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Tensor: ...

    def initial(self, e: Tensor) -> Tensor | None: ...

    def read(self, h: Tensor) -> Tensor: ...


class Sampling(NamedTuple):
    """How the next token follows from logits.

    Args:
        temperature: divides the logits; 0: the likeliest token.
        top_k: only the k likeliest tokens; None: all.
        top_p: of these only the likeliest, as few as together have the probability p; None: all.
        generator: what draws; None: torch's own.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def check(self) -> None:
        """Refuse what is not usable."""
        if not self.temperature >= 0:
            remedy = "0 takes the likeliest token."
            raise input_error(FUNCTION, "temperature", self.temperature, "a float >= 0", remedy)
        if not isinstance(self.generator, torch.Generator | None):
            given = type(self.generator).__name__
            raise type_error(FUNCTION, "generator", given, "a torch.Generator, or None", "Build one.")
        if self.top_k is not None:
            check_int(FUNCTION, "top_k", self.top_k, 1, None)
        allowed = "a float above 0, at most 1"
        if self.top_p is not None and check_positive(FUNCTION, "top_p", self.top_p, allowed) > 1:
            raise input_error(FUNCTION, "top_p", self.top_p, allowed, "1 leaves all tokens.")

    def choose(self, logits: Tensor) -> Tensor:
        """Ids [batch] from logits [batch, vocab_size]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        # Of differences from the largest one: the smallest temperatures make them -inf, and none of them NaN.
        logits = (logits.double() - logits.double().amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        chances = logits.softmax(-1)
        if self.top_p is not None:
            likeliest, ids = chances.sort(descending=True)
            before = likeliest.cumsum(-1) - likeliest
            chances = chances.scatter(-1, ids, likeliest.where(before < self.top_p, 0.0))
        return torch.multinomial(chances, 1, generator=self.generator)[:, 0]


def new_caches(model: TokenModel, batch: int, max_len: int, n_loops: int | Tensor) -> dict[str, LoopedCache]:
    """An empty cache for each part of a model, by the part's name.

    Args:
        batch: samples.
        max_len: tokens of a sample, at most.
        n_loops: T of the looped part.
    """
    most = int(n_loops.max()) if isinstance(n_loops, Tensor) else n_loops
    weight = model.tokens.weight
    dtype = dtype_beside(weight)
    return {
        name: LoopedCache(
            part.spec,
            batch,
            max_len,
            most if part is model.block else 1,
            dtype=dtype,
            device=weight.device,
        )
        for name, part in model.parts.items()
    }


def next_logits(
    model: TokenModel,
    tokens: Tensor,
    n_loops: int | Tensor,
    lengths: Tensor,
    caches: dict[str, LoopedCache] | None,
    *,
    context: Tensor | None = None,
    halt_threshold: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Logits [batch, n_classes] after each sample's last token.

    Args:
        tokens: the new ones, int64 [batch, seq_len], right-padded; all of them without caches.
        lengths: how many of them are real, int64 [batch].
        caches: of the tokens before, to which these are appended.
    """
    starts = None if caches is None else caches["block"].lengths.to(tokens.device)
    h = model.embed(tokens, context, starts=starts)
    for name, part in model.parts.items():
        options: dict[str, Any] = {} if caches is None else {"cache": caches[name]}
        if part is model.block:
            options |= {"h0": model.initial(h), "halt_threshold": halt_threshold}
        h = part(h, n_loops if part is model.block else 1, seq_lens=lengths, backend=backend, **options)
        h = h[0] if isinstance(h, tuple) else h
    last = (lengths - 1).clamp(min=0)
    return model.read(h[torch.arange(len(h), device=h.device), last])


@torch.no_grad()
def generate(
    model: TokenModel,
    tokens: Tensor,
    lengths: Tensor,
    n_loops: int | Tensor,
    max_new_tokens: int,
    *,
    sampling: Sampling,
    stop: int | Collection[int],
    halt_threshold: float | None,
    context: Tensor | None,
    backend: str,
) -> Tensor:
    """See :meth:`shift.model.LoopedTransformer.generate`; ``lengths``: of the prompts, int64 [batch]."""
    sampling.check()
    stops = _checked_stops(stop, model.n_classes, tokens.device)
    batch = len(tokens)
    caches = None
    if halt_threshold is None:
        caches = new_caches(model, batch, int(lengths.max()) + max_new_tokens, n_loops)
    text = torch.cat([tokens, tokens.new_zeros(batch, max_new_tokens)], 1)
    row = torch.arange(batch, device=tokens.device)
    done = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    new: list[Tensor] = []
    unread, n_unread = tokens, lengths
    while len(new) < max_new_tokens and not bool(done.all()):
        logits = next_logits(
            model, unread, n_loops, n_unread, caches,
            context=context, halt_threshold=halt_threshold, backend=backend,
        )  # fmt: skip
        token = sampling.choose(logits)
        if new:
            token = torch.where(done, new[-1], token)
        done |= torch.isin(token, stops)
        text[row, lengths + len(new)] = token
        new.append(token)
        if caches is None:
            n_unread = lengths + len(new)
            unread = text[:, : int(n_unread.max())]
        else:
            unread, n_unread = token[:, None], torch.ones_like(lengths)
    return torch.stack(new, 1) if new else tokens.new_zeros(batch, 0)


def _checked_stops(stop: int | Collection[int], vocab_size: int, device: torch.device) -> Tensor:
    ids = stop if isinstance(stop, Collection) else [stop]
    found = [check_int(FUNCTION, "stop", token, 0, vocab_size - 1) for token in ids]
    return torch.tensor(sorted(found), dtype=torch.int64, device=device)


def check_tokens(function: str, tokens: Tensor, vocab_size: int) -> None:
    """Refuse what are no ids [batch, seq_len]; their values where they lie in host memory.

    Raises:
        ShiftInputError: they are none.
    """
    allowed = f"an int tensor [batch, seq_len] of ids from 0 to {vocab_size - 1}"
    if not isinstance(tokens, Tensor):
        raise type_error(function, "tokens", type(tokens).__name__, allowed, "Use torch.tensor([[...]]).")
    check_offsets(function, "tokens", tokens)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise input_error(function, "tokens", list(tokens.shape), allowed, "A row is a sequence.")
    if tokens.device.type != "cpu" or torch.compiler.is_compiling() or has_no_values(tokens):
        return
    least, most = map(int, tokens.aminmax())
    if least < 0 or most >= vocab_size:
        raise input_error(function, "tokens", least if least < 0 else most, allowed, "Check the tokenizer.")


def check(model: TokenModel, tokens: Tensor, max_new_tokens: int, seq_lens: Tensor | None) -> Tensor:
    """The lengths of the prompts, int64 [batch], if this model can go on from them.

    Raises:
        ShiftInputError: it can't.
    """

    def refuse(argument: str, value: object, allowed: str, remedy: str) -> NoReturn:
        raise input_error(FUNCTION, argument, value, allowed, remedy)

    if not model.block.spec.causal:
        refuse("model", "causal=False", "a causal model", "What it says of a token depends on later ones.")
    if model.n_classes != model.tokens.num_embeddings:
        value = f"{model.n_classes} classes"
        refuse("model", value, f"{model.tokens.num_embeddings}, its vocabulary", "Train one on text.")
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype != torch.int64:
        given = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise type_error(FUNCTION, "tokens", given, "int64 [batch, seq_len]", "Use torch.tensor([[...]]).")
    if tokens.numel() == 0:
        refuse("tokens", list(tokens.shape), "a token of each sample at least", "Begin with a separator.")
    batch, n = tokens.shape
    lengths = tokens.new_full((batch,), n)
    if seq_lens is not None:
        lengths = own_per_sample(FUNCTION, "seq_lens", seq_lens, tokens, 1, n).to(torch.int64)
    most = model.max_seq_len - int(lengths.max())
    if check_int(FUNCTION, "max_new_tokens", max_new_tokens, 0, None) > most:
        allowed = f"at most {most}, max_seq_len less the longest prompt"
        refuse("max_new_tokens", max_new_tokens, allowed, "Ask for fewer, or train with longer sequences.")
    return lengths
