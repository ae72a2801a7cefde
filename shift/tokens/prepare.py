"""Documents -> shards: split by hash, encoded by threads, written whole or not at all.

The result depends on documents, their order and the settings alone: not on the number of threads, nor on
the clock.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from shift.run.files import directory_for, json_bytes, replace_atomically
from shift.run.lock import alone_with
from shift.tasks.base import SPLITS
from shift.tasks.shards import FORMAT, INDEX, NAME, TOKENIZER, Header, dtype_of
from shift.tokens.documents import Document, Sources
from shift.tokens.tokenizer import Tokenizer, train_bpe
from shift_kernels.errors import ShiftInputError, input_error

UNFINISHED = ".unfinished"
"""Stands in a folder from the beginning to the end of its making, as a lock."""
CHUNK_CHARACTERS = 2**20
"""About as many are encoded in one go: enough to keep a thread busy, few enough to keep memory small."""


@dataclass(frozen=True)
class Settings:
    """What becomes of the documents."""

    validation: float = 0.01
    """Share of the documents that is held out, chosen by hash: equal texts fall to one side."""
    shard_tokens: int = 2**27
    """A shard is closed by the document with which it has as many."""
    jobs: int = 1
    """Threads that encode."""


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is for validation: by its text alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def train_tokenizer(sources: Sources, settings: Settings, vocab_size: int, characters: int) -> Tokenizer:
    """A BPE of the first training documents, of so many characters together."""

    def texts() -> Iterator[str]:
        left = characters
        for document in _shown(sources, "learning tokens"):
            if not is_held_out(document.text, settings.validation):
                yield document.text[:left]
                left -= len(document.text)
                if left <= 0:
                    return

    return train_bpe(texts(), vocab_size)


def prepare(sources: Sources, tokenizer: Tokenizer, out: Path, settings: Settings) -> dict[str, Any]:
    """Write a folder of shards; returns its index.

    Raises:
        ShiftInputError: unusable sources or folder, or a split that no document fell to; it leaves nothing.
        OSError: the disk refused; the folder has no index then, and can be written again.
    """
    allowed = "a folder into which no other shift-data writes"
    refusal = input_error("shift-data", "out", str(out), allowed, "Choose another.")
    unfinished = out / UNFINISHED
    begun = os.path.lexists(unfinished)
    with directory_for(out, "shift-data", "out"), alone_with(unfinished, refusal):
        names = [path.name for path in out.iterdir()]
        taken = [name for name in names if name in (INDEX, TOKENIZER) or NAME.fullmatch(name)]
        if INDEX in taken or (taken and not begun):
            unfinished.unlink()
            found, allowed = f"{out}, which has {min(taken)}", "a folder without such a file"
            raise input_error("shift-data", "out", found, allowed, "Choose another, or remove it.")
        for name in taken:
            (out / name).unlink()  # of a call that did not come to its end
        try:
            index = _written(sources, tokenizer, out, settings)
        except ShiftInputError:
            for path in out.iterdir():
                if path.name == TOKENIZER or NAME.fullmatch(path.name):
                    path.unlink()
            unfinished.unlink()
            raise
        unfinished.unlink()
    return index


def _written(sources: Sources, tokenizer: Tokenizer, out: Path, settings: Settings) -> dict[str, Any]:
    """All files of a folder, the index last."""
    writers = {split: ShardWriter(out, split, tokenizer, settings.shard_tokens) for split in SPLITS}
    for texts, ids in _encoded(_shown(sources, "tokens"), tokenizer, settings.jobs):
        for text, of_text in zip(texts, ids, strict=True):
            writers[SPLITS[is_held_out(text, settings.validation)]].add(text, of_text)
    for writer in writers.values():
        writer.close()
        if not writer.totals["n_documents"]:
            raise input_error(
                "shift-data", "validation", settings.validation,
                f"a share that leaves some of the documents to each split ('{writer.split}' got none)",
                "Give more documents (--split-on cuts a file into several), or change the share.",
            )  # fmt: skip
    replace_atomically(out / TOKENIZER, tokenizer.to_bytes())
    index = {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
        "splits": {split: writer.totals for split, writer in writers.items()},
        "shards": {name: digest for writer in writers.values() for name, digest in writer.written.items()},
    }
    replace_atomically(out / INDEX, json_bytes(index))
    return index


class ShardWriter:
    """The shards of one split.

    Args:
        out: their folder.
        split: their name.
        tokenizer: whose ids come.
        shard_tokens: see :class:`Settings`.
    """

    def __init__(self, out: Path, split: str, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.split, self.totals = split, dict(n_documents=0, n_tokens=0, n_bytes=0)
        self.written: dict[str, str] = {}
        """sha256 of each shard's tokens by name of its file."""
        self._out, self._tokenizer, self._shard_tokens = out, tokenizer, shard_tokens
        self._separator = np.array([tokenizer.separator], dtype_of(tokenizer.vocab_size))
        self._start()

    def _start(self) -> None:
        self._parts: list[np.ndarray] = []
        self._counts = dict.fromkeys(self.totals, 0)

    def add(self, text: str, ids: np.ndarray) -> None:
        """Take a document."""
        self._parts += [self._separator, ids]
        self._counts["n_documents"] += 1
        self._counts["n_tokens"] += 1 + len(ids)
        self._counts["n_bytes"] += len(text.encode())
        if self._counts["n_tokens"] >= self._shard_tokens:
            self.close()

    def close(self) -> None:
        """Write what has come since the last shard."""
        if not self._parts:
            return
        tokens = np.concatenate(self._parts)
        digest = hashlib.sha256(tokens.data).hexdigest()
        header = Header(
            split=self.split,
            dtype=tokens.dtype.str,
            vocab_size=self._tokenizer.vocab_size,
            separator=self._tokenizer.separator,
            n_documents=self._counts["n_documents"],
            n_tokens=self._counts["n_tokens"],
            n_bytes=self._counts["n_bytes"],
            sha256=digest,
        )
        name = f"{self.split}-{len(self.written):05d}.bin"
        replace_atomically(self._out / name, header.to_bytes() + tokens.tobytes())
        self.written[name] = digest
        self.totals = {key: value + self._counts[key] for key, value in self.totals.items()}
        self._start()


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, jobs: int
) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Texts with their ids, in order, chunk by chunk; a few chunks are under way at a time."""
    waiting: deque[tuple[list[str], Future[list[np.ndarray]]]] = deque()
    with ThreadPoolExecutor(jobs) as pool, _no_threads_inside():
        for texts in _chunks(documents):
            waiting.append((texts, pool.submit(tokenizer.encode, texts)))
            if len(waiting) > 2 * jobs:
                texts, encoding = waiting.popleft()
                yield texts, encoding.result()
        for texts, encoding in waiting:
            yield texts, encoding.result()


def _chunks(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= CHUNK_CHARACTERS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _shown(sources: Sources, what: str) -> Iterator[Document]:
    """The documents, under a bar on a terminal."""
    with tqdm(total=sources.n_bytes, unit="B", unit_scale=True, desc=what, disable=None) as bar:
        for document in sources:
            yield document
            bar.update(document.file_bytes)


@contextlib.contextmanager
def _no_threads_inside() -> Iterator[None]:
    """Keep the package ``tokenizers`` from starting threads of its own in each of ours."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
