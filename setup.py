# SPDX-License-Identifier: Apache-2.0
"""Builds the extension ``ctxfast._C`` with ``csrc/build.py``; everything else about the package is in pyproject.toml.

The sources know neither torch nor, outside the bindings, Python. So this needs no torch, takes seconds, and the result
loads next to any torch and on machines without a GPU or driver. Settings (environment) are ``csrc/build.py``'s:
CTXFAST_CUDA, CTXFAST_CUDA_ARCHS, CXX and MAX_JOBS.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

import build as csrc

ROOT = Path(__file__).resolve().parent


class BuildExtension(build_ext):
    """``build_ext`` through ninja; objects stay in ``build/<abi>``: a second build does what changed."""

    def build_extension(self, ext: Extension) -> None:
        try:
            build = csrc.Build(dict(os.environ))
            name = build.extension(Path(self.get_ext_filename(ext.name)).name, self.distribution.get_version())
        except csrc.SettingError as error:
            raise SystemExit(f"error: {error}") from None
        cuda = build.cuda
        if not build.run([name]):
            hint = " If only nvcc failed: CTXFAST_CUDA=0 builds without CUDA kernels." if cuda.nvcc else ""
            raise SystemExit(f"error: ctxfast: the extension did not build, see above.{hint}")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not overwritten: a process that has the old one mapped keeps it.
        temporary = target.with_name(target.name + ".tmp")
        shutil.copyfile(build.folder / name, temporary)
        os.replace(temporary, target)
        print(f"ctxfast: built {target.name}: CPU kernels with {build.compiler}")
        if cuda.nvcc:
            print(f"ctxfast: CUDA kernels with nvcc {cuda.version} for {', '.join(cuda.archs)} and PTX")
        else:
            print(f"ctxfast: no CUDA kernels: {cuda.reason}")


def main() -> None:
    extensions = []
    if sys.platform == "linux":
        every = [str(path.relative_to(ROOT)) for path in csrc.sources("*/*.cpp") + csrc.sources("*/*.cu")]
        extensions = [Extension("ctxfast._C", sources=every)]
    else:
        print(f"ctxfast: no compiled extension on {sys.platform}: it is built on Linux only.")
    setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})


if __name__ == "__main__":
    main()
