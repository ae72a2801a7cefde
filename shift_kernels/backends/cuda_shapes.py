"""Kernels of the ``cuda`` backend compiled for one shape: sizes, options and plan are constants in them.

    compile_kernel   asked for by shift-calibrate; nvcc takes seconds to a minute for one
    kernel           looked up for every plan: one in the cache folder, else the kernel for any shape serves

A kernel is known by its shape (csrc/cuda/shape.h), its architecture and the sources that it comes from.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from shift_kernels import measured

FLAGS = [
    "-O3",
    "-std=c++17",
    "--expt-relaxed-constexpr",
    "-shared",
    "-cudart",
    "static",
    "-Xcompiler",
    "-fPIC",
]


class Shape(NamedTuple):
    """What a kernel is compiled for.

    Args:
        words: as the library's ``shape`` lists it.
        arch: as nvcc names it.
        operand: dtype of matmul operands, "bf16" or "fp16".
    """

    words: tuple[int, ...]
    arch: str
    operand: str


def kernel(shape: Shape) -> int:
    """Address of the function that launches the shape's own kernel, or 0. Compiles nothing."""
    path = _path(shape, measured.cache_folder())
    if path is None or not path.exists():
        return 0
    library = ctypes.CDLL(str(path))  # stays loaded
    return ctypes.cast(library.shift_cuda_run_shape, ctypes.c_void_p).value or 0


def compile_kernel(shape: Shape) -> Path:
    """Compile a shape's kernel into the cache folder, unless it is there.

    Raises:
        RuntimeError: no nvcc, no sources, or nvcc failed; the message is what it said.
    """
    path, sources = _path(shape, measured.cache_folder()), sources_folder()
    if path is None or sources is None:
        raise RuntimeError("the sources of the CUDA kernels were not installed")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = path.with_suffix(f".{os.getpid()}.txt")
    new = path.with_suffix(f".{os.getpid()}.new")
    listed.write_text(",".join(map(str, shape.words)))
    command = [*nvcc(), *FLAGS, *defined(shape, listed), f"-arch={shape.arch}"]
    command += ["-o", str(new), str(sources / "cuda" / "shape.cu")]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        os.replace(new, path)
    finally:
        listed.unlink()
        new.unlink(missing_ok=True)
    return path


def defined(shape: Shape, listed: Path) -> list[str]:
    """Flags that give ``shape.cu`` its shape, whose words are in a file."""
    family = "Sm90a" if shape.arch == "sm_90a" else "Sm80"
    return [f'-DSHIFT_SHAPE="{listed}"', f"-DSHIFT_ARCH={family}", f"-DSHIFT_OPERAND={shape.operand}"]


def nvcc() -> list[str]:
    """The compiler as a command: $CUDACXX, else nvcc.

    Raises:
        RuntimeError: there is none.
    """
    chosen = os.environ.get("CUDACXX")
    for command in [chosen] if chosen else ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        if shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    raise RuntimeError("no nvcc found (put it on PATH, or set CUDACXX)")


@functools.cache
def sources_folder() -> Path | None:
    """``csrc``: of the repository, or as it was installed."""
    package = Path(__file__).parents[1]
    return next(
        (f for f in (package.parent / "csrc", package / "csrc") if (f / "cuda/shape.cu").exists()), None
    )


def _path(shape: Shape, folder: Path) -> Path | None:
    if sources_folder() is None:
        return None
    digest = hashlib.sha256(repr((tuple(shape), _sources_digest())).encode()).hexdigest()[:24]
    return folder / "cuda" / f"{digest}.so"


@functools.cache
def _sources_digest() -> str:
    folder = sources_folder()
    assert folder is not None, "asked by those who have them"
    digest = hashlib.sha256()
    for path in [folder / "block.h", *sorted((folder / "cuda").rglob("*.*h")), folder / "cuda" / "shape.cu"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
