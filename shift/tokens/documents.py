"""Documents out of files: plain text, JSON lines, parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shift.reading import parse_text, read_regular
from shift_kernels.errors import ShiftInputError, input_error

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
LINES, PARQUET = ".jsonl", ".parquet"
PARQUET_ROWS = 1024
"""Rows decoded at a time."""


@dataclass(frozen=True)
class Document:
    """A text, and what it took of its file."""

    text: str
    file_bytes: float
    """Bytes of the source that this document took, for the progress display."""


@dataclass(frozen=True)
class Sources:
    """Files of documents, in a fixed order; can be gone through again.

    Args:
        files: each by its suffix ``.jsonl``, ``.parquet``, or else one text.
        field: of a JSON line or parquet row that holds the text.
        split_on: what stands between the documents of a text file; None: each file is one.
    """

    files: Sequence[Path]
    field: str = "text"
    split_on: str | None = None

    @staticmethod
    def find(paths: Sequence[Path], field: str, split_on: str | None) -> Sources:
        """The files themselves, and those with a known suffix in folders, at any depth, sorted.

        Raises:
            ShiftInputError: nothing there.
        """
        known = (*TEXT_SUFFIXES, LINES, PARQUET)
        files: list[Path] = []
        for path in paths:
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in known and p.is_file())
            if not inside and not path.is_file():
                raise input_error(
                    "shift-data", "sources", str(path), f"a file, or a folder with files {' '.join(known)}",
                    "Check the path.",
                )  # fmt: skip
            files += inside or [path]
        if not files:
            raise input_error("shift-data", "sources", [], "files or folders", "Name some.")
        return Sources(files, field, split_on)

    @property
    def has_fields(self) -> bool:
        """Whether a file has fields, of which :attr:`field` is one."""
        return any(path.suffix.lower() in (LINES, PARQUET) for path in self.files)

    @property
    def has_texts(self) -> bool:
        """Whether a file is text, which :attr:`split_on` may cut."""
        return any(path.suffix.lower() not in (LINES, PARQUET) for path in self.files)

    @property
    def n_bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.files)

    def __iter__(self) -> Iterator[Document]:
        """All documents that hold any text.

        Raises:
            ShiftInputError: a file that can't be read, or another kind of content.
        """
        readers = {LINES: self._lines, PARQUET: self._rows}
        for path in self.files:
            try:
                for document in readers.get(path.suffix.lower(), self._texts)(path):
                    if document.text.strip():
                        yield document
            except ShiftInputError:
                raise
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise input_error(
                    "shift-data",
                    "sources",
                    str(path),
                    "readable documents",
                    f"Mend or leave it out: {reason}.",
                ) from error

    def _texts(self, path: Path) -> Iterator[Document]:
        data = read_regular(path)
        text = parse_text(data)
        parts = [text] if self.split_on is None else text.split(self.split_on)
        for part in parts:
            yield Document(part, len(data) / len(parts))

    def _lines(self, path: Path) -> Iterator[Document]:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)[self.field]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"line {number} has no field {self.field!r} ({error})") from None
                if not isinstance(text, str):
                    raise ValueError(f"line {number}: its {self.field!r} is no text")
                yield Document(text.encode(errors="replace").decode(), len(line))  # JSON may hold half a pair

    def _rows(self, path: Path) -> Iterator[Document]:
        import pyarrow.parquet as parquet

        try:
            file = parquet.ParquetFile(path)
            each = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(PARQUET_ROWS, columns=[self.field]):
                for text in batch.column(0).to_pylist():
                    if text is not None and not isinstance(text, str):
                        raise ValueError(f"its column {self.field!r} is no text")
                    yield Document(text or "", each)
        except IndexError:
            raise ValueError(f"no column {self.field!r}") from None
