# SPDX-License-Identifier: Apache-2.0
"""Machine code of Hopper GPUs (SASS): compiled, disassembled, its control bits decoded.

Nobody documents the control bits; how they are read here is in ``decode``. ``lane.py`` follows the code.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import build
import toolchain

CSRC = Path(__file__).resolve().parent
PARAMETERS = 0x210  # of a kernel in constant bank 0, on sm_90


@dataclass
class Instruction:
    address: int
    text: str
    guard: str  # "", or the predicate with its "!"
    name: str  # with all its dots
    operands: list[str]
    waits: int  # a bit for each scoreboard
    read: int | None  # scoreboard released when operands are read
    write: int | None  # when the result is there
    stall: int

    @property
    def base(self) -> str:
        return self.name.split(".")[0]


@dataclass
class Code:
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # label -> index of its instruction


def decode(high: int) -> tuple[int, int | None, int | None, int]:
    """(waits, read, write, stall) of the upper 64 bits of an instruction."""
    control = high >> 41
    write, read = control >> 5 & 7, control >> 8 & 7
    return control >> 11 & 63, None if read == 7 else read, None if write == 7 else write, control & 15


def parse(disassembly: str) -> dict[str, Code]:
    """Mangled kernel -> code, from ``nvdisasm -c -hex``."""
    kernels: dict[str, Code] = {}
    code: Code | None = None
    pending: tuple[int, str] | None = None
    for line in disassembly.splitlines():
        if found := re.match(r"\s*\.text\.(\w+):", line):
            code = kernels.setdefault(found[1], Code())
        elif line.startswith("\t.section"):
            code = None
        elif code is None:
            continue
        elif found := re.match(r"\s*(\.L_\w+):", line):
            code.labels[found[1]] = len(code.instructions)
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/", line):
            pending = int(found[1], 16), found[2]
        elif pending and (found := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line)):
            address, text = pending
            guard = re.match(r"@(!?U?P\w+)\s+", text)
            name, _, rest = text[guard.end() if guard else 0 :].partition(" ")
            operands = [word.strip().replace(".reuse", "") for word in rest.split(",")] if rest else []
            code.instructions.append(
                Instruction(address, text, guard[1] if guard else "", name, operands, *decode(int(found[1], 16)))
            )
            pending = None
    return kernels


def is_poll(one: Instruction) -> bool:
    return one.base == "LDG" and "STRONG" in one.name


def is_publication(one: Instruction) -> bool:
    return one.base == "STG" and "STRONG" in one.name


def is_sent(one: Instruction) -> bool:
    """Whether it stores to another block's shared memory."""
    return one.base == "ST" and "STRONG" in one.name


def find_nvdisasm(nvcc: str) -> str | None:
    """On PATH, beside nvcc, or the one that Triton brings along."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(nvcc).resolve().parent]
    folders += [Path(place) / "backends/nvidia/bin" for place in (triton and triton.submodule_search_locations) or ()]
    return shutil.which("nvdisasm") or next(
        (found for folder in folders if (found := shutil.which("nvdisasm", path=str(folder)))), None
    )


def compile_kernels(source: str) -> dict[str, Code]:
    """Mangled kernel -> code of CUDA source text, for sm_90a; RuntimeError where a tool is missing."""
    cuda = toolchain.find_cuda(os.environ)
    nvdisasm = find_nvdisasm(cuda.nvcc) if cuda.nvcc else None
    if cuda.nvcc is None or nvdisasm is None:
        raise RuntimeError(cuda.reason or "no nvdisasm on PATH, beside nvcc or among Triton's files")
    with tempfile.TemporaryDirectory() as folder:
        path, cubin = Path(folder) / "kernel.cu", Path(folder) / "kernel.cubin"
        path.write_text(source, encoding="utf-8")
        command = [cuda.nvcc, *build.OPTIMIZED, f"-I{CSRC}", "-cubin", "-arch=sm_90a", str(path), "-o", str(cubin)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        shown = subprocess.run([nvdisasm, "-c", "-hex", str(cubin)], check=True, capture_output=True, text=True)
    return parse(shown.stdout)
