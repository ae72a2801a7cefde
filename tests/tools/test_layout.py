"""Imports run one way: benchmarks -> shift -> shift_kernels, and without circles between folders of shift."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import shift

ROOT = Path(__file__).parents[2]
BELOW = {"shift_kernels": set(), "shift": {"shift_kernels"}, "benchmarks": {"shift", "shift_kernels"}}
"""What each package may import of the others."""


def imported(path):
    """The modules of this repository that a file imports, at any place in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] in BELOW)


def room(parts):
    """The folder of shift that a module lies in, or the module itself at the top."""
    return parts[1].removesuffix(".py") if len(parts) > 1 else ""


@pytest.mark.parametrize("package", BELOW)
def test_no_package_imports_one_above_it(package):
    upwards = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / package).rglob("*.py")
        for name in imported(path)
        if name.partition(".")[0] not in BELOW[package] | {package}
    ]
    assert not upwards


def test_no_folders_of_shift_import_each_other():
    edges = {}
    for path in (ROOT / "shift").rglob("*.py"):
        here = room(path.relative_to(ROOT).parts)
        if here == "__init__":
            continue  # it only names what others made
        there = {room(name.split(".")) for name in imported(path) if name.startswith("shift.")}
        edges.setdefault(here, set()).update(there - {here})
    assert {"run", "schedules", "tasks"} <= edges.keys()
    list(graphlib.TopologicalSorter(edges).static_order())  # a circle is a CycleError that names it


def test_no_modules_of_shift_kernels_import_each_other_not_even_late():
    paths = (ROOT / "shift_kernels").rglob("*.py")
    modules = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths
    }
    edges = {}
    for module, path in modules.items():
        # A name is a module's, or a module itself. The package's face names what others made.
        there = {name if name in modules else name.rpartition(".")[0] for name in imported(path)}
        edges[module] = (there & modules.keys()) - {module, "shift_kernels"}
    assert "shift_kernels.dispatch" in edges["shift_kernels.api"]
    list(graphlib.TopologicalSorter(edges).static_order())


def test_the_first_import_is_cheap():
    code = (
        "import sys, shift; print([m for m in ('matplotlib', 'tyro', 'scipy', 'pandas') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_the_loop_in_the_docstring_of_shift_runs():
    lines = shift.__doc__.splitlines()
    code = "\n".join(line.removeprefix("    ") for line in lines if line.startswith("    ") or not line)
    names = {}
    exec(code, names)
    assert names["steps"] == names["step"] + 1
    assert names["loss"].isfinite()


def test_all_that_shift_exports_is_there():
    assert set(shift.__all__) <= set(dir(shift))
    assert (ROOT / "shift" / "py.typed").is_file()
