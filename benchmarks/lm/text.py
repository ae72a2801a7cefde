"""The text: sources of Python's standard library, which every machine has, as token shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shift.tasks.shards import INDEX
from shift.tokens.documents import Sources
from shift.tokens.prepare import Settings, prepare, train_tokenizer
from shift.tokens.tokenizer import ByteTokenizer, Tokenizer

HELD_OUT = 0.05
BPE_CHARACTERS = 20_000_000
"""Of the training documents, from which a BPE is learned."""


def make_shards(out: Path, text: Mapping[str, Any], jobs: int) -> Path:
    """The folder of shards; made once. It depends on the Python version: compare runs of one installation."""
    if not (out / INDEX).is_file():
        sources = Sources(standard_library(text["megabytes"] * 1e6))
        settings = Settings(validation=HELD_OUT, jobs=jobs)
        tokenizer: Tokenizer = ByteTokenizer()
        if text["tokenizer"] == "bpe":
            tokenizer = train_tokenizer(sources, settings, text["vocab_size"], BPE_CHARACTERS)
        prepare(sources, tokenizer, out, settings)
    return out


def standard_library(n_bytes: float) -> list[Path]:
    """Modules of the standard library, its tests too, in an order of their names' hashes, up to a size."""
    root = Path(os.__file__).parent
    paths = [path for path in root.rglob("*.py") if "site-packages" not in path.parts]
    paths.sort(key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest())
    chosen, size = [], 0.0
    for path in paths:
        if size >= n_bytes:
            break
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a test of encodings
        chosen.append(path)
        size += path.stat().st_size
    return chosen
