"""The build of the compiled parts: what is compiled again, and what an install does without."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Distribution

import build_native
import setup

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(build_native.compiler() is None, reason="needs a C++ compiler")
def test_an_object_is_compiled_again_only_when_something_has_changed(tmp_path, monkeypatch):
    runs = []
    run = build_native._run
    monkeypatch.setattr(build_native, "_run", lambda command: runs.append(command) or run(command))
    source, header = tmp_path / "a.cpp", tmp_path / "a.h"
    source.write_text('#include "a.h"\nint f() { return A; }')
    header.write_text("#define A 1")
    command = [*build_native.compiler(), "-c", str(source)]

    def compile_object(*more):
        build_native.compile_object([*command, *more], tmp_path / "a.o")
        return len(runs)

    assert compile_object() == 1
    assert compile_object() == 1
    header.write_text("#define A 2")
    assert compile_object() == 2
    assert compile_object("-O1") == 3
    header.write_text("not C++")
    with pytest.raises(RuntimeError, match=r"a\.h"):
        compile_object("-O1")
    with pytest.raises(RuntimeError, match=r"a\.h"):
        compile_object("-O1")  # a failure is no object


def test_architectures_come_from_the_environment(monkeypatch):
    for chosen, archs in (("", []), ("sm_90a", ["sm_90a"]), ("default", ["sm_80", "sm_90a"])):
        monkeypatch.setenv("CUDA_ARCHS", chosen)
        assert build_native.cuda_archs() == archs


@pytest.mark.parametrize(
    ("nvcc", "archs", "reason"),
    [
        ("/no/such/nvcc", "sm_80", "no nvcc found"),
        ("false", "sm_80", "false -"),
        ("nvcc", "", "CUDA_ARCHS is not set"),
    ],
)
def test_an_install_goes_on_without_the_cuda_library_and_says_so(
    nvcc, archs, reason, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("CUDACXX", nvcc)
    monkeypatch.setenv("CUDA_ARCHS", archs)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        setup,
        "LIBRARIES",
        {"cuda": lambda target: build_native.build_cuda_library(target, tmp_path / "objects")},
    )
    command = setup.BuildLibraries(Distribution())
    command.get_ext_fullpath = lambda name: str(tmp_path / "libshift_cuda.so")
    command.build_extension(SimpleNamespace(name="cuda"))
    said = capsys.readouterr().err
    assert said.startswith("shift-kernels: installing without libshift_cuda.so")
    assert reason in said
    assert not (tmp_path / "libshift_cuda.so").exists()
