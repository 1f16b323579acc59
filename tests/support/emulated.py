# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels on the CPU: their sources compiled as C++ for the emulator, their Python run on CPU tensors."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import ninja
import pybind11
import pytest
import torch

from ctxfast._core import capability

ROOT = Path(__file__).resolve().parents[2]
CSRC, FOLDER = ROOT / "csrc", ROOT / "build" / "emulated"


def _cuda_headers() -> list[str]:
    """Folders that hold cuda_fp16.h: the toolkit's, or those that Triton brings along."""
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True)
        found = [word[2:] for word in shlex.split(dry.stderr.replace("#$", "")) if word.startswith("-I")]
        found += [line.split("=", 1)[1] + "/include" for line in dry.stderr.splitlines() if "TOP=" in line]
        found = [folder for folder in found if (Path(folder) / "cuda_fp16.h").is_file()]
        if found:
            return found[:1]
    triton = importlib.util.find_spec("triton")
    for place in triton.submodule_search_locations or () if triton else ():
        folder = Path(place) / "backends" / "nvidia" / "include"
        if (folder / "cuda_fp16.h").is_file() and (folder / "cuda_runtime_api.h").is_file():
            return [str(folder)]
    pytest.skip("needs CUDA's headers: install the CUDA toolkit or triton")


@functools.cache
def extension() -> ModuleType:
    """The bindings of the CUDA kernels, built for the emulator; what changed is built anew."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    includes = [CSRC, CSRC / "emulator", pybind11.get_include()]
    includes += [sysconfig.get_path("include")]
    flags = [compiler, "-x", "c++", "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-DCTXFAST_EMULATE"]
    flags += ["-Wno-unknown-pragmas", *(f"-I{folder}" for folder in includes)]
    flags += [f"-isystem{folder}" for folder in _cuda_headers()]
    kernels = [path for path in sorted(CSRC.glob("*/*.cu")) if not path.name.startswith("test_")]
    # The emulator has a module of its own; the CPU's kernels stay where they are.
    sources = [*kernels, *sorted(CSRC.glob("*/bind_cuda*.cpp")), *sorted((CSRC / "emulator").glob("*.cpp"))]
    lines = [
        "rule cxx",
        f"  command = {shlex.join(map(str, flags))} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} -shared $in -o $out",
    ]
    objects = [f"{path.parent.name}_{path.stem}.o" for path in sources]
    lines += [f"build {target}: cxx {path}" for target, path in zip(objects, sources)]
    lines += [f"build ctxfast_emulated.so: link {' '.join(objects)}", ""]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "wb") as lock:  # several processes test
        fcntl.flock(lock, fcntl.LOCK_EX)
        (FOLDER / "build.ninja").write_text("\n".join(lines), encoding="utf-8")
        built = subprocess.run([f"{ninja.BIN_DIR}/ninja", "-C", str(FOLDER)], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:]
    spec = importlib.util.spec_from_file_location("ctxfast_emulated", FOLDER / "ctxfast_emulated.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Instead:
    """The compiled extension with some of its functions replaced by those of ``first``."""

    def __init__(self, first: Any) -> None:
        self._both = (first, capability.extension())

    def __getattr__(self, name: str) -> Any:
        first, rest = self._both
        return getattr(first, name) if hasattr(first, name) else getattr(rest, name)


@contextmanager
def kernels(monkeypatch: pytest.MonkeyPatch, implementation: ModuleType, seed: int = 0) -> Iterator[None]:
    """Inside, the registered operators of an implementation and of its parts run on CPU tensors, by the emulator.

    ``seed``: of the order in which threads run and stores arrive; 0 for the plain order.
    """
    emulator = extension()
    emulator.set_schedule(seed)
    both = Instead(emulator)
    monkeypatch.setattr(capability, "extension", lambda: both)
    library = torch.library.Library("ctxfast", "IMPL")
    parts = [each for each in vars(implementation).values() if isinstance(each, ModuleType)]
    for module in (implementation, *(part for part in parts if part.__package__ == implementation.__package__)):
        for name, kernel in (("_fwd", "_forward"), ("_bwd", "_backward")):
            if hasattr(module, name):
                library.impl(getattr(module, name)._schema.name.split("::")[1], getattr(module, kernel), "CPU")
    try:
        yield
    finally:
        library._destroy()
        monkeypatch.undo()
