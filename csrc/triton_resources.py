# SPDX-License-Identifier: Apache-2.0
"""Registers, shared memory and spills of the Triton kernels against the table ``triton_resources.json``.

Compiles the kernels as their launchers do, for an A100 and an H100 (no GPU needed), in every dtype, and reads what
their code needs: kernels over rows at BERT-Base's row size and at the largest; attention in every plan of
``triton_plan``. Any spill, any growth, and any kernel that only one side knows fails.
``--update`` rewrites the table, with ``--only`` the rows that are looked at: do that when the growth is meant, and say
why in the commit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
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
from resources import Resources, compare, format_table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ctxfast.ops.add_layer_norm import triton as add_layer_norm
from ctxfast.ops.attention import triton_backward, triton_forward, triton_plan
from ctxfast.ops.embed_layer_norm import triton as embed_layer_norm
from ctxfast.ops.linear_act import triton as linear_act
from ctxfast.ops.linear_cross_entropy import triton as linear_cross_entropy
from ctxfast.ops.shared import triton_rows

TABLE = Path(__file__).with_name("triton_resources.json")
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
    name: "i32" for name in ("V", "stride", "stride_x", "stride_r", "stride_g", "stride_t", "stride_p", "stride_h")
}
TYPES |= {name: "i32" for name in ("rows", "programs", "threshold", "ignore_index", "grad_stride_t", "grad_stride_h")}
TYPES |= {name: "i32" for name in ("tokens", "sequences", "heads", "blocks", "pairs")}
TYPES |= {"cu_seqlens": "*i32"}
# ``scale`` is a tensor of linear_cross_entropy and a number of attention.
SCALE = {"linear_cross_entropy": "*fp32", "attention": "fp32"}
# Triton is told nothing about these; other numbers and pointers are multiples of 16, as in every model.
UNKNOWN = {"rows", "programs", "threshold", "ignore_index", "eps", "rescale"}
UNKNOWN |= {"tokens", "sequences", "heads", "blocks", "pairs", "softmax_scale"}

Launch = tuple[str, Any, dict[str, Any], dict[str, int]]


def launches(dtype: str, arch: int) -> Iterator[Launch]:
    """(name, kernel, constants, tile) of every launch in the table; names begin with the op's."""
    if dtype != "tf32":
        yield from row_launches()
    kind = dtype if dtype in ("float32", "tf32") else "half"
    for head_dim in (32, 48, 64, 128) if dtype in ("float32", "bfloat16") else (32, 64, 128):  # 48 is filled up to 64
        for plan in triton_plan.plans(head_dim, kind, arch // 10):
            for dropout in (True, False):
                shared = dict(
                    D=head_dim, BLOCK_D=triton_rows.block(head_dim), HAS_BIAS=True, DROPOUT=dropout,
                    PRECISION="tf32" if kind == "tf32" else "ieee", stride_d=1, grad_stride_d=1,
                )  # fmt: skip
                where = f"D={head_dim} {'dropout' if dropout else 'plain'} up to {plan.longest or 'any'}"
                for name, kernel, tile, more in attention_launches(plan):
                    sizes = dict(num_warps=tile.warps, num_stages=tile.stages)
                    yield f"attention {where} {name}", kernel, shared | more, sizes


def attention_launches(plan: triton_plan.Plan) -> Iterator[tuple[str, Any, triton_plan.Tile, dict[str, Any]]]:
    """(pass, kernel, tile, constants) of a plan, as ops/attention/triton.py launches it."""
    tile = plan.forward
    more: dict[str, Any] = dict(NEGATIVE=False, SAVE_LSE=True)
    if tile.pairs:
        yield "forward", triton_forward.forward_pairs, tile, more | dict(BLOCK_L=tile.rows, PAIRS=tile.pairs)
    else:
        single = 0 < plan.longest <= tile.columns
        more |= dict(BLOCK_M=tile.rows, BLOCK_N=tile.columns, SEARCH=256, SINGLE=single)
        yield "forward", triton_forward.forward_blocks, tile, more
    tile = plan.whole
    if tile is not None and tile.pairs:
        yield "backward", triton_backward.backward_pairs, tile, dict(BLOCK_L=tile.rows, PAIRS=tile.pairs)
    elif tile is not None:
        yield "backward", triton_backward.backward_whole, tile, dict(BLOCK_L=tile.rows)
    else:
        for name, tile in (("query", plan.query), ("key", plan.key)):
            kernel = getattr(triton_backward, f"backward_{name}")
            yield f"backward of {name}", kernel, tile, dict(BLOCK_M=tile.rows, BLOCK_N=tile.columns, SEARCH=256)


def row_launches() -> Iterator[Launch]:
    """The kernels over rows."""
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
                    triton_rows.forward_tile(size),
                )
                backward = shared | (dict(SUMS=True, SUM_X=size <= 4096) if op is add_layer_norm else {})
                yield f"{name} backward {where}", op.triton_kernels.backward, backward, triton_rows.backward_tile(size)
    for activation in ("gelu", "gelu_tanh", "relu", "tanh"):
        shared, kernels = dict(N=3072, ACTIVATION=activation, HAS_BIAS=True), linear_act.triton_kernels
        yield f"linear_act forward {activation}", kernels.forward, shared, linear_act.tile(3072)
        yield f"linear_act backward {activation}", kernels.backward, shared | dict(SUMS=True), linear_act.tile(3072)
    for gradient in (True, False):
        kernel, tile = linear_cross_entropy.triton_kernels.softmax, linear_cross_entropy.tile(30522)
        yield f"linear_cross_entropy {'gradient' if gradient else 'loss'}", kernel, dict(GRADIENT=gradient), tile
    tile = dict(triton_rows.COLUMN_SUMS_TILE)
    yield "column_sums N=768", triton_rows.column_sums_kernel, dict(N=768), tile


