"""A small folder of token shards, made as ``shift-data`` makes them."""

from __future__ import annotations

import random
from pathlib import Path

from shift.tokens.documents import Sources
from shift.tokens.prepare import Settings, prepare
from shift.tokens.tokenizer import ByteTokenizer

WORDS = ["loop", "block", "token", "head", "state", "norm", "gate", "layer"]


def documents(count: int = 40) -> list[str]:
    """Texts of 1 to 40 words, each another."""
    rng = random.Random(0)
    return [f"{i}: " + " ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for i in range(count)]


def token_folder(folder: Path, **settings: object) -> Path:
    """The folder of shards of :func:`documents`, bytes as tokens, several shards a split."""
    source = folder / "documents.txt"
    source.write_text("\f".join(documents()))
    defaults = dict(validation=0.3, shard_tokens=1000)
    out = folder / "tokens"
    prepare(Sources([source], split_on="\f"), ByteTokenizer(), out, Settings(**{**defaults, **settings}))
    return out
