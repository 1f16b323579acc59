# SPDX-License-Identifier: Apache-2.0
"""Registers, shared memory and spills of the Triton kernels of ``attention``, compiled without a GPU.

``python tests/ops/attention_resources.py`` compiles every plan of the table for sm_80 and sm_90 with bias and dropout
(the most registers) and without dropout, prints a line each and fails if one spills. ``--only TEXT`` keeps the lines
that hold TEXT, e.g. "sm_90 bfloat16 D64".
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled; before triton comes in
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ctxfast.ops.attention import triton_backward, triton_forward, triton_plan
from ctxfast.ops.attention.triton_plan import Plan, Tile

# dtype -> Triton's name of it, kind of product; tf32 is float32 under torch.backends.cuda.matmul.allow_tf32
_DTYPES = {
    "float32": ("fp32", "float32"),
    "tf32": ("fp32", "tf32"),
    "float16": ("fp16", "half"),
    "bfloat16": ("bf16", "half"),
}
_ARCHS = (80, 90)
_HEAD_DIMS = (32, 48, 64, 128)
# Arguments by type; what is not here is an int32. Those of the first two lines are in the tensors' own dtype.
_OWN = {"qkv", "bias", "out", "grad_out", "grad_qkv"}
_TYPES = {"cu_seqlens": "*i32", "lse": "*fp32", "delta": "*fp32", "seeds": "*i64"}
_TYPES |= {"scale": "fp32", "softmax_scale": "fp32", "rescale": "fp32"}
# Triton is told nothing about these, as in do_not_specialize; other numbers and pointers are multiples of 16.
_UNKNOWN = {"tokens", "sequences", "heads", "blocks", "pairs", "threshold", "scale", "softmax_scale", "rescale"}


def launches(head_dim: int, dtype: str, arch: int, dropout: bool) -> Iterator[tuple[str, Any, Tile, dict[str, Any]]]:
    """(name, kernel, tile, constexprs) of every launch that the table can choose."""
    shared = dict(
        D=head_dim, BLOCK_D=triton_plan.block_d(head_dim), HAS_BIAS=True, DROPOUT=dropout,
        PRECISION="tf32" if dtype == "tf32" else "ieee",
    )  # fmt: skip
    for plan in triton_plan.plans(head_dim, _DTYPES[dtype][1], arch // 10):
        for name, kernel, tile, more in _launches_of(plan):
            yield f"up to {plan.longest or 'any'} {name}", kernel, tile, shared | more


def _launches_of(plan: Plan) -> Iterator[tuple[str, Any, Tile, dict[str, Any]]]:
    tile = plan.forward
    more = dict(NEGATIVE=False, SAVE_LSE=True)
    if tile.pairs:
        yield "forward", triton_forward.forward_pairs, tile, more | dict(BLOCK_L=tile.rows, PAIRS=tile.pairs)
    else:
        more |= dict(BLOCK_M=tile.rows, BLOCK_N=tile.columns, SEARCH=256)
        single = 0 < plan.longest <= tile.columns
        yield "forward", triton_forward.forward_blocks, tile, more | dict(SINGLE=single)
    tile = plan.whole
    if tile is not None and tile.pairs:
        yield "backward", triton_backward.backward_pairs, tile, dict(BLOCK_L=tile.rows, PAIRS=tile.pairs)
    elif tile is not None:
        yield "backward", triton_backward.backward_whole, tile, dict(BLOCK_L=tile.rows)
    else:
        for name, tile in (("query", plan.query), ("key", plan.key)):
            kernel = getattr(triton_backward, f"backward_{name}")
            yield f"backward {name}", kernel, tile, dict(BLOCK_M=tile.rows, BLOCK_N=tile.columns, SEARCH=256)


def measure(kernel: Any, tile: Tile, constants: dict[str, Any], dtype: str, arch: int) -> dict[str, int]:
    """Registers a thread, shared memory and stack (spills) in bytes, as the driver would load the kernel."""
    constants = dict(constants) | {name: 1 for name in ("stride_d", "grad_stride_d") if name in kernel.arg_names}
    if not constants["DROPOUT"]:
        constants["seeds"] = None
    signature, attributes = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "*" + _DTYPES[dtype][0] if name in _OWN else _TYPES.get(name, "i32")
        if name not in _UNKNOWN:
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = dict(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    if set(found) != {"reg", "stack", "local"}:
        raise SystemExit(f"attention_resources: cuobjdump says nothing of registers:\n{text}")
    return dict(registers=found["reg"], shared=compiled.metadata.shared, spills=found["stack"] + found["local"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="keep lines that hold this text")
    options = parser.parse_args()
    spilled = count = 0
    for arch in _ARCHS:
        for dtype in _DTYPES:
            for head_dim in _HEAD_DIMS:
                for dropout in (True, False):
                    prefix = f"sm_{arch} {dtype} D{head_dim} {'dropout' if dropout else 'plain'}"
                    for name, kernel, tile, constants in launches(head_dim, dtype, arch, dropout):
                        line = f"{prefix} {name}"
                        if options.only not in line:
                            continue
                        row = measure(kernel, tile, constants, dtype, arch)
                        count += 1
                        spilled += row["spills"] > 0
                        figures = "  ".join(f"{column} {number:>6}" for column, number in row.items())
                        print(f"{line:<52} {tile.warps} warps  {figures}", flush=True)
    print(f"{count} kernels, {spilled} spill")
    if spilled or not count:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