def compiled(op: str, kernel: Any, constants: dict[str, Any], tile: dict[str, int], dtype: str, arch: int) -> Any:
    """The kernel as its launcher would have it compiled."""
    options = {name: value for name, value in tile.items() if name.startswith("num_")}
    constants = constants | {name: value for name, value in tile.items() if name not in options}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    if constants.get("DROPOUT") is False:
        constants["seeds"] = None
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = SCALE[op] if name == "scale" else TYPES.get(name, "*" + DTYPES[dtype])
        if name not in UNKNOWN and signature[name] != "fp32":
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def measure(name: str) -> Resources:
    """Registers a thread, shared memory and stack in bytes of one launch of the table, as the driver would load it."""
    arch, dtype, op = name.removeprefix("sm_").split()[:3]
    kernel = compiled(op, *_LAUNCHES[name], dtype, int(arch))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {word: int(number) for word, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    if set(found) != {"REG", "STACK", "LOCAL"}:
        raise SystemExit(f"triton_resources: cuobjdump says nothing of {name}:\n{text}")
    # The shared memory is none of the cubin's: Triton asks for all of it at launch.
    return dict(registers=found["REG"], shared=kernel.metadata.shared, stack=found["STACK"] + found["LOCAL"])


def find_problems(table: dict[str, Resources], measured: dict[str, Resources]) -> list[tuple[str, str]]:
    """As ``resources.compare``. No kernel has arrays of its own, so what lies on a stack are spilled registers."""
    problems = compare(table, {name: row | dict(spill_stores=0, spill_loads=0) for name, row in measured.items()})
    problems += [(name, f"spills: {row['stack']} B of stack") for name, row in sorted(measured.items()) if row["stack"]]
    problems += [
        (name, f"needs {row['shared']} B of shared memory, and no block gets more than {SHARED[int(name[3:5])]}")
        for name, row in sorted(measured.items())
        if row["shared"] > SHARED[int(name[3:5])]
    ]
    return problems


_LAUNCHES: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {
    f"sm_{arch} {dtype} {name}": launch for arch in ARCHS for dtype in DTYPES for name, *launch in launches(dtype, arch)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="rewrite the table, or what --only keeps of it")
    parser.add_argument("--only", default="", help="keep rows that hold this text; others are not looked at")
    options = parser.parse_args()
    names = [name for name in _LAUNCHES if options.only in name]
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:  # the table goes along
        measured = dict(zip(names, pool.map(measure, names, chunksize=4)))
    print(format_table(measured, ("registers", "shared", "stack")))
    known = json.loads(TABLE.read_text(encoding="utf-8"))
    if options.update:
        if options.only and known["triton"] != triton.__version__:
            raise SystemExit(
                f"triton_resources: the table is of Triton {known['triton']} and this is {triton.__version__}; rows of "
                f"both cannot stand in one table. Leave --only out."
            )
        others = {name: row for name, row in known["kernels"].items() if options.only not in name}
        known = dict(triton=triton.__version__, kernels=others | measured)
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(known["kernels"].items()))
        temporary = TABLE.with_name(TABLE.name + ".tmp")
        head = f'{{\n "triton": {json.dumps(triton.__version__)},\n "kernels": {{\n'
        temporary.write_text(head + rows + "\n }\n}\n", encoding="utf-8")
        os.replace(temporary, TABLE)
        print(f"wrote {TABLE.name}: {len(measured)} kernels, Triton {triton.__version__}")
    problems = find_problems({name: row for name, row in known["kernels"].items() if options.only in name}, measured)
    for kernel, problem in problems:
        print(f"FAIL  {kernel}: {problem}", file=sys.stderr)
    if problems:
        hint = f" (the table is of Triton {known['triton']}, this is {triton.__version__})"
        raise SystemExit(f"triton_resources: {len(problems)} problems{hint}. If meant: --update.")
    print(f"triton_resources: {len(measured)} kernels as in the table, no spills")


if __name__ == "__main__":
    main()
