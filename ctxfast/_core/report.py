# SPDX-License-Identifier: Apache-2.0
"""What is said of an installation: versions, devices, build, and what its implementations have run on."""

from __future__ import annotations

import importlib.util
import platform
import sys
from importlib import metadata

import torch

from . import capability, registry


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def facts() -> dict[str, str]:
    """Versions, device and build of this installation, for ``show_config``, ``ctxfast info`` and benchmark files."""
    info = capability.build_info()
    rows = {
        "ctxfast": _version("ctxfast"),
        "python": f"{platform.python_version()} ({sys.platform}, {platform.machine()})",
        "torch": torch.__version__,
        "triton": _version("triton") if importlib.util.find_spec("triton") else "not installed",
        "cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads",
    }
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        rows["gpu"] = f"{torch.cuda.get_device_name()} (sm_{major}{minor}, {torch.cuda.device_count()} visible)"
    else:
        rows["gpu"] = "none visible to torch"
    extension = capability.extension()
    if extension is None:
        rows["extension"] = capability.why_no_extension()
        return rows
    rows["extension"] = f"{info.get('version', '?')}, compiled by {info.get('compiler', '?')}"
    rows["cpu kernels"] = f"{', '.join(info.get('cpu_isas', ()))}; this machine runs {extension.cpu_isa()}"
    missing = capability.why_no_cuda()
    rows["cuda kernels"] = missing or f"CUDA {info.get('cuda_version')}: {', '.join(info.get('cuda_archs', ()))}"
    return rows


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def show_config() -> str:
    """The rows of ``facts``, then each op's implementations, as text: what to paste into a bug report.

    In brackets stands what an implementation for GPUs has run on.
    """
    rows = facts() | {name: ", ".join(map(str, spec.all_impls)) for name, spec in registry.OPS.items()}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
