# SPDX-License-Identifier: Apache-2.0
"""Registers, shared memory and spills of the Triton kernels against ``triton_resources-<version of Triton>.json``.

Compiles the kernels as their launchers do, for an A100 and an H100 (no GPU needed), in every dtype, and reads what
ptxas says of their code, which differs from one Triton to the next. An op's ``triton`` module says what is compiled, in
``launches``. Any spill, any serialised wgmma, any block that asks for more shared memory than there is, any growth, and
any kernel that only one side knows fails. Of a Triton that has no table all but the last two are looked for.
``--update`` rewrites the installed Triton's table, with ``--only`` the rows that are looked at: do that when the growth
is meant, and say why in the commit. For another Triton: ``python -m venv other && other/bin/pip install --no-deps
triton==<version>``, torch beside it, and run this with its Python.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # products and sums fuse, as everywhere; left unset, Triton 3.9 asks
os.environ["TRITON_INTERPRET"] = "0"  # interpreted kernels cannot be compiled; said before triton comes in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ctxfast import functional as functional  # enters all ops in the table
from ctxfast._core import registry
from ctxfast.ops.shared import triton_rows
from resources import Resources, compare, find_faults, format_table, parse_ptxas

# Op -> its module of launchers. It says with what kernels are launched (``launches``), which types arguments have whose
# names are not in ``TYPES`` below (``ARGUMENT_TYPES``), and whether matrices are multiplied (``HAS_PRODUCTS``).
MODULES = {
    name: spec.module("triton")
    for name, spec in registry.OPS.items()
    if any(implementation.name == "triton" for implementation in spec.impls)
}

VERSION = ".".join(triton.__version__.split(".")[:2])
TABLE = Path(__file__).with_name(f"triton_resources-{VERSION}.json")
ARCHS = (80, 90)
# Shared memory a block may ask for, in bytes. What is compiled for sm_80 runs on sm_86 and sm_89 too, which have less.
SHARED = {80: 99 * 1024, 90: 227 * 1024}
# Kind of product -> Triton's name of the tensors' dtype; tf32 is float32 under torch.backends.cuda.matmul.allow_tf32.
DTYPES = {"float32": "fp32", "tf32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# Arguments by type; what is in none of these lines is a tensor of the op's dtype.
TYPES = {name: "*fp32" for name in ("mean", "rstd", "partial", "losses", "lse", "delta")}
TYPES |= {name: "*i64" for name in ("seeds", "ids", "positions", "types", "tasks", "labels")}
TYPES |= {name: "fp32" for name in ("eps", "rescale", "softmax_scale")}
TYPES |= {
    name: "i32"
    for name in ("V", "stride", "stride_x", "stride_r", "stride_g", "stride_l", "stride_t", "stride_p", "stride_h")
}
TYPES |= {name: "i32" for name in ("rows", "programs", "threshold", "ignore_index", "grad_stride_t", "grad_stride_h")}
TYPES |= {name: "i32" for name in ("tokens", "sequences", "heads", "blocks", "pairs")}
TYPES |= {name: "i32" for name in ("M", "N", "K", "stride_w", "most", "window", "turned")}
TYPES |= {"cu_seqlens": "*i32"}
# Triton is told nothing about these; other numbers and pointers are multiples of 16, as in every model.
UNKNOWN = {"rows", "programs", "threshold", "ignore_index", "eps", "rescale"}
UNKNOWN |= {"tokens", "sequences", "heads", "blocks", "pairs", "softmax_scale", "V", "M"}
UNKNOWN |= {"most", "window", "turned"}


def launches(dtype: str, arch: int) -> Iterator[triton_rows.Launch]:
    """Every launch in the table; names begin with the op's."""
    for op, module in MODULES.items():
        if dtype == "tf32" and not getattr(module, "HAS_PRODUCTS", False):
            continue
        for name, *launch in module.launches(dtype, arch):
            yield f"{op} {name}", *launch
    if dtype != "tf32":
        kernel, tile = triton_rows.column_sums_kernel, dict(triton_rows.COLUMN_SUMS_TILE)
        yield "column_sums N=768", kernel, dict(N=768), tile


