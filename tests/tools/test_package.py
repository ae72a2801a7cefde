"""What is packed: the source distribution, the version, the scripts."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import shift_kernels
from shift_kernels import extras
from shift_kernels.console import CANCELLED, CLOSED_PIPE, INTERRUPTED, command
from shift_kernels.extras import MissingExtraError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = PROJECT["project"]["scripts"]
NOT_PACKED = (".ci/", ".gitignore")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The folder with what setuptools would pack into a source distribution."""
    out = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return out / "shift_kernels.egg-info"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_source_distribution_holds_every_file_so_that_its_tests_run(metadata):
    packed = set((metadata / "SOURCES.txt").read_text().splitlines())
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = {path for path in done.stdout.splitlines() if (ROOT / path).exists()}
    assert {path for path in tracked - packed if not path.startswith(NOT_PACKED)} == set()


def test_the_metadata_has_the_version_of_the_code(metadata):
    assert f"\nVersion: {shift_kernels.__version__}\n" in (metadata / "PKG-INFO").read_text()


def test_an_install_has_the_kernels_of_the_sources_that_it_comes_from(tmp_path):
    """By what it is known to tables of measurements: no file that counts is left out of a package."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    for note in (ROOT / "shift_kernels").glob("*.sources.txt"):  # which a build of the libraries leaves there
        shutil.copy(note, tmp_path / "shift_kernels")
    ask = "from shift_kernels import measured; print(measured.kernels_hash())"
    hashes = {
        subprocess.run([sys.executable, "-c", ask], cwd=folder, capture_output=True, check=True).stdout
        for folder in (ROOT, tmp_path)
    }
    assert len(hashes) == 1


def hides(folder, *modules):
    """The environment of a Python to which these modules are missing: it finds ``folder`` first."""
    for module in modules:
        text = f"raise ModuleNotFoundError(\"No module named '{module}'\", name={module!r})"
        (folder / f"{module}.py").write_text(text)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


CALL = (
    "import sys, importlib; m, f = sys.argv[1].split(':'); sys.exit(getattr(importlib.import_module(m), f)())"
)


@pytest.mark.parametrize(
    ("script", "missing", "extra"),
    [
        ("shift-train", "tyro", "train"),
        ("shift-compare", "safetensors", "train"),
        ("shift-eval", "matplotlib", "plots"),
        ("shift-landscape", "scipy", "landscape"),
    ],
)
def test_a_command_without_its_extra_says_which_in_one_line(script, missing, extra, tmp_path):
    command = [sys.executable, "-c", CALL, SCRIPTS[script]]
    done = subprocess.run(command, env=hides(tmp_path, missing), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    words = (
        f"{script} needs {missing}, which the extra '{extra}' installs: pip install 'shift-kernels[{extra}]'"
    )
    assert done.stderr.strip() == words


def test_what_is_exported_names_the_extra_that_is_missing(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "tyro" else object())
    with pytest.raises(MissingExtraError, match=r"shift needs tyro, .*pip install 'shift-kernels\[train\]'"):
        extras.require("train", "shift")


def test_an_import_error_of_our_own_is_no_missing_extra():
    assert extras.explained(ModuleNotFoundError("", name="shift_kernels.nothing"), "shift-train") is None


def test_a_command_whose_reader_has_gone_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "shift_kernels"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, "")


@pytest.mark.parametrize("resumable", [False, True])
def test_ctrl_c_is_one_line_and_an_exit_code(resumable, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    @command("shift-x", resumable)
    def main(argv=None):
        raise KeyboardInterrupt

    assert main([]) == (INTERRUPTED if resumable else CANCELLED)
    said = capsys.readouterr().err
    assert said.startswith("shift-x: interrupted")
    assert said.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_calls_a_function_that_exists(script):
    module, _, function = SCRIPTS[script].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
