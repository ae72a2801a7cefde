"""Builds kernels of csrc/cuda for the CPU that plays a GPU (emulation.h), and runs them.

library = emulated(Path("csrc/cuda/some_kernel.cu"))
x = library.tensor(torch.randn(64, 64))         # in memory whose end is guarded
for seed in range(20):
    library.run("launch_some_kernel", x, 64, seed=seed)   # a C function that returns null or a message
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import build_native

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
LIBRARY = tuple((source, *defined) for source, defined, _ in build_native.cuda_objects([]).values())
RUNTIME = ["machine", "memory", "races", "collectives", "bulk_copy", "wgmma"]
FLAGS = [
    "-std=c++17",
    "-march=native",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-DSHIFT_EMULATE",
    '-DSHIFT_ARCHS=""',
]
FLAGS += [
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-Wno-attributes",
    f"-I{CSRC}",
    f"-I{CSRC / 'cuda'}",
    f"-I{HERE}",
]
# The hooks that this option calls are in races.cpp; its own runtime library is not linked.
WATCH = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]


class EmulationError(Exception):
    """A launch ended with this message."""


def _compile(job: tuple[Path, list[str]], folder: Path) -> Path:
    """An object file, named by all that went into it, so that tests and processes share it."""
    source, flags = job
    command = ["g++", *flags, str(source)]
    headers = _contents(HERE) if source.parent == HERE and source.suffix == ".cpp" else _contents(HERE, CSRC)
    known = [*map(_told, command), _compiler(), headers, source.read_text()]
    digest = hashlib.sha256("\n".join(known).encode()).hexdigest()[:24]
    target = folder / f"{digest}.o"
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits, instead of compiling it, too
        if not target.exists():
            scratch = folder / f"{digest}.{os.getpid()}.o"
            done = subprocess.run([*command, "-c", "-o", str(scratch)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            scratch.rename(target)
    return target


def _told(word: str) -> str:
    """A word of the command, the same in any clone; of a shape's file what is in it."""
    named, _, path = word.partition("=")
    if named == "-DSHIFT_SHAPE":
        return named + Path(path.strip('"')).read_text()
    return word.replace(str(CSRC.parent), "")


@functools.cache
def _contents(*folders: Path) -> str:
    """Digest of every header there, read: to preprocess the sources takes a second of every process."""
    headers = sorted(p for folder in folders for p in folder.rglob("*.*h") if "cpu" not in p.parts)
    return hashlib.sha256(b"".join(p.read_bytes() for p in headers)).hexdigest()


@functools.cache
def _compiler() -> str:
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    return f"{version.splitlines()[0]}, Python {sys.version}"


@functools.cache
def emulated(*sources: Path | tuple, watched: bool = False) -> "Library":
    """``sources``, .cu files with extern "C" functions, as a library of the emulated GPU.

    Args:
        sources: each a path, or one with flags of its own.
        watched: see every single access (races, bytes out of bounds), at several times the run time.
    """
    folder = Path(tempfile.gettempdir()) / f"shift-emulation-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    jobs = [(HERE / f"{name}.cpp", ["-O3", *FLAGS]) for name in RUNTIME]
    # Kernels are compiled for few calls; what the runtime does is done for every access and every barrier.
    flags = ["-O1", *FLAGS, *(WATCH if watched else []), "-xc++"]
    for path, *own in (source if isinstance(source, tuple) else (source,) for source in sources):
        jobs.append((path, [*flags, *own]))
    if sources == LIBRARY:  # then it is a module for Python, too
        jobs.append((CSRC / "cuda" / "module.cpp", ["-O0", *FLAGS, *build_native.python_headers()]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(functools.partial(_compile, folder=folder), jobs))
    digest = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:24]
    library = folder / f"{digest}.so"
    if not library.exists():
        scratch = folder / f"{digest}.{os.getpid()}.so"
        subprocess.run(["g++", "-shared", "-o", str(scratch), *map(str, objects)], check=True)
        scratch.rename(library)
    return Library(library)


class Library:
    """A built library; each has a machine, and device memory, of its own."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.shift_emulation_allocate.restype = ctypes.c_void_p
        self.library.shift_emulation_allocate.argtypes = [ctypes.c_size_t]
        self.library.shift_emulation_seed.argtypes = [ctypes.c_uint64]
        self.library.shift_emulation_meetings.argtypes = [ctypes.c_uint]
        self.library.shift_emulation_meetings.restype = ctypes.c_uint64

    def tensor(self, values: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of ``values`` in the machine's device memory, good until ``free``."""
        values = values.contiguous()
        if not values.numel():
            return values
        address = self.library.shift_emulation_allocate(values.nbytes)
        memory = (ctypes.c_ubyte * values.nbytes).from_address(address)
        return torch.frombuffer(memory, dtype=values.dtype).view(values.shape).copy_(values)

    def run(self, name: str, *arguments: object, seed: int = 0) -> None:
        """Calls ``const char* name(arguments)``; tensors go as addresses, ints as int64.

        Raises:
            EmulationError: it returned a message.
        """
        self.library.shift_emulation_seed(seed)
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        message = function(
            *(
                ctypes.c_void_p(a.data_ptr())
                if isinstance(a, torch.Tensor)
                else ctypes.c_double(a)
                if isinstance(a, float)
                else ctypes.c_int64(a)
                if isinstance(a, int)
                else a
                for a in arguments
            )
        )
        if message is not None:
            raise EmulationError(message.decode())

    def free(self) -> None:
        """Gives all device memory back: no tensor of it may be used after."""
        self.library.shift_emulation_free()
