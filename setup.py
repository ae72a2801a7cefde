"""Builds the compiled modules; everything declarative is in pyproject.toml.

build_native.py tells how. What cannot be built, for want of a compiler or because it failed, the install goes
on without; the reason is kept beside where the module would be, for shift-info and the first slow call.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))  # pip runs this file with another folder first

from build_native import LIBRARIES, ROOT, build, notes


def copy_cuda_sources(folder):
    """Beside the package: shift_kernels/backends/cuda_shapes.py compiles kernels for one shape from them."""
    shutil.copytree(ROOT / "csrc" / "cuda", folder / "cuda", dirs_exist_ok=True)
    shutil.copy(ROOT / "csrc" / "block.h", folder)


class BuildModules(build_ext):
    """Goes on without what cannot be built; the modules side by side."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or len(LIBRARIES)

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        if reason := build(ext.name.rpartition(".")[2], target):
            print(f"shift-kernels: installing without {ext.name}: {reason}", file=sys.stderr)
        elif "cuda" in ext.name and not self.inplace:
            copy_cuda_sources(target.parent / "csrc")

    def copy_extensions_to_source(self):
        """An editable install: what stands beside the modules, too."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            name = self.get_ext_filename(self.get_ext_fullname(ext.name))
            built, here = Path(self.build_lib, name), Path(__file__).parent / name
            if not built.exists():
                here.unlink(missing_ok=True)
            for note, own in zip(notes(built), notes(here), strict=True):
                own.unlink(missing_ok=True)
                if note.exists():
                    shutil.copy(note, own)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"shift_kernels.{name}", [], optional=True) for name in LIBRARIES],
        cmdclass={"build_ext": BuildModules},
    )
