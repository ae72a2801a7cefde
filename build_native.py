"""Compiles csrc into shared libraries: plain C to the outside, for ctypes; no torch and no Python headers.

An object is compiled again only when its command, its source or a header that it includes has changed.
Whoever installs needs no build tool but the compilers.
"""

import os
import platform
import shlex
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SCRATCH = Path("build/native")  # stays: an editable install throws setuptools' own folder away

CPU_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-Wall"]
CPU_FLAGS += ["-Wno-psabi", "-Wno-ignored-attributes"]  # vectors wider than the portable build has registers
CPU_FLAGS += ["-Wno-uninitialized"]  # g++ 12 warns of its own intrinsics
ISAS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ["-mavx2", "-mfma"]
    avx512 = ["f", "dq", "vl", "bw"]
    ISAS["avx512"] = [f"-mavx512{part}" for part in avx512] + ["-mfma", "-mprefer-vector-width=512"]
    ISAS["avx512bf16"] = [*ISAS["avx512"], "-mavx512bf16"]

CUDA_ARCHS = "sm_80 sm_90a"
# ptxas says what a kernel takes of the chip; benchmarks/offline/compile_cuda.py reads it beside the object.
CUDA_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-Wall", "-Xptxas", "-v"]


def compiler():
    """The C++ compiler as a command, or None: $CXX, else the first of the usual names."""
    return _first("CXX", "c++", "g++", "clang++")


def nvcc():
    """The CUDA compiler as a command, or None: $CUDACXX, else nvcc."""
    return _first("CUDACXX", "nvcc", "/usr/local/cuda/bin/nvcc")


def cuda_archs():
    """Architectures to compile for: $CUDA_ARCHS, as "sm_80 sm_90a"; "default" is that; "" is none.

    Unset, none where there is no NVIDIA device: it takes minutes.
    """
    chosen = os.environ.get("CUDA_ARCHS", "default" if Path("/dev/nvidiactl").exists() else "")
    return (CUDA_ARCHS if chosen == "default" else chosen).split()


def cuda_sources():
    """What nvcc compiles, each to an object of its own."""
    return sorted(Path("csrc/cuda").glob("*.cu"))


def build_cpu_library(target, scratch=SCRATCH / "cpu", extra=()):
    """Compile csrc/cpu into ``target``: once for each instruction set, side by side, and link.

    Raises:
        RuntimeError: no compiler, or it failed; the message is what it said.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler found (set CXX, or install g++ or clang++)")

    def build(openmp):
        flags = [*cxx, *CPU_FLAGS, *openmp, *extra, "-c"]
        jobs = {"plan": [*flags, "csrc/cpu/plan.cpp"]}
        for isa, more in ISAS.items():
            jobs[isa] = [*flags, f"-DSHIFT_ISA={isa}", *more, "csrc/cpu/block.cpp"]
        compile_and_link(target, scratch, jobs, [*cxx, "-shared", *openmp, *extra])

    try:
        build(["-fopenmp"])
    except RuntimeError:
        build([])  # no OpenMP here (or a real error, which shows itself again): one thread


def build_cuda_library(target, scratch=SCRATCH / "cuda", archs=None):
    """Compile csrc/cuda into ``target`` for ``archs``, and link it with the static CUDA runtime.

    Args:
        target, scratch: the library; a folder for its objects and what the compiler said of each.
        archs: as nvcc names them; default :func:`cuda_archs`.

    Raises:
        RuntimeError: no architecture is asked for, no nvcc, or it failed; the message is what it said.
    """
    archs = cuda_archs() if archs is None else archs
    if not archs:
        raise RuntimeError("no NVIDIA device here, and CUDA_ARCHS is not set")
    cuda = nvcc()
    if cuda is None:
        raise RuntimeError("no nvcc found (put it on PATH, or set CUDACXX)")
    flags = [*cuda, *CUDA_FLAGS, f'-DSHIFT_ARCHS="{" ".join(archs)}"', "-c"]
    jobs = {}
    sources = cuda_sources()
    for source in sources:
        # A source named for an architecture is for that alone, the others for the rest; all are needed, so
        # where that leaves none, for any.
        own = [arch for arch in archs if _is_named_for(arch, source)]
        rest = [arch for arch in archs if not any(_is_named_for(arch, other) for other in sources)]
        code = [f"-gencode={_gencode(arch)}" for arch in own or rest or archs]
        jobs[source.stem] = [*flags, *code, str(source)]
    compile_and_link(target, scratch, jobs, [*cuda, "-shared", "-cudart", "static"])


def _is_named_for(arch, source):
    return source.stem.endswith("_" + arch.replace("_", ""))


def _gencode(arch):
    """Machine code; where the architecture has successors ("sm_90a" has none), also PTX for those."""
    virtual = arch.replace("sm_", "compute_")
    return f"arch={virtual},code={arch if arch[-1].isalpha() else f'[{arch},{virtual}]'}"


def _first(variable, *names):
    candidates = [os.environ[variable]] if os.environ.get(variable) else names
    return next((shlex.split(n) for n in candidates if shutil.which(shlex.split(n)[0])), None)


def compile_and_link(target, scratch, jobs, link):
    """Compile every job (name -> command) to an object in ``scratch``, side by side, and link them."""
    scratch.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    objects = [scratch / f"{name}.o" for name in jobs]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(compile_object, jobs.values(), objects))
    _run([*link, "-o", f"{target}.new", *map(str, objects)])
    os.replace(f"{target}.new", target)


def compile_object(command, out):
    """Run a compiler unless what it would make is there; its messages stay beside the object, as .log."""
    depends, record = out.with_suffix(".d"), out.with_suffix(".command")
    command = [*command, "-MD", "-MF", str(depends), "-o", str(out)]
    if _is_current(record, depends, shlex.join(command)):
        return
    record.unlink(missing_ok=True)
    start = time.time()
    out.with_suffix(".log").write_text(_run(command))
    record.write_text(shlex.join(command))
    os.utime(record, (start, start))  # what is edited while the compiler runs is newer


def _is_current(record, depends, command):
    if not record.exists() or record.read_text() != command:
        return False
    files = depends.read_text().split(":", 1)[1].replace("\\\n", " ").split()
    return all(Path(f).exists() and Path(f).stat().st_mtime < record.stat().st_mtime for f in files)


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
