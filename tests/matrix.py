"""``make matrix``: the tests that need neither Triton nor CUDA, with other versions of Python and torch.

    python tests/matrix.py                       # the pairs below
    python tests/matrix.py 3.12:2.15.0           # some of them

Each pair gets a virtual environment of its own under ``.venv-matrix``, which stays. A pair whose Python is
not here, or whose torch cannot be installed, is named and left out. The rows go to
``benchmarks/results/matrix.json``; those of pairs that did not run stay as they are, with their date.
"""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import date
from pathlib import Path
from shutil import which

ROOT = Path(__file__).parent.parent
VENVS = ROOT / ".venv-matrix"
RESULTS = ROOT / "benchmarks" / "results" / "matrix.json"
PAIRS = ("3.10:2.11.0", "3.11:2.13.0", "3.12:2.15.0", "3.13:2.14.1")
"""Python and torch: each from the oldest to the newest that is promised."""
VERSIONS = (
    "import platform, torch, numpy; print(platform.python_version(), torch.__version__, numpy.__version__)"
)
EXTRAS = ".[train,plots,landscape,hf,data]"
TESTS = ["tests/kernels", "tests/shift", "-k", "not triton and not cuda and not fuzz", "-m", "not gpu"]
TOOLS = [
    "setuptools>=77",
    "pybind11>=2.13",
    "ninja",
    "numpy<2.4",
    "pytest>=8",
    "pytest-xdist>=3.2",
    "hypothesis",
]


def interpreter(version: str) -> str | None:
    """The path of this Python: on PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    works = (
        str(p) for p in found if p and subprocess.run([p, "--version"], capture_output=True).returncode == 0
    )
    return next(works, None)


def installed(version: str, torch: str) -> Path | None:
    """The Python of an environment that holds this torch and the package; None where it can't be had."""
    venv = VENVS / f"{version}-{torch}"
    python, ready = venv / "bin" / "python", venv / "ready"
    if not ready.exists():
        base = interpreter(version)
        if base is None:
            return None
        subprocess.run([base, "-m", "venv", "--clear", venv], check=True)
        pip = [python, "-m", "pip", "install", "-q", f"torch=={torch}", *TOOLS]
        if subprocess.run(pip, cwd=ROOT).returncode:
            return None
    pip = [python, "-m", "pip", "install", "-q", "--no-build-isolation", "-e", EXTRAS, f"torch=={torch}"]
    subprocess.run(pip, cwd=ROOT, check=True)
    ready.touch()
    return python


def tested(python: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped."""
    report = python.parents[1] / "report.xml"
    command = [python, "-m", "pytest", "-n", "auto", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    suite = ET.parse(report).getroot()[0]
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
    }


def main(pairs: list[str]) -> int:
    """Run the pairs; the exit code."""
    rows = {row["pair"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    failed = 0
    for pair in pairs or PAIRS:
        python = installed(*pair.split(":"))
        if python is None:
            print(f"{pair}: not to be had here")
            continue
        words = subprocess.run(
            [python, "-c", VERSIONS], capture_output=True, text=True, check=True
        ).stdout.split()
        row = {"pair": pair, **dict(zip(("python", "torch", "numpy"), words, strict=True)), **tested(python)}
        rows[pair] = row | {"date": date.today().isoformat()}
        failed += row["failed"]
        print(f"{pair}: {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped", flush=True)
        RESULTS.write_text(json.dumps([rows[key] for key in sorted(rows)], indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
