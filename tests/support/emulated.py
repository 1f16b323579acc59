# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels on the CPU: their sources compiled as C++ for the emulator, their Python run on CPU tensors."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ctxfast._core import capability

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc"))

import build as csrc


@functools.cache
def extension() -> ModuleType:
    """The bindings of the CUDA kernels, built for the emulator; what changed is built anew."""
    try:
        build = csrc.Build(dict(os.environ))
    except csrc.SettingError as error:
        pytest.skip(str(error))
    if build.cuda_headers is None:
        pytest.skip("needs CUDA's headers: install the CUDA toolkit or triton")
    library = build.emulated_extension("ctxfast_emulated.so")
    assert build.run([library])
    spec = importlib.util.spec_from_file_location("ctxfast_emulated", build.folder / library)
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
def operators(monkeypatch: pytest.MonkeyPatch, implementation: ModuleType) -> Iterator[None]:
    """Inside, the registered operators of an implementation and of its parts run on CPU tensors."""
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


@contextmanager
def kernels(monkeypatch: pytest.MonkeyPatch, implementation: ModuleType, seed: int = 0) -> Iterator[None]:
    """Inside, the kernels of an implementation run on CPU tensors, by the emulator.

    ``seed``: of the order in which threads run and stores arrive; 0 for the plain order.
    """
    emulator = extension()
    emulator.set_schedule(seed)
    both = Instead(emulator)
    monkeypatch.setattr(capability, "extension", lambda: both)
    with operators(monkeypatch, implementation):
        yield
