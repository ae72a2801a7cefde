"""The build of the compiled modules: what is compiled again, and what an install does without."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Distribution

import build_native
import setup

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(build_native.compiler() is None, reason="needs a C++ compiler")
def test_an_object_is_compiled_again_only_when_something_has_changed(tmp_path):
    source, header, target = tmp_path / "a b.cpp", tmp_path / "a.h", tmp_path / "liba.so"
    source.write_text('#include "a.h"\nint f() { return A; }')
    header.write_text("#define A 1")

    def change(file, text):
        later = file.stat().st_mtime + 10
        file.write_text(text)
        os.utime(file, (later, later))

    def build(*flags):
        compiler = build_native.compiler()
        jobs = {"a": ([*compiler, "-fPIC", "-DTEXT='$'", *flags], source)}
        build_native.ninja(target, tmp_path / "objects", jobs, [*compiler, "-shared"])
        return target.stat().st_ino  # linked anew

    first = build()
    assert build() == first
    change(header, "#define A 2")
    second = build()
    assert second != first
    third = build("-O1")
    assert third != second
    change(header, "not C++")
    for _ in range(2):  # a failure is no object
        with pytest.raises(RuntimeError, match=r"a\.h"):
            build("-O1")
    assert target.stat().st_ino == third


def test_architectures_come_from_the_environment(monkeypatch):
    for chosen, archs in (("", []), ("sm_90a", ["sm_90a"]), ("default", ["sm_80", "sm_90a"])):
        monkeypatch.setenv("CUDA_ARCHS", chosen)
        assert build_native.cuda_archs() == archs


@pytest.mark.parametrize(
    ("name", "environment", "reason"),
    [
        ("cuda", {"CUDACXX": "/no/such/nvcc", "CUDA_ARCHS": "sm_80"}, "no nvcc found"),
        ("cuda", {"CUDACXX": "false", "CUDA_ARCHS": "sm_80"}, "false -"),
        ("cuda", {"CUDACXX": "nvcc", "CUDA_ARCHS": ""}, "CUDA_ARCHS is not set"),
        ("cpu", {"CXX": "/no/such/g++"}, "no C++ compiler found"),
        ("cpu", {"CXX": "false"}, "false -"),
    ],
)
def test_an_install_goes_on_without_what_cannot_be_built_and_keeps_the_reason(
    name, environment, reason, tmp_path, monkeypatch, capsys
):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    build = {"cpu": build_native.build_cpu_library, "cuda": build_native.build_cuda_library}[name]
    monkeypatch.setitem(build_native.LIBRARIES, name, lambda target: build(target, tmp_path / "objects"))
    target = tmp_path / f"_{name}.so"
    target.write_text("of an earlier build")
    (tmp_path / f"_{name}.sources.txt").write_text("of an earlier build")
    command = setup.BuildModules(Distribution())
    command.get_ext_fullpath = lambda _: str(target)
    command.build_extension(SimpleNamespace(name=name))
    said = capsys.readouterr().err
    assert said.startswith(f"shift-kernels: installing without {name}")
    assert reason in said
    assert reason in (tmp_path / f"_{name}.reason.txt").read_text()
    assert not target.exists()
    assert not (tmp_path / f"_{name}.sources.txt").exists()


def test_a_library_is_known_by_its_sources_wherever_they_lie_and_not_by_its_bytes(tmp_path, monkeypatch):
    def build(at):
        monkeypatch.setattr(build_native, "ROOT", at)
        monkeypatch.setitem(build_native.LIBRARIES, "own", lambda target: target.write_bytes(os.urandom(8)))
        assert build_native.build("own", tmp_path / "own.cpython-311.so") is None
        return (tmp_path / "own.sources.txt").read_text()

    for folder in ("here", "there"):
        shutil.copytree(ROOT / "csrc", tmp_path / folder / "csrc")
        shutil.copy(ROOT / "build_native.py", tmp_path / folder)
    here = build(tmp_path / "here")
    assert build(tmp_path / "there") == here
    for changed in ("csrc/cuda/norm.cuh", "build_native.py"):
        with (tmp_path / "there" / changed).open("a") as file:
            file.write("\n")
        assert build(tmp_path / "there") != here
        shutil.copy(ROOT / changed, tmp_path / "there" / changed)
