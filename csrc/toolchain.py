# SPDX-License-Identifier: Apache-2.0
"""What the build needs of the machine: nvcc and CUDA's headers, the C++ compiler, ninja; and the settings that name
them (``build.py`` lists these)."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_ARCHS = "80;86;89;90a"


class SettingError(Exception):
    """A setting from the environment that cannot be followed."""


@dataclass
class Cuda:
    """The CUDA compiler and what to compile for; ``reason`` says why ``nvcc`` is None."""

    nvcc: str | None = None
    version: str = ""
    archs: tuple[str, ...] = ()
    reason: str = ""
    flags: list[str] = field(default_factory=list)
    link_flags: list[str] = field(default_factory=list)


def parse_cuda_mode(text: str | None) -> str:
    """``auto``, ``0`` or ``1`` from the value of CTXFAST_CUDA (None: not set)."""
    mode = "auto" if text is None or not text.strip() else text.strip().lower()
    if mode not in ("auto", "0", "1"):
        raise SettingError(f"ctxfast: CTXFAST_CUDA is {text!r}; expected auto, 0 or 1.")
    return mode


def parse_archs(text: str | None) -> tuple[str, ...]:
    """Architectures from the value of CTXFAST_CUDA_ARCHS, e.g. ``80;90a`` -> ("80", "90a")."""
    words = re.split(r"[;,\s]+", (DEFAULT_ARCHS if text is None else text).strip())
    words = [word for word in words if word]
    for word in words:
        if not re.fullmatch(r"\d{2,3}[af]?", word) or int(word.rstrip("af")) < 80:
            raise SettingError(
                f"ctxfast: CTXFAST_CUDA_ARCHS holds {word!r}; expected numbers from 80 up like {DEFAULT_ARCHS}."
            )
    if not words:
        raise SettingError(f"ctxfast: CTXFAST_CUDA_ARCHS is empty; expected a list like {DEFAULT_ARCHS}.")
    return tuple(dict.fromkeys(words))


def find_nvcc(environ: Mapping[str, str]) -> tuple[str | None, str]:
    """Path of nvcc, or None and the reason."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = environ.get(name)
        if home:
            nvcc = Path(home) / "bin" / "nvcc"
            return (str(nvcc), "") if nvcc.is_file() else (None, f"{name} is {home}, which has no bin/nvcc")
    nvcc_on_path = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc_on_path:
        return nvcc_on_path, ""
    # The environment's own packages: with build isolation they are not on sys.path.
    for site in {sysconfig.get_path("purelib"), *sys.path}:
        for nvcc in sorted(Path(site or ".").glob("nvidia/*/bin/nvcc"), reverse=True):
            return str(nvcc), ""
    return None, "no nvcc in CUDA_HOME, on PATH or among NVIDIA's pip packages"


def find_cuda(environ: Mapping[str, str]) -> Cuda:
    """The CUDA toolkit as the settings want it; SettingError if it is required and not there."""
    mode = parse_cuda_mode(environ.get("CTXFAST_CUDA"))
    archs = parse_archs(environ.get("CTXFAST_CUDA_ARCHS"))
    if mode == "0":
        return Cuda(reason="built with CTXFAST_CUDA=0")
    nvcc, reason = find_nvcc(environ)
    version = ""
    if nvcc:
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
        release = re.search(r"release (\d+\.\d+)", answer.stdout)
        if release:
            version = release[1]
        else:
            nvcc, reason = None, f"{nvcc} --version does not answer like nvcc"
    if not nvcc:
        if mode == "1":
            raise SettingError(
                f"ctxfast: CTXFAST_CUDA=1 asks for CUDA kernels, but {reason}. Install the CUDA toolkit."
            )
        return Cuda(reason=reason)
    cuda = Cuda(nvcc, version, archs)
    # NVIDIA's pip packages of CUDA 12 put headers and libraries beside nvcc's folder, not inside.
    package = Path(nvcc).resolve().parents[1]
    if package.parent.name == "nvidia":
        cuda.flags = [f"-I{folder}" for folder in sorted(package.parent.glob("*/include"))]
        cuda.link_flags = [f"-L{folder}" for folder in sorted(package.parent.glob("*/lib"))]
    return cuda


def find_cuda_headers(environ: Mapping[str, str]) -> Path | None:
    """A folder that holds CUDA's headers, for the emulator: the toolkit's, or the one that Triton brings along."""
    folders = []
    nvcc, _ = find_nvcc(environ)
    if nvcc:
        dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        folders += [word[2:] for word in shlex.split(dry.replace("#$", "")) if word.startswith("-I")]
        folders += [line.split("=", 1)[1] + "/include" for line in dry.splitlines() if "TOP=" in line]
    triton = importlib.util.find_spec("triton")
    if triton:
        folders += [f"{place}/backends/nvidia/include" for place in triton.submodule_search_locations or ()]
    headers = ("cuda_fp16.h", "cuda_runtime_api.h")
    return next((Path(folder) for folder in folders if all(Path(folder, name).is_file() for name in headers)), None)


def find_cxx(environ: Mapping[str, str]) -> list[str]:
    """The C++ compiler's command."""
    for command in (environ.get("CXX"), "c++", "g++", "clang++"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
        if words and command == environ.get("CXX"):
            raise SettingError(f"ctxfast: CXX is {command!r}, which is not there; expected a C++17 compiler.")
    raise SettingError("ctxfast: no C++ compiler (c++, g++, clang++) on PATH. Install one or set CXX.")


def find_ninja() -> str:
    try:
        import ninja

        path = Path(ninja.BIN_DIR) / "ninja"
        if path.is_file():
            return str(path)
    except ImportError:
        pass
    on_path = shutil.which("ninja")
    if on_path is None:
        raise SettingError("ctxfast: ninja is not there. Install it: pip install ninja.")
    return on_path
