# SPDX-License-Identifier: Apache-2.0
"""What this build and this machine can do: the compiled extension, its facts, devices.

Importing this module loads ``ctxfast._C`` if it was built, and touches no GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeVar

import torch

try:
    # torch comes first on purpose: its OpenMP pool is the one the kernels then share.
    _C = importlib.import_module("ctxfast._C")
except ImportError as error:
    _C, _IMPORT_ERROR = None, str(error)
else:
    _IMPORT_ERROR = ""

Function = TypeVar("Function", bound=Callable[..., Any])
_REINSTALL = "Build it with: pip install . (a C++17 compiler is all it needs)."
# What the extension calls dtypes.
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int8: "int8"}


def constant(function: Function) -> Function:
    """Marks a function that torch.compile runs while it traces, and whose result is a constant of the graph.

    As torch.compiler.assume_constant_result does; calling that would import all of torch.compile, and Triton with it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def extension() -> ModuleType | None:
    """The compiled extension, or None if it is not there (``why_no_extension`` says why)."""
    return _C


def why_no_extension() -> str:
    """One sentence: why there is no compiled extension, and the way out."""
    return f"the compiled extension ctxfast._C is not there ({_IMPORT_ERROR}). {_REINSTALL}"


@lru_cache(maxsize=1)
def build_info() -> dict[str, Any]:
    """Facts of the build, as recorded in the extension; {} without one."""
    return dict(_C.build_info()) if _C is not None else {}


@lru_cache(maxsize=1)
def is_mkl_slow() -> bool:
    """Whether torch multiplies float32 matrices by MKL on a processor that MKL was not made for.

    On two cores of a Zen 5 it reaches 199 GFLOP/s where oneDNN with packed weights reaches 427 (1024 x 768 by 3072 x
    768), 132 against 412 for 16 rows (2026-11).
    """
    if not torch.backends.mkl.is_available():
        return False
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return "AuthenticAMD" in file.read(4096)
    except OSError:
        return False


@constant
@lru_cache(maxsize=1)
def _cuda_versions() -> tuple[int, int]:
    """CUDA as the driver knows it (0: there is none) and as the kernels were compiled with it; 13000 is 13.0."""
    compiled = extension()
    assert compiled is not None  # why_no_cuda asked before
    return compiled.cuda_versions()


def _driver_objection() -> str | None:
    """None, or why this machine's driver cannot run the kernels of this build."""
    driver, runtime = _cuda_versions()
    if driver == 0 or driver // 1000 >= runtime // 1000:
        return None
    return (
        f"CUDA kernels were compiled with CUDA {_version(runtime)} and this machine's driver knows CUDA "
        f"{_version(driver)}. Install a newer driver, or rebuild with a CUDA {driver // 1000} toolkit (CUDA_HOME)."
    )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def why_no_cuda(arch: str | None = None) -> str | None:
    """None if CUDA kernels were compiled, those for ``arch`` alone too, and the driver is new enough for them; else one
    sentence why not and the way out.
    """
    if _C is None:
        return why_no_extension()
    info = build_info()
    if info.get("cuda"):
        if arch is None or arch in info["cuda_archs"]:
            return _driver_objection()
        listed = ", ".join(info["cuda_archs"])
        return f"CUDA kernels were compiled for {listed}; rebuild with CTXFAST_CUDA_ARCHS holding {arch}."
    return (
        f"CUDA kernels were not compiled ({info.get('cuda_reason') or 'no reason recorded'}). "
        f"Install the CUDA toolkit and build them: CTXFAST_CUDA=1 pip install --force-reinstall --no-deps "
        f"--no-binary ctxfast ctxfast (in a clone: a dot in place of the last word)."
    )


def is_triton_interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors (TRITON_INTERPRET=1): for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def allows_tf32() -> bool:
    """Whether float32 products on a GPU may be rounded to TensorFloat-32, as torch's own are.

    torch 2.9 has a second switch, and reading the first raises once the second has been set.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", "none")
    return bool(matmul.allow_tf32) if precision == "none" else precision == "tf32"


@constant
def compute_capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a GPU, None for the current one."""
    return torch.cuda.get_device_capability(index)


def why_no_triton(device: torch.device) -> str | None:
    """None if Triton kernels can run on this device, else one sentence why not."""
    if device.type != "cuda" and not (device.type == "cpu" and is_triton_interpreted()):
        return f"it runs on a CUDA GPU and the inputs are on {device}."
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)."
    if device.type == "cuda" and compute_capability(device.index) < (8, 0):
        major, minor = compute_capability(device.index)
        return f"it needs a GPU of compute capability 8.0 or newer and this one has {major}.{minor}."
    return None
