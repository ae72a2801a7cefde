"""Builds the compiled parts; everything declarative is in pyproject.toml.

Each becomes a library in shift_kernels/native; build_native.py tells how. What cannot be built, for want of
a compiler or because it failed, the install goes on without and says so once; the torch backend then serves.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))  # pip runs this file with another folder first

from build_native import build_cpu_library, build_cuda_library

LIBRARIES = {
    "shift_kernels.native.libshift_cpu": build_cpu_library,
    "shift_kernels.native.libshift_cuda": build_cuda_library,
}


class BuildLibraries(build_ext):
    """Builds what needs no Python ABI, and goes on without what cannot be built."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            LIBRARIES[ext.name](target)
        except RuntimeError as error:
            print(f"shift-kernels: installing without {target.name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(name, [], optional=True) for name in LIBRARIES],
        cmdclass={"build_ext": BuildLibraries},
    )
