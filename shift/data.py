"""``shift-data SOURCES ... --out FOLDER``: text, JSON lines or parquet to shards for the task ``tokens``.

    shift-data notes/ --out runs/notes                                     # bytes: no tokenizer needed
    shift-data books.jsonl --out runs/books --tokenizer bpe --vocab-size 8192
    shift-data part-*.parquet --out runs/web --tokenizer gpt2/tokenizer.json --jobs 8
    shift-train --run-dir runs/lm --task.name tokens --task.options path=runs/notes seq_len=256

What the folder holds: :mod:`shift.tasks.shards`. Exit codes: 0 done; 1 failed; 2 unusable input.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from shift.tasks.shards import INDEX
from shift.tokens.documents import Sources
from shift.tokens.prepare import Settings, prepare, train_tokenizer
from shift.tokens.tokenizer import ByteTokenizer, Tokenizer, read_tokenizer
from shift_kernels.console import command
from shift_kernels.errors import input_error
from shift_kernels.machine import default_jobs

VOCAB_SIZE, BPE_CHARACTERS = 8192, 50_000_000
SMALLEST_BPE = 257
"""256 bytes and the separator."""


@dataclass(frozen=True)
class Command:
    """Turn documents into token shards."""

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """Files, or folders of files: .txt .md .rst .py (a document each), .jsonl, .parquet."""
    out: Path
    """Folder for the shards."""
    tokenizer: str = "bytes"
    """bytes; bpe, learned from the training documents; or a tokenizer.json of the package tokenizers."""
    vocab_size: int | None = None
    """Tokens of a BPE that is learned here; default: 8192."""
    bpe_characters: int | None = None
    """Of the training documents, from which a BPE is learned; default: 50 million."""
    separator: str | None = None
    """Name of the token between documents; default: the first usual one that the tokenizer has."""
    field: str | None = None
    """Field of a JSON line or parquet row that holds the text; default: text."""
    split_on: str | None = None
    """What stands between the documents of a text file; default: each file is one document."""
    validation: float = 0.01
    """Share of documents held out, chosen by the hash of their text."""
    shard_tokens: int = 2**27
    """Tokens in a shard."""
    jobs: int = dataclasses.field(default_factory=default_jobs)
    """Threads that encode; default: one for each core."""


@command("shift-data")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    flags = tyro.cli(Command, args=argv, prog="shift-data")
    index = make_shards(flags)
    for split, totals in index["splits"].items():
        n_documents, n_tokens, n_bytes = totals.values()
        per_token = n_bytes / n_tokens
        print(f"{split}: {n_documents:,} documents, {n_tokens:,} tokens, {per_token:.2f} bytes a token")
    print(flags.out / INDEX)
    return 0


def make_shards(flags: Command) -> dict[str, Any]:
    """What the flags say; returns the folder's index.

    Raises:
        ShiftInputError: unusable input, or an extra that is missing.
    """
    _check(flags)
    sources = Sources.find(flags.sources, flags.field or "text", flags.split_on)
    _check_used(flags, sources)
    settings = Settings(flags.validation, flags.shard_tokens, flags.jobs)
    return prepare(sources, _tokenizer(flags, sources, settings), flags.out, settings)


def _tokenizer(flags: Command, sources: Sources, settings: Settings) -> Tokenizer:
    if flags.tokenizer == "bytes":
        return ByteTokenizer()
    if flags.tokenizer == "bpe":
        size, characters = flags.vocab_size or VOCAB_SIZE, flags.bpe_characters or BPE_CHARACTERS
        return train_tokenizer(sources, settings, size, characters)
    return read_tokenizer(Path(flags.tokenizer), flags.separator)


def _check(flags: Command) -> None:
    lowest = dict(vocab_size=SMALLEST_BPE, bpe_characters=1, shard_tokens=1, jobs=1)
    for name, low in lowest.items():
        if (value := getattr(flags, name)) is not None and value < low:
            raise input_error("shift-data", name, value, f"an int >= {low}", "Use a larger one.")
    if not 0 < flags.validation < 1:
        allowed = "a share between 0 and 1"
        raise input_error("shift-data", "validation", flags.validation, allowed, "1% is 0.01.")
    if flags.separator is not None and flags.tokenizer in ("bytes", "bpe"):
        allowed = f"None with the tokenizer {flags.tokenizer!r}, which has its own"
        raise input_error("shift-data", "separator", flags.separator, allowed, "Leave it out.")
    if flags.split_on == "":
        raise input_error("shift-data", "split_on", "", "a text that is not empty", "Leave it out.")


def _check_used(flags: Command, sources: Sources) -> None:
    """Refuse a flag that nothing would read."""
    idle = {}
    if flags.tokenizer != "bpe":
        idle = dict.fromkeys(("vocab_size", "bpe_characters"), "with --tokenizer bpe")
    if not sources.has_fields:
        idle["field"] = "with .jsonl or .parquet"
    if not sources.has_texts:
        idle["split_on"] = "with files of text"
    for name, use in idle.items():
        if (value := getattr(flags, name)) is not None:
            raise input_error("shift-data", name, value, f"a value only {use}", "Leave it out.")


if __name__ == "__main__":
    sys.exit(main())
