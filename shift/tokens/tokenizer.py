"""Tokenizers: bytes, which needs nothing, or a file of the package ``tokenizers``, given or trained here.

No text becomes the separator: what looks like a special token in a document is encoded letter by letter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shift.reading import parse_json, read_regular
from shift.tasks.shards import TOKENIZER, dtype_of, read_index
from shift_kernels.errors import ShiftInputError, input_error

END_OF_TEXT = "<|endoftext|>"
SEPARATORS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
"""Names by which a tokenizer's separator is looked for, in this order."""


class Tokenizer(Protocol):
    """Text to ids and back."""

    vocab_size: int
    separator: int
    """The id that stands before every document."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, without separators, in the smallest dtype that holds them."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; separators are left out."""

    def to_bytes(self) -> bytes:
        """The content of a file that :func:`read_tokenizer` reads."""


class ByteTokenizer:
    """Ids 0 .. 255 are the bytes of UTF-8, 256 is the separator."""

    vocab_size, separator = 257, 256
    KIND = "bytes"

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype("<u2") for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that are no UTF-8 become U+FFFD."""
        return bytes(i for i in ids if i < self.separator).decode(errors="replace")

    def to_bytes(self) -> bytes:
        return json.dumps({"type": self.KIND}).encode()


class FileTokenizer:
    """A tokenizer of the package ``tokenizers``.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        separator: the name or id of a token; None: the first of :data:`SEPARATORS` that it has.

    Raises:
        ShiftInputError: it has no such token.
    """

    def __init__(self, tokenizer: Any, separator: str | int | None = None) -> None:
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        if isinstance(separator, int):
            separator = tokenizer.id_to_token(separator)
        names = SEPARATORS if separator is None else (separator,)
        special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        found = [i for name in names if (i := tokenizer.token_to_id(name)) in special]
        if not found:
            raise input_error(
                "shift-data", "separator", separator,
                "the name of a special token of the tokenizer, which no text can spell",
                "Name the one that stands between documents.",
            )  # fmt: skip
        self.separator: int = found[0]
        # Ids may have gaps: the largest one counts.
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        dtype = dtype_of(self.vocab_size)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if i != self.separator], skip_special_tokens=False)

    def to_bytes(self) -> bytes:
        return self._tokenizer.to_str().encode()


def train_bpe(texts: Iterable[str], vocab_size: int) -> FileTokenizer:
    """A byte-level BPE with :data:`END_OF_TEXT`, learned from texts; any other text can be encoded, too.

    Args:
        texts: to learn from.
        vocab_size: at least 257, the bytes and the separator; fewer come out where the texts are short.

    Raises:
        ModuleNotFoundError: the package ``tokenizers`` is missing.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return FileTokenizer(tokenizer)


def read_tokenizer(path: Path, separator: str | int | None = None) -> Tokenizer:
    """The tokenizer of a file: one of ours, or a ``tokenizer.json`` of the package ``tokenizers``.

    Args:
        path: of the file.
        separator: see :class:`FileTokenizer`.

    Raises:
        ShiftInputError: no such file, or another content.
        ModuleNotFoundError: the package ``tokenizers`` is missing.
    """
    try:
        data = read_regular(path)
        table = parse_json(data)
    except (OSError, ValueError) as error:
        raise _refused(path, error.strerror if isinstance(error, OSError) else error) from error
    if isinstance(table, dict) and table.get("type") == ByteTokenizer.KIND:
        return ByteTokenizer()
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the package raises no narrower class
        raise _refused(path, error) from error
    return FileTokenizer(tokenizer, separator)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder that ``shift-data`` wrote.

    Raises:
        ShiftInputError: no such folder.
        ModuleNotFoundError: the package ``tokenizers`` is missing.
    """
    index = read_index(Path(folder))
    return read_tokenizer(Path(folder) / TOKENIZER, index["separator"])


def _refused(path: Path, reason: object) -> ShiftInputError:
    return input_error(
        "shift-data", "tokenizer", str(path), "'bytes', 'bpe' or a tokenizer.json", f"Mend it: {reason}."
    )
