# SPDX-License-Identifier: Apache-2.0
"""A stand-in for Triton's driver: kernels are compiled for an H100 as on one, and launched nowhere. A process imports
it before anything else imports Triton; its CPU tensors take the roads of a GPU's."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace
from typing import Any

os.environ.update(TRITON_INTERPRET="0", TRITON_DEFAULT_FP_FUSION="1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

# Of every launch: the kernel's handle, which is its place among those that were loaded, the grid and the arguments.
launches: list[tuple[Any, ...]] = []
_loaded: list[str] = []


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        launches.append((function, (x, y, z), rest[4:]))  # after the metadata and hooks


class _Driver(DriverBase):
    def __init__(self) -> None:
        self.launcher_cls = _Launcher
        self.utils = SimpleNamespace(
            load_binary=self._load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: dict(max_shared_mem=232448, multiprocessor_count=132, warpSize=32),
        )

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        _loaded.append(name)
        return 1, len(_loaded), 32, 0, 1024

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return 9, 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Any:
        return None

    def get_empty_cache_for_benchmark(self) -> Any:
        return None

    def clear_cache(self, cache: Any) -> None:
        pass


triton.runtime.driver.set_active(_Driver())

from ctxfast import functional as functional  # noqa: E402  enters all ops in the table
from ctxfast._core import capability, registry  # noqa: E402
from ctxfast.ops.shared import triton_rows  # noqa: E402

capability.why_no_triton = lambda device: None
triton_rows.DISPATCH = "CPU"
for spec in registry.OPS.values():
    own = [dataclasses.replace(each, device="cpu") for each in spec.impls if each.name == "triton"]
    if own:
        object.__setattr__(spec, "impls", tuple(own))
