"""What was found, on disk: a line a case as soon as it is known, and the few files that leave the machine.

work/rows.jsonl      every row ever found here; only those of today's sources and device count
work/logs/           what each process printed
out/results.tar.gz   work, whole: send this
out/summary.json     device, versions, the rows that count
out/table.md         the same to read
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu import table
from benchmarks.gpu.work import FAULTS, UNFINISHED, Case, Finding

ROOT = Path(__file__).parents[2]
ROWS, ARCHIVE, SUMMARY, TABLE = "rows.jsonl", "results.tar.gz", "summary.json", "table.md"
PUBLISH_EVERY_S = 15.0
LOG_BYTES = 200_000
"""Of each log what goes into the archive: its end."""


def sources_hash() -> str:
    """Of all that decides what our kernels do. Rows of other sources do not count."""
    digest = hashlib.sha256()
    for path in sorted(_sources()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _sources() -> list[Path]:
    build = [ROOT / "setup.py", ROOT / "build_native.py"]
    return [*(ROOT / "shift_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.*"), *build]


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is never seen half written."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


class Results:
    """The rows of this device and these sources; takes more, from any thread.

    Args:
        work: folder that stays on this machine between calls.
        out: folder that leaves it.
        machine: facts of device and versions; ``device`` among them.
    """

    def __init__(self, work: Path, out: Path, machine: dict[str, Any]) -> None:
        self.work, self.out, self.machine = work, out, machine
        self.sources = sources_hash()
        self._lock, self._published = threading.Lock(), 0.0
        for folder in (work, out):
            folder.mkdir(parents=True, exist_ok=True)
        mine = dict(sources=self.sources, device=machine["device"])
        self.rows = {
            (row["stage"], row["name"]): row
            for row in read_rows(work / ROWS)
            if all(row[key] == value for key, value in mine.items())
        }

    def knows(self, case: Case) -> bool:
        """Whether the case is done with."""
        row = self.rows.get((case.stage, case.name))
        return row is not None and row["outcome"] != UNFINISHED

    def forget(self, cases: Iterable[Case]) -> None:
        """Do these again; the file keeps the old rows, of which the last one counts."""
        for case in cases:
            self.rows.pop((case.stage, case.name), None)

    def of(self, stage: str) -> list[dict[str, Any]]:
        """A stage's rows."""
        return [row for row in self.rows.values() if row["stage"] == stage]

    def add(self, case: Case, finding: Finding, seconds: float) -> None:
        """A row, on disk before this returns."""
        row = dict(
            stage=case.stage,
            name=case.name,
            **dataclasses.asdict(finding),
            seconds=round(seconds, 3),
            sources=self.sources,
            device=self.machine["device"],
        )
        with self._lock:
            self.rows[case.stage, case.name] = row
            with (self.work / ROWS).open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{case.stage}: {case.name}: {finding.outcome} {finding.why}".rstrip(), flush=True)
            if time.monotonic() - self._published > PUBLISH_EVERY_S:
                self._publish()

    def publish(self) -> str:
        """Write the files that leave the machine; returns the table."""
        with self._lock:
            return self._publish()

    def _publish(self) -> str:
        self._published = time.monotonic()
        rows = list(self.rows.values())
        text = table.text(self.machine, rows)
        summary: dict[str, Any] = dict(machine=self.machine, sources=self.sources, counts=table.counts(rows))
        summary["rows"] = [table.brief(row) for row in rows]
        for folder in (self.work, self.out):
            write_atomically(folder / TABLE, text)
            write_atomically(folder / SUMMARY, json.dumps(summary, indent=1))
        pack(self.work, self.out / ARCHIVE)
        return text

    @property
    def faults(self) -> list[dict[str, Any]]:
        """Rows that are not as they should be."""
        return [row for row in self.rows.values() if row["outcome"] in FAULTS]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file; a last line that was cut short is none."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def pack(folder: Path, archive: Path) -> None:
    """The folder's files as an archive, of long logs the end."""
    new = archive.with_name(archive.name + ".new")
    with tarfile.open(new, "w:gz") as tar:
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in KEPT):
            try:
                info = tar.gettarinfo(path, str(path.relative_to(folder)))
                content = path.read_bytes()
            except OSError:  # of a case that runs meanwhile, and has taken its file away
                continue
            if path.suffix == ".log":
                content = content[-LOG_BYTES:]
            info.size = len(content)  # what was read: such a case's log grows, or begins anew
            tar.addfile(info, io.BytesIO(content))
    os.replace(new, archive)


KEPT = (".jsonl", ".json", ".md", ".log", ".txt")
"""What of the work folder is results; checkpoints and caches stay."""


def unpack(archive: Path, folder: Path) -> None:
    """An archive's files into a folder."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
