"""Builds the compiled parts; everything declarative is in pyproject.toml.

csrc/cpu becomes shift_kernels/native/libshift_cpu.so, plain C to the outside, for ctypes. It needs a C++17
compiler and nothing else: no torch, no Python headers. Without a compiler, or if the build fails, the install
goes on without it and says so once; the torch backend then serves.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NAME = "shift_kernels.native.libshift_cpu"
SOURCES = Path("csrc/cpu")
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-Wall"]
FLAGS += ["-Wno-psabi", "-Wno-ignored-attributes"]  # vectors wider than the portable build has registers
FLAGS += ["-Wno-uninitialized"]  # g++ 12 warns of its own intrinsics
ISAS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ["-mavx2", "-mfma"]
    avx512 = ["f", "dq", "vl", "bw"]
    ISAS["avx512"] = [f"-mavx512{part}" for part in avx512] + ["-mfma", "-mprefer-vector-width=512"]
    ISAS["avx512bf16"] = [*ISAS["avx512"], "-mavx512bf16"]


def compiler():
    """The C++ compiler as a command, or None: $CXX, else the first of the usual names."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((shlex.split(n) for n in names if shutil.which(shlex.split(n)[0])), None)


def build_cpu_library(target, scratch, extra=()):
    """Compile csrc/cpu into ``target``: once for each instruction set, side by side, and link.

    Raises:
        RuntimeError: no compiler, or it failed; the message is what it said.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler found (set CXX, or install g++ or clang++)")
    scratch.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)

    def run(*args):
        done = subprocess.run([*cxx, *args, *extra], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join([*cxx, *args])}\n{done.stderr}")

    def build(openmp):
        flags = [*FLAGS, *openmp]
        jobs = [("plan", [])] + [("block", [f"-DSHIFT_ISA={isa}", *more]) for isa, more in ISAS.items()]
        objects = [str(scratch / f"{i}.o") for i in range(len(jobs))]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(
                pool.map(
                    lambda job, out: run(*flags, *job[1], "-c", str(SOURCES / f"{job[0]}.cpp"), "-o", out),
                    jobs,
                    objects,
                )
            )
        run("-shared", *openmp, "-o", f"{target}.new", *objects)
        os.replace(f"{target}.new", target)

    try:
        build(["-fopenmp"])
    except RuntimeError:
        build([])  # no OpenMP here (or a real error, which shows itself again): one thread


class BuildLibraries(build_ext):
    """Builds what needs no Python ABI, and goes on without what cannot be built."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            build_cpu_library(target, Path(self.build_temp) / "cpu")
        except RuntimeError as error:
            print(f"shift-kernels: installing without the CPU library: {error}", file=sys.stderr)


if __name__ == "__main__":
    setup(ext_modules=[Extension(NAME, [], optional=True)], cmdclass={"build_ext": BuildLibraries})
