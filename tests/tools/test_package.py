"""What is packed: the source distribution, the version, the scripts."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import shift_kernels
from shift import requirements

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


@pytest.mark.parametrize("missing", requirements.NEEDED)
def test_a_missing_extra_is_told_with_its_remedy(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"needs {missing}, .*pip install 'shift-kernels\[train\]'"
    ):
        requirements.check()


def test_what_shift_needs_is_what_its_extra_installs():
    extra = " ".join(PROJECT["project"]["optional-dependencies"]["train"]).replace("-", "_")
    assert all(name in extra for name in requirements.NEEDED)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_calls_a_function_that_exists(script):
    module, _, function = SCRIPTS[script].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
