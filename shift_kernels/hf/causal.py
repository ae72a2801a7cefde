"""A causal language model around looped blocks, as Transformers expects one: caches, pads, beams, loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from shift_kernels.checks import check_int
from shift_kernels.errors import input_error
from shift_kernels.hf.slots import Step
from shift_kernels.spec import MAX_LOOPS

LOSS_KEYWORDS = frozenset({"num_items_in_batch", "shift_labels", "ignore_index"})
ONLY = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""What every model of Transformers takes, and the one value that these serve."""


class LoopedCausalLM(PreTrainedModel, GenerationMixin):
    """A model says what happens between ids and logits; the rest is here. ``config.n_loops`` is T."""

    def embed(self, ids: Tensor, starts: Tensor) -> Tensor:
        """Input embeddings [batch, seq_len, d_model] of ids whose first has position ``starts`` [batch]."""
        raise NotImplementedError

    def states(self, step: Step, e: Tensor, n_loops: int, all_loops: bool) -> Tensor:
        """What :meth:`read` reads, [batch, seq_len, d_model]; with ``all_loops`` after each, [T, ..]."""
        raise NotImplementedError

    def read(self, h: Tensor) -> Tensor:
        """Logits [.., vocab_size] of states [.., d_model]."""
        raise NotImplementedError

    def is_sure(self, h: Tensor, logits: Tensor, threshold: float) -> Tensor:
        """After which loops a token may exit, bool [T, batch, seq_len].

        By confidence: the likeliest token has a probability of at least ``threshold``.
        """
        return logits.float().softmax(-1).amax(-1) >= threshold

    def _init_weights(self, module: nn.Module) -> None:
        """Modules have initialised their weights themselves."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        n_loops: int | None = None,
        exit_threshold: float | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, seq_len, vocab_size], and their loss with ``labels``.

        Args:
            input_ids: int64 [batch, seq_len].
            attention_mask: 0 at pads, on either side, [batch, all tokens so far].
            position_ids: must count the real tokens from 0; left out, they do.
            cache, use_cache, labels, logits_to_keep: as every causal model of Transformers has them.
            n_loops: T; default ``config.n_loops``. One cache takes one T.
            exit_threshold: a token's logits are those after its first loop that :meth:`is_sure`, else after
                the last. All loops run: later tokens see the keys of all of them.
            past_key_values: the cache by its former name.
            kwargs: :data:`LOSS_KEYWORDS`, and :data:`ONLY`.

        Raises:
            ShiftInputError: another mask, other positions, or a cache that no looped block can serve; an
                unknown keyword.
        """
        loops = self._check(input_ids, n_loops, exit_threshold, kwargs)
        cache = past_key_values if cache is None else cache
        if isinstance(attention_mask, dict):  # one for each kind of layers, of which there is one here
            (attention_mask,) = attention_mask.values()
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        ids = input_ids[..., None]
        step = Step(cache, range(1), ids, attention_mask, position_ids)
        start = step.tokens.start
        if start is not None and bool((start > 0).any()):
            name, allowed = type(self).__name__, "positions that begin at 0"
            raise input_error(name, "position_ids", start.tolist(), allowed, "Leave them out.")
        counts = step.seen.counts(len(ids), ids.device)
        e = self.embed(step.tokens.pack(ids)[0][..., 0], counts)
        h = self.states(step, step.begin(step.tokens.unpack(e), self), loops, exit_threshold is not None)
        h = step.end(h)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        h = h[..., kept, :]
        logits = self.read(h)
        if exit_threshold is not None:
            sure = self.is_sure(h, logits, exit_threshold)
            sure[-1] = True
            logits = logits.gather(0, sure.int().argmax(0)[None, ..., None].expand_as(logits[:1]))[0]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)

    def _check(self, ids: Tensor, n_loops: Any, threshold: Any, others: dict[str, Any]) -> Any:
        """T of this call; ``others`` keeps what the loss takes."""
        me = type(self).__name__
        others.pop("cache_position", None)  # says what the cache knows
        for name, served in ONLY.items():
            if (given := others.pop(name, None)) not in (None, served):
                raise input_error(me, name, given, str(served), "Leave it out.")
        if unknown := others.keys() - LOSS_KEYWORDS:
            known = ", ".join(sorted(LOSS_KEYWORDS))
            raise input_error(me, min(unknown), "given", f"a keyword of forward, or {known}", "Leave it out.")
        if ids.ndim != 2:
            raise input_error(me, "input_ids", list(ids.shape), "[batch, seq_len]", "Add a dimension.")
        if threshold is not None and not (isinstance(threshold, (int, float)) and 0 <= threshold <= 1):
            raise input_error(me, "exit_threshold", threshold, "None or a number from 0 to 1", "Change it.")
        loops = self.config.n_loops if n_loops is None else n_loops
        least = 0 if threshold is None else 1
        return loops if isinstance(loops, Tensor) else check_int(me, "n_loops", loops, least, MAX_LOOPS)
