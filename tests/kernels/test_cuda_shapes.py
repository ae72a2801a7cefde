"""Kernels of the cuda backend for one shape, on the emulated GPU; and how they are found."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_emulation import CSRC, LIBRARY, emulated
from test_cuda_resident import check, make, on_kernels

from shift_kernels import compiled
from shift_kernels.backends import cuda as cuda_backend
from shift_kernels.backends import cuda_shapes
from shift_kernels.call import CallOptions, Problem

needs_emulation = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
KB = 1024
BF16 = torch.bfloat16

# architecture, shared memory, batch, seq_len, block
SHAPES = {
    "split": ("sm_90a", 93 * KB, 2, 48, {"n_heads": 4, "n_kv_heads": 2, "norm_placement": "sandwich"}),
    "sm_80": (
        "sm_80",
        163 * KB,
        3,
        7,
        {"activation": "swiglu", "position": "rope", "norm_placement": "post"},
    ),
}


@pytest.fixture
def on(monkeypatch, tmp_path):
    """Puts the backend on an emulated GPU whose cache folder is empty."""
    monkeypatch.setenv("SHIFT_KERNELS_CACHE", str(tmp_path))

    def choose(arch, shared_bytes):
        module, _ = compiled.load("_native_cuda", Path(emulated(*LIBRARY).library._name))
        monkeypatch.setattr(cuda_backend, "_LIBRARY", module)
        monkeypatch.setattr(cuda_backend, "HOPPER", cuda_backend.Limits(shared_bytes, 132, arch == "sm_90a"))
        cuda_backend._prepared_on.cache_clear()

    yield choose
    cuda_backend._prepared_on.cache_clear()


def own_kernels(monkeypatch, tmp_path, watched=False):
    """Each shape has its own kernel from now on; returns those asked for, with their libraries."""
    asked = {}

    def kernel(shape):
        listed = tmp_path / f"{len(asked)}.txt"
        listed.write_text(",".join(map(str, shape.words)))
        source = (CSRC / "cuda" / "shape.cu", *cuda_shapes.defined(shape, listed))
        asked[shape] = emulated(source, watched=watched)
        return ctypes.cast(asked[shape].library.shift_cuda_run_shape, ctypes.c_void_p).value

    monkeypatch.setattr(cuda_shapes, "kernel", kernel)
    cuda_backend._prepared_on.cache_clear()
    return asked


@needs_emulation
@pytest.mark.parametrize("name", SHAPES)
def test_a_kernel_for_one_shape_is_right(on, monkeypatch, tmp_path, name):
    arch, shared_bytes, batch, seq_len, options = SHAPES[name]
    on(arch, shared_bytes)
    asked = own_kernels(monkeypatch, tmp_path)
    check(*make(batch, seq_len, **options), {"seq_lens": torch.arange(batch) + seq_len - batch})
    assert [shape.arch for shape in asked] == [arch, arch]  # forward and backward


@needs_emulation
def test_a_kernel_refuses_calls_of_another_shape(on, monkeypatch, tmp_path):
    on("sm_80", 163 * KB)
    block, e = make()
    weights = {name: w.detach() for name, w in block.weights().items()}
    own_kernels(monkeypatch, tmp_path)
    run = cuda_backend._LIBRARY.run

    class Mistaken:
        """The library, asked for a wider call with the narrow one's kernel."""

        def __getattr__(self, name):
            return getattr(cuda_library, name)

        def run(self, call, plan, *others):
            call.seq_len += 1
            run(call, plan, *others)

    cuda_library = cuda_backend._LIBRARY
    monkeypatch.setattr(cuda_backend, "_LIBRARY", Mistaken())
    with pytest.raises(RuntimeError, match="compiled for another shape"):
        cuda_backend.CUDA.forward(e, weights, block.spec, CallOptions(1, BF16), for_backward=False)


FAKE_NVCC = """#!/bin/sh
echo called >> {folder}/calls
{then}
while [ "$1" != -o ]; do shift; done
cp {library} "$2"
"""


def fake_nvcc(monkeypatch, tmp_path, then, library="/dev/null"):
    tool = tmp_path / "nvcc"
    tool.write_text(FAKE_NVCC.format(folder=tmp_path, then=then, library=library))
    tool.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(tool))


def problem(block, e, grad=True):
    return Problem(block.spec, *e.shape[:2], e.dtype, e.dtype, e.device, grad, n_loops=2)


@needs_emulation
def test_preparing_compiles_once_and_later_calls_find_it(on, monkeypatch, tmp_path):
    on("sm_90a", 227 * KB)
    block, e = make()
    asked = own_kernels(monkeypatch, tmp_path)
    cuda_backend._of_problem(problem(block, e, grad=False))
    monkeypatch.undo()
    monkeypatch.setenv("SHIFT_KERNELS_CACHE", str(tmp_path))
    on("sm_90a", 227 * KB)
    (shape,) = asked
    library = emulated(
        (CSRC / "cuda" / "shape.cu", *cuda_shapes.defined(shape, tmp_path / "0.txt"))
    ).library._name
    fake_nvcc(monkeypatch, tmp_path, "", library)
    describe = cuda_backend.CUDA.describe
    assert "compiled for any shape" in describe(problem(block, e, grad=False))
    assert cuda_shapes.kernel(shape) == 0
    said = []
    for _ in range(2):
        cuda_backend.CUDA.prepare(problem(block, e, grad=False), said.append)
    assert "forward for this shape" in said[0]
    assert (tmp_path / "calls").read_text().count("called") == 1
    assert "compiled for this shape" in describe(problem(block, e, grad=False))
    assert cuda_shapes.kernel(shape._replace(operand="fp16")) == 0
    assert not list(tmp_path.glob("cuda/*.new")) + list(tmp_path.glob("cuda/*.txt"))


@needs_emulation
def test_a_compiler_that_fails_leaves_the_kernel_for_any_shape(on, monkeypatch, tmp_path):
    on("sm_90a", 227 * KB)
    block, e = make()
    fake_nvcc(monkeypatch, tmp_path, "echo no licence >&2; exit 1")
    said = []
    cuda_backend.CUDA.prepare(problem(block, e), said.append)
    assert [line for line in said if "no licence" in line] == said
    assert len(said) == 2
    assert "compiled for any shape" in cuda_backend.CUDA.describe(problem(block, e))
    assert on_kernels(block, e, {})[0].isfinite().all()


def test_calls_compile_nothing(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a compiler was started"))
    shape = cuda_shapes.Shape((1, 2, 3), "sm_90a", "bf16")
    assert cuda_shapes.kernel(shape) == 0
