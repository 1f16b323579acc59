# SPDX-License-Identifier: Apache-2.0
"""Registers, shared memory and spills of every CUDA kernel against the table ``resources.json``.

Compiles ``csrc/*/*.cu`` with nvcc alone (no GPU needed) for an A100 and an H100 and reads what
ptxas reports. Any spill, any growth, any kernel that only one side knows and any serialized wgmma fails. ``--update``
rewrites the table: do that when the growth is meant, and say why in the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import build

CSRC = Path(__file__).resolve().parent
TABLE = CSRC / "resources.json"
ARCHS = ("sm_80", "sm_90a")
COLUMNS = ("registers", "shared", "stack", "spill_stores", "spill_loads")

# What ptxas says where the products of Hopper's tensor cores wait for one another: C7510 and its neighbours.
SERIALIZED = re.compile(r".*wgmma\.mma_async instructions are serialized.*")

Resources = dict[str, int]


def parse_ptxas(text: str) -> dict[str, Resources]:
    """Mangled kernel name -> resources (bytes; registers a thread), from ``nvcc -Xptxas -v``."""
    kernels: dict[str, Resources] = {}
    current: Resources | None = None
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            current = kernels.setdefault(found[1], dict.fromkeys(COLUMNS, 0))
        elif "Function properties for" in line and not line.rstrip().endswith(tuple(kernels)):
            current = None  # a device function that was not inlined: its kernel's line counts it
        elif current is None:
            continue
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current["stack"], current["spill_stores"], current["spill_loads"] = map(int, found.groups())
        elif found := re.search(r"Used (\d+) registers", line):
            current["registers"] = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current["shared"] = int(shared[1]) if shared else 0
    return kernels


def readable_name(demangled: str) -> str:
    """``ns::kernel<args>`` of a demangled kernel, without return type and parameters.

    The unnamed namespace goes too: nvcc's name of it holds a hash of the file's path, so it differs between checkouts.
    """
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", demangled)
    name = re.sub(r"\([a-z ]+\)", "", name)  # casts of template arguments: (bool)1
    depth = 0
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:at]
            break
    return name.removeprefix("void ").strip()


def demangle(names: list[str]) -> dict[str, str]:
    answer = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(readable_name, answer.stdout.splitlines())))


def compare(table: Mapping[str, Resources], measured: Mapping[str, Resources]) -> list[tuple[str, str]]:
    """(kernel, problem) for every spill, growth, unknown and missing kernel; empty if there is none."""
    problems = []
    for kernel, now in sorted(measured.items()):
        if now["spill_stores"] or now["spill_loads"]:
            problems.append((kernel, f"spills {now['spill_stores']} B stored, {now['spill_loads']} B loaded"))
        if kernel not in table:
            problems.append((kernel, "is not in the table"))
            continue
        for column in ("registers", "shared", "stack"):
            if now[column] > table[kernel][column]:
                problems.append((kernel, f"{column} grew from {table[kernel][column]} to {now[column]}"))
    problems += [(kernel, "is in the table but no longer compiled") for kernel in sorted(set(table) - set(measured))]
    return problems


def find_faults(row: Resources, said: str, shared: int) -> list[str]:
    """What no kernel may have, whatever the table says; ``said``: ptxas's words."""
    faults = []
    if row["stack"]:  # no kernel has arrays of its own
        faults.append(f"spills: {row['stack']} B of stack")
    if row["shared"] > shared:
        faults.append(f"needs {row['shared']} B of shared memory, and no block gets more than {shared}")
    if found := SERIALIZED.search(said):
        faults.append(f"its products wait for one another: {found[0].strip()}")
    return faults


def format_table(measured: Mapping[str, Resources], columns: Sequence[str] = COLUMNS) -> str:
    width = max([len("kernel"), *map(len, measured)])
    lines = [f"{'kernel':<{width}}  " + "  ".join(f"{column:>12}" for column in columns)]
    for kernel, row in sorted(measured.items()):
        lines.append(f"{kernel:<{width}}  " + "  ".join(f"{row[column]:>12}" for column in columns))
    return "\n".join(lines)


def measure(nvcc: str, source: Path, arch: str) -> dict[str, Resources]:
    """Resources of one source for one architecture, keyed ``arch file kernel``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *build.OPTIMIZED, f"-I{CSRC}", "-cubin", f"-arch={arch}", "-Xptxas", "-v"]
        command += [str(source), "-o", str(Path(folder) / "kernel.cubin")]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise SystemExit(f"resources: {source.name} does not compile for {arch}:\n{answer.stderr}")
    if found := SERIALIZED.search(answer.stderr + answer.stdout):
        raise SystemExit(f"resources: {source.name}: its products wait for one another: {found[0]}")
    kernels = parse_ptxas(answer.stderr + answer.stdout)
    names = demangle(list(kernels)) if kernels else {}
    return {f"{arch} {source.relative_to(CSRC)} {names[name]}": row for name, row in kernels.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="rewrite resources.json")
    options = parser.parse_args()
    cuda = build.find_cuda(os.environ)
    if cuda.nvcc is None:
        raise SystemExit(f"resources: {cuda.reason}. Install the CUDA toolkit, or set CUDA_HOME to it.")
    jobs = [
        (source, arch)
        for source in build.sources("*/*.cu")
        for arch in ARCHS
        if build.arch_only(source) in (None, arch.removeprefix("sm_"))
    ]
    measured: dict[str, Resources] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for rows in pool.map(lambda job: measure(cuda.nvcc, *job), jobs):
            measured.update(rows)
    print(format_table(measured))

    if options.update:
        temporary = TABLE.with_name(TABLE.name + ".tmp")
        text = json.dumps({"nvcc": cuda.version, "kernels": measured}, indent=1, sort_keys=True)
        # One kernel a line: a diff then shows which kernel changed.
        text = re.sub(r"\{\s+([^{}]+?)\s+\}", lambda row: "{" + re.sub(r"\s+", " ", row[1]) + "}", text)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, TABLE)
        print(f"wrote {TABLE.name}: {len(measured)} kernels, nvcc {cuda.version}")
        return
    known = json.loads(TABLE.read_text(encoding="utf-8"))
    problems = compare(known["kernels"], measured)
    for kernel, problem in problems:
        print(f"FAIL  {kernel}: {problem}", file=sys.stderr)
    if problems:
        is_other = known["nvcc"] != cuda.version
        hint = f" (the table is of nvcc {known['nvcc']}, this is {cuda.version})" if is_other else ""
        raise SystemExit(f"resources: {len(problems)} problems{hint}. If meant: csrc/resources.py --update.")
    print(f"resources: {len(measured)} kernels as in the table, no spills")


if __name__ == "__main__":
    main()