def compiled(op: str, kernel: Any, constants: dict[str, Any], tile: dict[str, int], dtype: str, arch: int) -> Any:
    """The kernel as its launcher would have it compiled."""
    options = {name: value for name, value in tile.items() if name.startswith("num_") or name == "maxnreg"}
    constants = constants | {name: value for name, value in tile.items() if name not in options}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    if constants.get("DROPOUT") is False:
        constants["seeds"] = None
    types = TYPES | getattr(MODULES.get(op), "ARGUMENT_TYPES", {})
    own = {name: value for name, value in constants.items() if str(value).startswith(("*", "tensordesc"))}
    types |= own
    constants = {name: value for name, value in constants.items() if name not in own}
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, "*" + DTYPES[dtype])
        if name not in UNKNOWN and signature[name] != "fp32" and not signature[name].startswith("tensordesc"):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def measure(name: str) -> tuple[Resources, list[str]]:
    """Of one launch of the table: registers a thread, shared memory and stack in bytes, and what is wrong with it."""
    arch, dtype, op = name.removeprefix("sm_").split()[:3]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        kernel = compiled(op, *_LAUNCHES[name], dtype, int(arch))
    rows = list(parse_ptxas(said.getvalue()).values())
    if len(rows) != 1 or not rows[0]["registers"]:
        raise SystemExit(f"triton_resources: ptxas says nothing of {name}:\n{said.getvalue()}")
    # The shared memory is none of the code's: Triton asks for all of it at launch.
    row = dict(registers=rows[0]["registers"], shared=kernel.metadata.shared, stack=rows[0]["stack"])
    return row, find_faults(row, said.getvalue(), SHARED[int(arch)])


_LAUNCHES: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {
    f"sm_{arch} {dtype} {name}": launch for arch in ARCHS for dtype in DTYPES for name, *launch in launches(dtype, arch)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="rewrite the table, or what --only keeps of it")
    parser.add_argument("--only", default="", help="keep rows that hold this text; others are not looked at")
    options = parser.parse_args()
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True  # a cached kernel says nothing
    names = [name for name in _LAUNCHES if options.only in name]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:  # the table goes along
        answers = dict(zip(names, pool.map(measure, names, chunksize=4)))
    measured = {name: row for name, (row, _) in answers.items()}
    print(format_table(measured, ("registers", "shared", "stack")))
    known = json.loads(TABLE.read_text(encoding="utf-8"))["kernels"] if TABLE.exists() else None
    if options.update:
        known = {name: row for name, row in (known or {}).items() if options.only not in name} | measured
        write(known)
        print(f"wrote {TABLE.name}: {len(measured)} kernels")
    problems = [(name, fault) for name, (_, faults) in sorted(answers.items()) for fault in faults]
    if known is not None:
        rows = {name: row | dict(spill_stores=0, spill_loads=0) for name, row in measured.items()}  # said above
        problems += compare({name: row for name, row in known.items() if options.only in name}, rows)
    for kernel, problem in problems:
        print(f"FAIL  {kernel}: {problem}", file=sys.stderr)
    if problems:
        raise SystemExit(f"triton_resources: {len(problems)} problems, Triton {VERSION}. If growth is meant: --update.")
    compared = f"as in {TABLE.name}" if known is not None else f"not compared: Triton {VERSION} has no table yet"
    print(f"triton_resources: {len(measured)} kernels {compared}; no spills, no products in series")


def write(kernels: dict[str, Resources]) -> None:
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(kernels.items()))
    temporary = TABLE.with_name(TABLE.name + ".tmp")
    head = f'{{\n "triton": {json.dumps(triton.__version__)},\n "kernels": {{\n'
    temporary.write_text(head + rows + "\n }\n}\n", encoding="utf-8")
    os.replace(temporary, TABLE)


if __name__ == "__main__":
    main()
