"""File an archive of results: ``python -m benchmarks.gpu.collect results.tar.gz``.

It goes to ``benchmarks/results/<device>/``: summary.json, table.md, and tuned.json and the measured tables
where there are such. An earlier report of that device is replaced; version control keeps it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.results import SUMMARY, TABLE, unpack

RESULTS = Path(__file__).parents[1] / "results"
FILED = (SUMMARY, TABLE, "tuned.json", "measured")


def slug(name: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def collect(archive: Path, results: Path = RESULTS) -> Path:
    """File an archive; returns the folder.

    Raises:
        ValueError: it holds no summary.
    """
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch)
        unpack(archive, found)
        if not (found / SUMMARY).is_file():
            raise ValueError(f"{archive} holds no {SUMMARY}: is it what benchmarks/gpu/run.sh wrote?")
        device = json.loads((found / SUMMARY).read_text())["machine"]["device"]
        folder = results / slug(device)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        for name in FILED:
            source = found / name
            if source.is_dir():
                shutil.copytree(source, folder / name)
            elif source.exists():
                shutil.copy(source, folder / name)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: benchmarks/results")
    args = parser.parse_args(argv)
    try:
        print(collect(args.archive, args.results))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
