# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu.build extension|programs``: what ``csrc`` holds, built without setuptools.

- extension: ctxfast._C in place, as ``setup.py build_ext --inplace`` puts it there; needs pybind11 and ninja.
- programs: the CUDA test programs whose names hold one of NAME, all without; none is run.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import sysconfig
from collections.abc import Sequence

from .parts import ROOT, csrc


def version() -> str:
    """The package's, as pyproject.toml has it; tomllib is not in every Python."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def extension(build: csrc.Build, dry_run: bool) -> bool:
    name = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not build.run([build.extension(name, version())], *(("-n",) if dry_run else ())):
        return False
    if not dry_run:
        csrc.place(build.folder / name, ROOT / "ctxfast" / name)
        print(csrc.told(build, name))
    return True


def programs(build: csrc.Build, names: Sequence[str], emulated: bool) -> bool:
    if emulated and not build.cuda_headers:
        raise csrc.SettingError("nothing built for the emulator: CUDA's headers come with its toolkit or with Triton")
    if not emulated and not build.cuda.nvcc:
        raise csrc.SettingError(f"CUDA programs not built: {build.cuda.reason}")
    built = build.emulated_tests() if emulated else build.cuda_tests()
    chosen = [program for program in built if not names or any(name in program for name in names)]
    if not chosen:
        raise csrc.SettingError(f"no CUDA program holds {' or '.join(names)}; there are {', '.join(built)}")
    return build.run(chosen)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.build")
    parser.add_argument("what", choices=("extension", "programs"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a program's name; none for all")
    parser.add_argument("--emulated", action="store_true", help="programs for the emulator instead of a GPU")
    parser.add_argument("--dry-run", action="store_true", help="say what would be compiled of the extension")
    options = parser.parse_intermixed_args(argv)
    try:
        build = csrc.Build(dict(os.environ))
        if options.what == "extension":
            return int(not extension(build, options.dry_run))
        return int(not programs(build, options.names, options.emulated))
    except csrc.SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
