"""Token shards: what ``shift-data`` writes and the task ``tokens`` reads.

    data.json          what the folder holds; written last, so a folder without it is not finished
    tokenizer.json     how ids become text again
    train-00000.bin    a shard: 1,024 bytes of header, one line of JSON padded with blanks, then the tokens
    eval-00000.bin     of the held-out documents

Tokens are little-endian uint16, or uint32 where the vocabulary needs it. Every document begins with the
separator. A header is checked against the size of its file when a folder is opened, and every id against the
vocabulary when it is read: a shard that was cut short is found before training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shift.reading import parse_json, read_regular
from shift.tasks.base import SPLITS
from shift_kernels.errors import input_error

FORMAT = "shift-tokens-1"
INDEX, TOKENIZER = "data.json", "tokenizer.json"
HEADER_BYTES = 1024
NAME = re.compile(f"({'|'.join(SPLITS)})-[0-9]{{5,9}}\\.bin")
LARGEST_VOCABULARY = 2**31


@dataclass(frozen=True)
class Header:
    """The first line of a shard."""

    split: str
    dtype: str
    """"<u2" or "<u4", as numpy names them."""
    vocab_size: int
    separator: int
    """The token that every document begins with."""
    n_documents: int
    n_tokens: int
    """With the separators."""
    n_bytes: int
    """UTF-8 bytes of the documents."""
    sha256: str
    """Of the tokens' bytes."""
    format: str = FORMAT

    def to_bytes(self) -> bytes:
        """The header as it stands in the file."""
        return json.dumps(dataclasses.asdict(self)).encode().ljust(HEADER_BYTES - 1) + b"\n"

    @staticmethod
    def from_bytes(data: bytes) -> Header:
        """The inverse of :meth:`to_bytes`.

        Raises:
            ValueError: not a header of this format.
        """
        table = parse_json(data)
        if not isinstance(table, dict) or table.get("format") != FORMAT:
            raise ValueError(f"not a shard of the format {FORMAT}")
        kinds = {f.name: int if f.type == "int" else str for f in dataclasses.fields(Header)}
        if table.keys() != kinds.keys() or any(type(table[k]) is not kind for k, kind in kinds.items()):
            raise ValueError("a header with other fields")
        header = Header(**table)
        counts = (header.n_documents, header.n_tokens, header.n_bytes)
        good = header.dtype in ("<u2", "<u4") and min(counts) >= 0 and header.split in SPLITS
        if not good or not 0 <= header.separator < header.vocab_size <= LARGEST_VOCABULARY:
            raise ValueError("a header with impossible values")
        return header


def dtype_of(vocab_size: int) -> str:
    """The smallest dtype that holds every id, as numpy names it."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


@dataclass(frozen=True)
class Shard:
    """One file of tokens, memory-mapped."""

    path: Path
    header: Header
    tokens: np.ndarray
    """[n_tokens]; nothing is read before it is used."""

    @staticmethod
    def open(path: Path) -> Shard:
        """Map a shard.

        Raises:
            OSError: no such file.
            ValueError: not a shard, or cut short.
        """
        # Non-blocking: opening a FIFO that nobody writes to would wait for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            header = Header.from_bytes(file.read(HEADER_BYTES))
            size = os.fstat(file.fileno()).st_size
        dtype = np.dtype(header.dtype)
        expected = HEADER_BYTES + header.n_tokens * dtype.itemsize
        if size != expected:
            raise ValueError(f"{size} bytes that are not the {expected} of its header")
        tokens = np.memmap(path, dtype, "r", HEADER_BYTES, (header.n_tokens,)) if header.n_tokens else None
        return Shard(path, header, np.zeros(0, dtype) if tokens is None else tokens)

    def verify(self) -> None:
        """Read all tokens.

        Raises:
            ValueError: they are not those written.
        """
        if hashlib.sha256(self.tokens.data).hexdigest() != self.header.sha256:
            raise ValueError("tokens that do not have the sha256 of its header")


@dataclass(frozen=True)
class TokenFolder:
    """A finished folder of shards, its headers checked."""

    path: Path
    vocab_size: int
    separator: int
    shards: Mapping[str, tuple[Shard, ...]]
    """By split, in order."""

    @staticmethod
    def open(path: str | Path, *, verify: bool = False) -> TokenFolder:
        """Check all headers against their files and the index.

        Args:
            path: of the folder.
            verify: also read every token, to compare sha256.

        Raises:
            ShiftInputError: not a finished folder, a missing or cut shard; the message names the file.
        """
        folder = Path(path)
        index = read_index(folder)
        shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        for name in index["shards"]:
            try:
                shard = Shard.open(folder / name)
                h = shard.header
                if (h.vocab_size, h.separator) != (index["vocab_size"], index["separator"]):
                    raise ValueError("a shard of another tokenizer")
                if h.sha256 != index["shards"][name]:
                    raise ValueError("a shard of other data")
                if verify:
                    shard.verify()
            except (OSError, ValueError) as error:
                raise _refused(folder / name, error) from error
            shards[h.split].append(shard)
        found = {split: tuple(of_split) for split, of_split in shards.items()}
        return TokenFolder(folder, index["vocab_size"], index["separator"], found)

    def fingerprint(self) -> str:
        """sha256 of the shards' own, in order."""
        shards = (shard for split in SPLITS for shard in self.shards[split])
        return hashlib.sha256("".join(shard.header.sha256 for shard in shards).encode()).hexdigest()

    def total(self, split: str, field: str) -> int:
        """The sum of a header's count over the shards of a split."""
        return sum(getattr(shard.header, field) for shard in self.shards[split])


def read_index(folder: Path) -> dict[str, Any]:
    """What a folder says that it holds.

    Raises:
        ShiftInputError: it is not finished, or was not written by ``shift-data``.
    """
    try:
        index = parse_json(read_regular(folder / INDEX))
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise ValueError(f"not an index of the format {FORMAT}")
        good = all(type(index.get(key)) is int for key in ("vocab_size", "separator"))
        names = index.get("shards")
        if not good or not isinstance(names, dict) or not all(map(NAME.fullmatch, names)):
            raise ValueError("an index with other fields, or with names that are not those of shards")
    except (OSError, ValueError) as error:
        raise _refused(folder / INDEX, error) from error
    return index


def _refused(path: Path, error: OSError | ValueError) -> Exception:
    reason = error.strerror if isinstance(error, OSError) else error
    return input_error(
        "task 'tokens'", "path", str(path), "a folder as shift-data writes it",
        f"Make it again, or name the folder that it was moved to: {reason}.",
    )  # fmt: skip
