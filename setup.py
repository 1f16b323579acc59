# SPDX-License-Identifier: Apache-2.0
"""Builds the extension ``ctxfast._C`` with ``csrc/build.py``, and README as a package index shows it; everything else
about the package is in pyproject.toml.

The sources know neither torch nor, outside the bindings, Python. So this needs no torch, takes seconds, and the result
loads next to any torch and on machines without a GPU or driver. Settings (environment) are ``csrc/build.py``'s:
CTXFAST_CUDA, CTXFAST_CUDA_ARCHS, CXX and MAX_JOBS; CTXFAST_HOMEPAGE is where the repository is published.
"""

from __future__ import annotations

import os
import re
import sys
from email.parser import HeaderParser
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

import build as csrc

ROOT = Path(__file__).resolve().parent
# The first that reads pyproject.toml's license, as its standard has it since: others stop with a riddle.
OLDEST_SETUPTOOLS = 77
# Of benchmarks/: what needs a checkout.
NOT_INSTALLED = ("results", "gpu", "conftest.py", "test_bench.py")


class BuildExtension(build_ext):
    """``build_ext`` through ninja; objects stay in ``build/<abi>``: a second build does what changed."""

    def build_extension(self, ext: Extension) -> None:
        try:
            build = csrc.Build(dict(os.environ))
            name = build.extension(Path(self.get_ext_filename(ext.name)).name, self.distribution.get_version())
        except csrc.SettingError as error:
            raise SystemExit(f"error: {error}") from None
        if not build.run([name]):
            hint = " If only nvcc failed: CTXFAST_CUDA=0 builds without CUDA kernels." if build.cuda.nvcc else ""
            raise SystemExit(f"error: ctxfast: the extension did not build, see above.{hint}")
        target = Path(self.get_ext_fullpath(ext.name))
        csrc.place(build.folder / name, target)
        print(csrc.told(build, target.name))


class BuildPython(build_py):
    """``build_py`` that puts the benchmark suite into the package of a wheel, for ``ctxfast bench``."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # it is found beside the package
            return
        for source in (ROOT / "benchmarks").rglob("*"):
            path = source.relative_to(ROOT)
            if source.suffix in (".py", ".json") and path.parts[1] not in NOT_INSTALLED:
                target = Path(self.build_lib, "ctxfast", path)
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))


def homepage() -> str:
    """Where the repository is published: as the environment says, or as the sdist does that this is; else nothing."""
    given = os.environ.get("CTXFAST_HOMEPAGE", "").strip().rstrip("/")
    if given and not re.fullmatch(r"https?://\S+", given):
        raise SystemExit(
            f"error: ctxfast: CTXFAST_HOMEPAGE is {given!r}; expected an address that begins with https://."
        )
    if not given and (ROOT / "PKG-INFO").is_file():
        known = HeaderParser().parsestr((ROOT / "PKG-INFO").read_text(encoding="utf-8"))
        urls = dict(url.split(", ", 1) for url in known.get_all("Project-URL", ()))
        given = urls.get("Homepage", "")
    return given


def index_page(readme: str, home: str) -> str:
    """README for a page that has no files beside it: links to files lead to ``home``, if there is one."""
    if not home:
        return readme
    return re.sub(r"\]\((?![a-z]+:|#)([^)]+)\)", rf"]({home}/blob/main/\1)", readme)


def main() -> None:
    if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"error: ctxfast: setuptools {setuptools.__version__} does not read this pyproject.toml; expected "
            f"{OLDEST_SETUPTOOLS} or newer (pip install -U setuptools). Without it: python -m benchmarks.gpu.build "
            f"extension builds the extension in place."
        )
    extensions = []
    if sys.platform == "linux":
        every = [str(path.relative_to(ROOT)) for path in csrc.sources("*/*.cpp") + csrc.sources("*/*.cu")]
        extensions = [Extension("ctxfast._C", sources=every)]
    else:
        print(f"ctxfast: no compiled extension on {sys.platform}: it is built on Linux only.")
    home = homepage()
    urls = {"Homepage": home, "Changelog": f"{home}/blob/main/CHANGELOG.md", "Issues": f"{home}/issues"}
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
        long_description=index_page((ROOT / "README.md").read_text(encoding="utf-8"), home),
        long_description_content_type="text/markdown",
        project_urls=urls if home else {},
    )


if __name__ == "__main__":
    main()
