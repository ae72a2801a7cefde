"""Write the tables of README.md and docs/ from the committed results.

    python -m benchmarks.readme            # write them
    python -m benchmarks.readme --check    # only say which differ; exit code 1 if any does

A table stands below its mark, ``<!-- table: NAME -->``, and ends at an empty line; the names are those of
``benchmarks.tables.TABLES``. What stands there is replaced, the rest of a file is left alone.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tables import TABLES
from shift.run.files import replace_atomically

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"^(?P<mark><!-- table: (?P<name>\w+) -->)\n(?:.+\n)*", re.MULTILINE)


def files() -> list[Path]:
    """The files that hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def updated(text: str) -> str:
    """The text with every table as the results have it.

    Raises:
        KeyError: a mark names no table.
    """
    return MARKED.sub(lambda m: f"{m['mark']}\n{TABLES[m['name']]()}\n", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table differs")
    args = parser.parse_args(argv)
    differ = [(path, new) for path in files() if (new := updated(old := path.read_text())) != old]
    for path, new in differ:
        print(f"{path.relative_to(ROOT)}: {'differs from the results' if args.check else 'written'}")
        if not args.check:
            replace_atomically(path, new.encode())
    return int(args.check and bool(differ))


if __name__ == "__main__":
    sys.exit(main())
