"""What is said where a compiled module is missing: once at the first slow call, and in full by shift-info."""

import json
import shutil
import subprocess
import sys

import pytest

from shift_kernels import compiled
from shift_kernels.info import report

WITHOUT_THE_CPU_MODULE = """
import importlib.util, json, warnings
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "shift_kernels._native" else found(name, *more)
import torch
from shift_kernels import BlockSpec, LoopedBlock

block, e = LoopedBlock(BlockSpec(d_model=8, n_heads=1)), torch.zeros(1, 2, 8)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        block(e, 1)
print(json.dumps([(w.category.__name__, str(w.message)) for w in said]))
"""


def test_a_slow_path_for_want_of_a_compiler_is_told_once():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_CPU_MODULE], capture_output=True, text=True, check=True
    )
    ((category, text),) = json.loads(run.stdout)
    assert category == "BackendFallbackWarning"
    assert "running on 'torch' because cpu: not built: " in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("no C++ compiler found (set CXX)\n", "no C++ compiler found (set CXX)"),
        ("FAILED: a.o\ng++ -c a.cpp\na.cpp:1:1: error: bad\nstopped", "a.cpp:1:1: error: bad"),
    ],
)
def test_the_line_of_the_compilers_that_says_most(words, line):
    assert compiled._first_error(words) == line


def test_shift_info_shows_what_the_compiler_said(monkeypatch):
    words = {"_native": "g++ -c a.cpp\na.cpp:1:1: error: bad", "_native_cuda": ""}
    monkeypatch.setattr(compiled, "reason", words.__getitem__)
    text = report()
    assert "why there is no _native:\n  g++ -c a.cpp\n  a.cpp:1:1: error: bad" in text
    assert "why there is no _native_cuda" not in text


def test_a_file_that_is_no_module_is_told(tmp_path):
    (tmp_path / "_native.so").write_text("nothing")
    module, status = compiled.load("_native", tmp_path / "_native.so")
    assert module is None
    assert status.startswith("built, but cannot be loaded: ")


@pytest.mark.skipif(compiled.load("_native")[0] is None, reason="needs the CPU library")
def test_a_module_from_another_file_is_another_one(tmp_path):
    """As an emulation of the CUDA kernels beside the kernels."""
    installed, _ = compiled.load("_native")
    copy = shutil.copy(installed.__file__, tmp_path / "copy.so")
    module, status = compiled.load("_native", copy)
    assert module is not None, status
    assert module is not installed
    assert module.kept_floats(module.Block(d_model=16, n_layers=1), bf16=False) == 32
