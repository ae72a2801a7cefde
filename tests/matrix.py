"""``make matrix``: the tests that need neither Triton nor CUDA, with other versions of Python and torch.

    python tests/matrix.py                       # the pairs below
    python tests/matrix.py 3.12:2.15.0           # some of them
    python tests/matrix.py 3.12:2.15.0 -- tests/kernels/test_module.py      # pytest's arguments

What is tested is the last commit, in a copy of its own, so that nothing here is compiled over. Each pair gets
a folder under ``.venv-matrix``, whose environment stays. A pair whose Python is not here, or whose torch
cannot be installed, is named and left out. The rows go to ``benchmarks/results/matrix.json``, with the tests
that ran, commit and date; those of pairs that did not run stay as they are.
"""

import json
import os
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import date
from pathlib import Path
from shutil import which

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".venv-matrix"
RESULTS = ROOT / "benchmarks" / "results" / "matrix.json"
PAIRS = ("3.10:2.11.0", "3.11:2.13.0", "3.12:2.15.0", "3.13:2.14.1")
"""Python and torch: each from the oldest to the newest that is promised."""
VERSIONS = (
    "import platform, torch, numpy; print(platform.python_version(), torch.__version__, numpy.__version__)"
)
EXTRAS = "train,plots,landscape,data"
LEFT_OUT = ("compare", "document", "landscape", "length", "report", "resume", "snapshots")
"""Files of tests/shift that take long and ask little of torch."""
TESTS = [
    "tests/kernels",
    "tests/shift",
    *("-k", "not triton and not cuda and not fuzz"),
    *("-m", "not gpu"),
    *(f"--ignore=tests/shift/test_{name}.py" for name in LEFT_OUT),
]
TOOLS = [
    "setuptools>=77",
    "pybind11>=2.13",
    "ninja",
    "numpy<2.4",
    "pytest>=8",
    "pytest-xdist>=3.2",
    "hypothesis",
    "tensorboard",
]


def interpreter(version: str) -> str | None:
    """The path of this Python: on PATH, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    works = (
        str(p) for p in found if p and subprocess.run([p, "--version"], capture_output=True).returncode == 0
    )
    return next(works, None)


def environment(home: Path, version: str, torch: str) -> Path | None:
    """The Python of an environment that holds this torch; None where it can't be had."""
    python, ready = home / "venv" / "bin" / "python", home / "ready"
    if not ready.exists():
        base = interpreter(version)
        if base is None:
            return None
        subprocess.run([base, "-m", "venv", "--clear", home / "venv"], check=True)
        if subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={torch}", *TOOLS]).returncode:
            return None
        ready.touch()
    return python


def copied(home: Path) -> Path:
    """The files of the last commit, in a folder of their own; of those that are there what has changed."""
    source = home / "source"
    source.mkdir(exist_ok=True)
    own = {"GIT_WORK_TREE": str(source), "GIT_INDEX_FILE": str(home / "index")}
    for command in ("read-tree -u --reset HEAD", "clean -fdq"):  # what is ignored stays: built objects
        subprocess.run(["git", *command.split()], cwd=source, check=True, env={**os.environ, **own})
    return source


def tested(python: Path, source: Path, version: str, torch: str, tests: list[str]) -> dict[str, int]:
    """Install the package from its source; how many tests passed, failed and were skipped."""
    extras = EXTRAS if version == "3.10" else f"{EXTRAS},hf"  # Transformers asks for 3.11
    here = ["--no-build-isolation", "-e", f".[{extras}]"]
    subprocess.run([python, "-m", "pip", "install", "-q", *here, f"torch=={torch}"], cwd=source, check=True)
    (source / "report.xml").unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-n", "auto", "--junitxml=report.xml", *tests]
    subprocess.run(command, cwd=source, env={**os.environ, "OMP_NUM_THREADS": "1"})
    suite = ET.parse(source / "report.xml").getroot()[0]
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return {"passed": passed, "failed": failed, "skipped": count["skipped"]}


def said(*command: str | Path) -> str:
    """What a command prints."""
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    at = argv.index("--") if "--" in argv else len(argv)
    pairs, tests = argv[:at], argv[at + 1 :] or TESTS
    about = {
        "tests": "pytest " + shlex.join(tests),
        "commit": said("git", "rev-parse", "HEAD"),
        "date": date.today().isoformat(),
    }
    failed = 0
    for pair in pairs or PAIRS:
        home, (version, torch) = FOLDER / pair.replace(":", "-"), pair.split(":")
        home.mkdir(parents=True, exist_ok=True)
        python = environment(home, version, torch)
        if python is None:
            print(f"{pair}: not to be had here")
            continue
        found = tested(python, copied(home), version, torch, tests)
        versions = dict(zip(("python", "torch", "numpy"), said(python, "-c", VERSIONS).split(), strict=True))
        rows = {row["pair"]: row for row in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
        rows[pair] = {"pair": pair, **versions, **found, **about}
        failed += found["failed"]
        print(f"{pair}: " + ", ".join(f"{n} {outcome}" for outcome, n in found.items()), flush=True)
        RESULTS.write_text(json.dumps([rows[key] for key in sorted(rows)], indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
