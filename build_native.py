"""Compiles csrc by ninja: g++ once for each instruction set of the CPU, and nvcc where there is one.

Each library has a build.ninja of its own in the folder of its objects. Ninja compiles again only what has
changed: a command, a source, or a header that it includes. Beside a library is the hash of its sources, or
the reason why there is none.
"""

import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SCRATCH = ROOT / "build" / "native"  # stays: an editable install throws setuptools' own folder away

CPU_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-Wall"]
CPU_FLAGS += ["-Wno-psabi", "-Wno-ignored-attributes"]  # vectors wider than the portable build has registers
CPU_FLAGS += ["-Wno-uninitialized"]  # g++ 12 warns of its own intrinsics
MODULE_FLAGS = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"]
ISAS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ["-mavx2", "-mfma"]
    avx512 = ["f", "dq", "vl", "bw"]
    ISAS["avx512"] = [f"-mavx512{part}" for part in avx512] + ["-mfma", "-mprefer-vector-width=512"]
    ISAS["avx512bf16"] = [*ISAS["avx512"], "-mavx512bf16"]

CUDA_ARCHS = "sm_80 sm_90a"
CUDA_DIRECTIONS = ("forward", "backward")
# ptxas says what a kernel takes of the chip; benchmarks/offline/compile_cuda.py reads it beside the object.
CUDA_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-Wall", "-Xptxas", "-v"]


def compiler():
    """The C++ compiler as a command, or None: $CXX, else the first of the usual names."""
    return _first("CXX", "c++", "g++", "clang++")


def nvcc():
    """The CUDA compiler as a command, or None: $CUDACXX, else nvcc."""
    return _first("CUDACXX", "nvcc", "/usr/local/cuda/bin/nvcc")


def _first(variable, *names):
    candidates = [os.environ[variable]] if os.environ.get(variable) else names
    return next((shlex.split(n) for n in candidates if shutil.which(shlex.split(n)[0])), None)


def cuda_archs():
    """Architectures to compile for: $CUDA_ARCHS, as "sm_80 sm_90a"; "default" is that; "" is none.

    Unset, none where there is no NVIDIA device: it takes minutes.
    """
    chosen = os.environ.get("CUDA_ARCHS", "default" if Path("/dev/nvidiactl").exists() else "")
    return (CUDA_ARCHS if chosen == "default" else chosen).split()


def cuda_objects(archs):
    """What nvcc compiles: name -> (source, definitions, architectures).

    A kernel each, so that they compile side by side: of a direction, a type of operands, and the family of
    architectures that it is written for.
    """
    source = ROOT / "csrc" / "cuda"
    hopper = [arch for arch in archs if arch == "sm_90a"]
    found = {"entry": (source / "entry.cu", [], archs)}
    families = [("Sm80", ("bf16", "fp16"), [arch for arch in archs if arch not in hopper])]
    families += [("Sm90a", ("bf16",), hopper)]
    for (family, operands, own), way in itertools.product(families, CUDA_DIRECTIONS):
        for operand in operands:
            defined = [f"-DSHIFT_ARCH={family}", f"-DSHIFT_BACKWARD={CUDA_DIRECTIONS.index(way)}"]
            defined += [f"-DSHIFT_OPERAND={operand}"]
            # The entry refers to all of them: where none of the architectures is a kernel's, it is for any.
            found[f"{family.lower()}_{way}_{operand}"] = (source / "resident.cu", defined, own or archs)
    return found


