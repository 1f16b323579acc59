# SPDX-License-Identifier: Apache-2.0
"""Registers, shared memory and spills of the Triton kernels against the table ``triton_resources.json``.

Compiles the kernels as their launchers do, for an A100 and an H100 (no GPU needed), in every dtype, at BERT-Base's row
size and at the largest, and reads what ptxas reports. Any spill, any growth, and any kernel that only one side knows
fails.
``--update`` rewrites the table: do that when the growth is meant, and say why in the commit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # products and sums fuse, as everywhere; left unset, Triton 3.9 asks
os.environ["TRITON_INTERPRET"] = "0"  # interpreted kernels cannot be compiled; said before triton comes in
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from resources import COLUMNS, Resources, compare, format_table, parse_ptxas
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from ctxfast._core import triton_rows
from ctxfast.ops.add_layer_norm import triton as add_layer_norm
from ctxfast.ops.embed_layer_norm import triton as embed_layer_norm
from ctxfast.ops.linear_act import triton as linear_act
from ctxfast.ops.linear_cross_entropy import triton as linear_cross_entropy

TABLE = Path(__file__).with_name("triton_resources.json")
ARCHS = (80, 90)
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# Arguments by type; what is neither here nor a tensor of the op's dtype is an int32.
TYPES = {name: "*fp32" for name in ("mean", "rstd", "partial", "losses", "scale")}
TYPES |= {name: "*i64" for name in ("seeds", "ids", "positions", "types", "tasks", "labels")}
TYPES |= {name: "fp32" for name in ("eps", "rescale")}
NUMBERS = {"rows", "programs", "threshold", "ignore_index", "V", "stride", "stride_x", "stride_r", "stride_g"}
# Triton is told nothing about these; other numbers and pointers are multiples of 16, as in every model.
UNKNOWN = {"rows", "programs", "threshold", "ignore_index", "eps", "rescale"}

Launch = tuple[str, Any, dict[str, Any], dict[str, int]]


def launches() -> Iterator[Launch]:
    """(name, kernel, constants, tile) of every launch in the table."""
    for size in (768, 8192):
        for name, op, more in (
            ("add_layer_norm", add_layer_norm, dict(HAS_RESIDUAL=True, HAS_BIAS=True)),
            ("embed_layer_norm", embed_layer_norm, dict(HAS_TASK=True)),
        ):
            for dropout in (True, False):
                shared = dict(N=size, DROPOUT=dropout) | more
                where = f"N={size} {'dropout' if dropout else 'plain'}"
                yield (
                    f"{name} forward {where}",
                    op.triton_kernels.forward,
                    shared | dict(SAVE=True),
                    op.forward_tile(size),
                )
                backward = shared | (dict(SUMS=True, SUM_X=size <= 4096) if op is add_layer_norm else {})
                yield f"{name} backward {where}", op.triton_kernels.backward, backward, op.backward_tile(size)
    for activation in ("gelu", "gelu_tanh", "relu", "tanh"):
        shared, kernels = dict(N=3072, ACTIVATION=activation, HAS_BIAS=True), linear_act.triton_kernels
        yield f"linear_act forward {activation}", kernels.forward, shared, linear_act.tile(3072)
        yield f"linear_act backward {activation}", kernels.backward, shared | dict(SUMS=True), linear_act.tile(3072)
    for gradient in (True, False):
        kernel, tile = linear_cross_entropy.triton_kernels.softmax, linear_cross_entropy.tile(30522)
        yield f"linear_cross_entropy {'gradient' if gradient else 'loss'}", kernel, dict(GRADIENT=gradient), tile
    tile = dict(triton_rows.COLUMN_SUMS_TILE)
    yield "column_sums N=768", triton_rows.column_sums_kernel, dict(N=768), tile


def compiled(kernel: Any, constants: dict[str, Any], tile: dict[str, int], dtype: str, arch: int) -> Any:
    """The kernel as its launcher would have it compiled."""
    tile = dict(tile)
    warps = tile.pop("num_warps")
    constants = constants | tile
    if constants.get("DROPOUT") is False:
        constants["seeds"] = None
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "i32" if name in NUMBERS else TYPES.get(name, "*" + DTYPES[dtype])
        if name not in UNKNOWN:
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=warps))


def measure(kernel: Any, constants: dict[str, Any], tile: dict[str, int], dtype: str, arch: int) -> Resources:
    """What ptxas says of one launch."""
    ptx = compiled(kernel, constants, tile, dtype, arch).asm["ptx"]
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(arch).path, f"-arch={target}", "-v", source, "-o", Path(folder) / "kernel.cubin"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise SystemExit(f"triton_resources: ptxas refuses {kernel.__name__} for {target}:\n{answer.stderr}")
    (row,) = parse_ptxas(answer.stderr + answer.stdout).values()
    return {column: row[column] for column in COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="rewrite triton_resources.json")
    parser.add_argument("--only", default="", help="keep rows that hold this text; others are not looked at")
    options = parser.parse_args()
    if options.update and options.only:
        parser.error("--update rewrites the whole table: leave --only out.")
    measured = {
        f"sm_{arch} {dtype} {name}": measure(kernel, constants, tile, dtype, arch)
        for arch in ARCHS
        for dtype in DTYPES
        for name, kernel, constants, tile in launches()
        if options.only in f"sm_{arch} {dtype} {name}"
    }
    print(format_table(measured))
    if options.update:
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(measured.items()))
        temporary = TABLE.with_name(TABLE.name + ".tmp")
        head = f'{{\n "triton": {json.dumps(triton.__version__)},\n "kernels": {{\n'
        temporary.write_text(head + rows + "\n }\n}\n", encoding="utf-8")
        os.replace(temporary, TABLE)
        print(f"wrote {TABLE.name}: {len(measured)} kernels, Triton {triton.__version__}")
    known = json.loads(TABLE.read_text(encoding="utf-8"))
    problems = compare({name: row for name, row in known["kernels"].items() if options.only in name}, measured)
    for kernel, problem in problems:
        print(f"FAIL  {kernel}: {problem}", file=sys.stderr)
    if problems:
        hint = f" (the table is of Triton {known['triton']}, this is {triton.__version__})"
        raise SystemExit(f"triton_resources: {len(problems)} problems{hint}. If meant: --update.")
    print(f"triton_resources: {len(measured)} kernels as in the table, no spills")


if __name__ == "__main__":
    main()
