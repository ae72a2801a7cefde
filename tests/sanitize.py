"""``make sanitize``: the CPU kernels' tests over a library built with AddressSanitizer and UBSan."""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

from build_native import build_cpu_library, compiler  # noqa: E402


def runtime(name: str) -> str:
    command = [*compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


with tempfile.TemporaryDirectory() as scratch:
    library = Path(scratch) / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
        "-g",
        "-fno-omit-frame-pointer",
    ]
    build_cpu_library(library, Path(scratch) / "objects", flags)
    environment = {
        **os.environ,
        "SHIFT_KERNELS_CPU_LIBRARY": str(library),
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # the interpreter's; huge sizes
    }
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "tests/kernels/test_cpu_backend.py",
        "tests/kernels/test_cpu_wide.py",
        *sys.argv[1:],
    ]
    sys.exit(subprocess.run(tests, env=environment).returncode)
