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

from build_native import ROOT, build_cpu_library, build_cuda_library

MODULES = {
    "shift_kernels._native": build_cpu_library,
    "shift_kernels._native_cuda": build_cuda_library,
}


def reason_file(module):
    """Where it is kept why a module was not built: as shift_kernels/compiled.py reads it."""
    return module.with_name(module.name.partition(".")[0] + ".reason.txt")


def copy_cuda_sources(folder):
    """Beside the package: shift_kernels/backends/cuda_shapes.py compiles kernels for one shape from them."""
    shutil.copytree(ROOT / "csrc" / "cuda", folder / "cuda", dirs_exist_ok=True)
    shutil.copy(ROOT / "csrc" / "block.h", folder)


class BuildModules(build_ext):
    """Goes on without what cannot be built; the modules side by side."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or len(MODULES)

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        reason = reason_file(target)
        reason.unlink(missing_ok=True)
        try:
            MODULES[ext.name](target)
        except RuntimeError as error:
            target.unlink(missing_ok=True)  # of an earlier build, from other sources
            reason.parent.mkdir(parents=True, exist_ok=True)
            reason.write_text(f"{error}\n")
            print(f"shift-kernels: installing without {ext.name}: {error}", file=sys.stderr)
        else:
            if "cuda" in ext.name and not self.inplace:
                copy_cuda_sources(target.parent / "csrc")

    def copy_extensions_to_source(self):
        """An editable install: the reasons, too."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            name = self.get_ext_filename(self.get_ext_fullname(ext.name))
            built, here = Path(self.build_lib, name), Path(__file__).parent / name
            reason_file(here).unlink(missing_ok=True)
            if reason_file(built).exists():
                here.unlink(missing_ok=True)
                shutil.copy(reason_file(built), reason_file(here))


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(name, [], optional=True) for name in MODULES],
        cmdclass={"build_ext": BuildModules},
    )
