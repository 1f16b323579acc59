# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu.machine``: the GPU and its driver, versions, and what this build can do."""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from collections.abc import Sequence

import ctxfast

from . import device as _device

_PACKAGES = ("torch", "triton", "transformers", "numpy", "pytest", "pytest-xdist", "setuptools", "pybind11")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(argv: Sequence[str] | None = None) -> int:
    _, device = _device.start(argparse.ArgumentParser("python -m benchmarks.gpu.machine"), argv)
    if not device.is_stand_in:
        facts = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        subprocess.run(("nvidia-smi", f"--query-gpu={facts}", "--format=csv"), check=False)
    print(", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    ctxfast.show_config()
    from ctxfast._core import capability

    missing = capability.why_no_cuda()
    if missing is not None and not device.is_stand_in:
        print(f"no CUDA kernels: {missing}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
