"""``shift-generate RUN --prompt TEXT``: what a trained model goes on to say.

    shift-generate runs/lm --prompt "Once upon a time" --max-new-tokens 100 --temperature 0.8
    shift-generate runs/hop --prompt "3 1 4 1 5" --max-new-tokens 1     # tasks without text: ids

Exit codes: 0 done; 2 unusable input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from shift.build import build_task
from shift.checked import Checked, real, whole
from shift.run.evaluate import autocast
from shift.tasks import Text
from shift.tasks.base import Task
from shift.tasks.tokens import Tokens
from shift.tokens.tokenizer import load_tokenizer
from shift.trained import newest, restored, trained_loops
from shift_kernels import console
from shift_kernels.errors import input_error
from shift_kernels.spec import MAX_LOOPS, MAX_TOKENS


@dataclass(frozen=True)
class GenerateConfig(Checked):
    """How to go on."""

    prompt: str = ""
    """Text; for tasks without text the ids of tokens. Empty: the separator, where the data has one."""
    max_new_tokens: int | None = whole(None, 1, MAX_TOKENS)
    """Tokens, at most; default: as many as the model has positions for. The separator ends them as well."""
    n_loops: int | None = whole(None, 1, MAX_LOOPS)
    """T; default: as many as training had."""
    temperature: float = real(0.8, "a float >= 0", lambda value: value >= 0)
    """Divides the logits; 0: always the likeliest token."""
    top_k: int | None = whole(None, 1)
    """Only the k likeliest tokens."""
    top_p: float | None = real(None, "a float above 0, at most 1", lambda value: 0 < value <= 1)
    """Of these only the likeliest, as few as together have the probability p."""
    seed: int = whole(0, 0, 2**63 - 1)
    """Of the draws."""


@dataclass(frozen=True)
class Command:
    """What a trained model goes on to say."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    data: Path | None = None
    """Where the tokens lie that the run was trained on, if they were moved."""
    how: tyro.conf.OmitArgPrefixes[GenerateConfig] = field(default_factory=GenerateConfig)
    """How to go on."""


@console.command("shift-generate")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    command = tyro.cli(Command, args=argv, prog="shift-generate")
    how = command.how
    run, saved = newest("shift-generate", command.run, command.data)
    task = build_task(run)
    words = Words(task)
    prompt = words.encode(how.prompt)
    model = restored("shift-generate", run, saved, task)
    if len(prompt) >= model.max_seq_len:
        raise input_error(
            "shift-generate", "prompt", f"{len(prompt)} tokens",
            f"fewer than the {model.max_seq_len} that the model has positions for", "Shorten it.",
        )  # fmt: skip
    device = model.tokens.weight.device
    with autocast(device, run.precision == "bf16"):
        new = model.generate(
            torch.tensor([prompt], device=device),
            how.n_loops or trained_loops(saved),
            how.max_new_tokens or model.max_seq_len - len(prompt),
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            stop=words.stop,
            generator=torch.Generator(device).manual_seed(how.seed),
            backend=run.backend,
        )
    print(how.prompt + words.decode(new[0].tolist()))
    return 0


class Words:
    """A task's tokens as text: its tokenizer's, or their ids with blanks between them."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.tokenizer = load_tokenizer(task.folder.path) if isinstance(task, Tokens) else None
        self.stop = (self.tokenizer.separator,) if self.tokenizer else ()

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt.

        Raises:
            ShiftInputError: no ids of this task, or none at all.
        """
        if not text.isascii() and text != text.encode(errors="replace").decode():
            raise input_error("shift-generate", "prompt", ascii(text), "text in UTF-8", "Change it.")
        if self.tokenizer:
            return [self.tokenizer.separator, *self.tokenizer.encode([text])[0].tolist()]
        most = self.task.vocab_size
        ids = (
            Text.encode(text).tolist()
            if isinstance(self.task, Text)
            else [_id(word) for word in text.split()]
        )
        if not ids or not all(0 <= i < most for i in ids):
            raise input_error(
                "shift-generate",
                "prompt",
                text,
                f"at least one token, each from 0 to {most - 1}",
                "Change it.",
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of new ids."""
        if self.tokenizer:
            return self.tokenizer.decode(ids)
        return Text.decode(ids) if isinstance(self.task, Text) else "".join(f" {i}" for i in ids)


def _id(word: str) -> int:
    return int(word) if word.isdecimal() else -1


if __name__ == "__main__":
    sys.exit(main(None))