def build(name, target):
    """Build one of :data:`LIBRARIES` into ``target``; returns the reason where that cannot be, else None."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for note in notes(target):
        note.unlink(missing_ok=True)
    reason, sources = notes(target)
    try:
        LIBRARIES[name](target)
    except RuntimeError as error:
        target.unlink(missing_ok=True)  # of an earlier build, from other sources
        reason.write_text(f"{error}\n")
        return str(error)
    sources.write_text(f"{sources_hash()}\n")
    return None


def notes(library):
    """Beside a library: why it was not built, for shift_kernels/compiled.py; the hash of its sources."""
    stem = library.name.partition(".")[0]
    return library.with_name(f"{stem}.reason.txt"), library.with_name(f"{stem}.sources.txt")


def sources_hash():
    """Of all that the libraries are compiled from, and how: not of their bytes, which differ by machine."""
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")]
    digest = hashlib.sha256()
    for path in sorted([*sources, ROOT / "build_native.py"]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build_cpu_library(target, scratch=SCRATCH / "cpu", extra=()):
    """Compile csrc/cpu and its module into ``target``, for the Python that runs this.

    Args:
        target, scratch: the library; a folder for its objects.
        extra: more flags, for everything.

    Raises:
        RuntimeError: no compiler, or it failed; the message is what it said.
    """
    ninja(target, scratch, *cpu_library(extra))


def build_cuda_library(target, scratch=SCRATCH / "cuda", archs=None):
    """Compile csrc/cuda and its module into ``target`` for ``archs``, with the static CUDA runtime.

    Args:
        target, scratch: the library; a folder for its objects and what the compiler said of each.
        archs: as nvcc names them; default :func:`cuda_archs`.

    Raises:
        RuntimeError: no architecture is asked for, no nvcc, or it failed; the message is what it said.
    """
    ninja(target, scratch, *cuda_library(archs))


LIBRARIES = {"_native": build_cpu_library, "_native_cuda": build_cuda_library}
"""By the name of their module in shift_kernels."""


def cpu_library(extra=()):
    """What it is compiled from, name -> (command, source), and the command that links it."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler found (set CXX, or install g++ or clang++)")
    openmp = ["-fopenmp"] if _has_openmp(*cxx) else []  # without: one thread
    flags, source = [*cxx, *CPU_FLAGS, *openmp, *extra], ROOT / "csrc" / "cpu"
    jobs = {name: (flags, source / f"{name}.cpp") for name in ("entry", "team")}
    for isa, more in ISAS.items():
        jobs[isa] = ([*flags, f"-DSHIFT_ISA={isa}", *more], source / "block.cpp")
    jobs["module"] = ([*cxx, *MODULE_FLAGS, *python_headers(), *extra], ROOT / "csrc" / "module.cpp")
    return jobs, [*cxx, "-shared", *openmp, *extra]


def cuda_library(archs=None):
    """As :func:`cpu_library`."""
    archs = cuda_archs() if archs is None else archs
    if not archs:
        raise RuntimeError("no NVIDIA device here, and CUDA_ARCHS is not set")
    cuda = nvcc()
    if cuda is None:
        raise RuntimeError("no nvcc found (put it on PATH, or set CUDACXX)")
    flags = [*cuda, *CUDA_FLAGS, f'-DSHIFT_ARCHS="{" ".join(archs)}"']
    jobs = {
        name: ([*flags, *defined, *(f"-gencode={_gencode(arch)}" for arch in own)], source)
        for name, (source, defined, own) in cuda_objects(archs).items()
    }
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler found (set CXX, or install g++ or clang++)")
    jobs["module"] = ([*cxx, *MODULE_FLAGS, *python_headers()], ROOT / "csrc" / "cuda" / "module.cpp")
    return jobs, [*cuda, "-shared", "-cudart", "static"]


def _gencode(arch):
    """Machine code; where the architecture has successors ("sm_90a" has none), also PTX for those."""
    virtual = arch.replace("sm_", "compute_")
    return f"arch={virtual},code={arch if arch[-1].isalpha() else f'[{arch},{virtual}]'}"


def python_headers():
    """Flags that find Python's own headers and pybind11's."""
    import pybind11

    paths = sysconfig.get_paths()
    folders = dict.fromkeys([pybind11.get_include(), paths["include"], paths["platinclude"]])
    return [f"-I{folder}" for folder in folders]


@functools.cache
def _has_openmp(*cxx):
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }"
    command = [*cxx, "-fopenmp", "-xc++", "-", "-o", os.devnull]
    return subprocess.run(command, input=program, capture_output=True, text=True).returncode == 0


def ninja(target, scratch, jobs, link):
    """Write ``scratch``/build.ninja and run it: compile every job to an object, side by side, and link them.

    What a compiler said stays beside each object, as .log.

    Args:
        target: what is linked.
        scratch: a folder that may be there, with what an earlier build has left.
        jobs: name of an object -> (command, source).
        link: command.

    Raises:
        RuntimeError: a command failed; the message is what it said.
    """
    scratch, target = scratch.resolve(), target.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        "rule compile",
        "  command = $compiler -MD -MF $out.d -c $in -o $out > $log 2>&1 || { cat $log; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",  # beside the target first: a library that a process has loaded must not be written to
        "  command = $linker -o $out.new $in && mv $out.new $out",
    ]
    for name, (command, source) in jobs.items():
        lines.append(f"build {name}.o: compile {_path(source)}")
        lines += [f"  compiler = {_words(command)}", f"  log = {name}.log"]
    lines.append(f"build {_path(target)}: link {' '.join(f'{name}.o' for name in jobs)}")
    lines.append(f"  linker = {_words(link)}")
    (scratch / "build.ninja").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "ninja", "-C", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def _path(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _words(command):
    return shlex.join(command).replace("$", "$$")
