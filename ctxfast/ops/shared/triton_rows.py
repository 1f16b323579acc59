# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels over rows share: tiles, launches, dropout from a counter, sums of columns in a fixed order.

A kernel that sums over all rows runs a fixed number of programs; each adds up its rows in float32 registers and leaves
one row of partial sums, which ``column_sums`` adds in order. No atomics: two runs are equal to the last bit.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._core import capability, torch_ops
from . import triton_launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SIZE = 8192  # elements of a row in registers
SUMMED_SIZE = 4096  # elements of a row beside whose gradient three sums of columns have room
# Registers a thread of a LayerNorm's backward: five programs of 4 warps share an SM. (Left alone, compilers take fewer
# and spill, or more.) It waits for memory, so more warps are faster, as long as all have a place.
BACKWARD_REGISTERS = 96
IS_INTERPRETED = capability.is_triton_interpreted()
# The dispatch key of the operators: the interpreter computes on CPU tensors.
DISPATCH = "CPU" if IS_INTERPRETED else "CUDA"

ROUNDS = tl.constexpr(7)


# A kernel as csrc/triton_resources.py compiles it: its name in the table, the kernel, its constants (and, as "*fp32",
# types of tensors that are not of the op's dtype), its tile. An op's
# ``triton`` module lists its own: ``launches(dtype, arch)``, arch 80 or 90; dtype "float32", "float16", "bfloat16" or
# "tf32", which is float32 under torch.backends.cuda.matmul.allow_tf32.
Launch = tuple[str, Any, dict[str, Any], dict[str, int]]


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def block(size: int) -> int:
    """``size`` rounded up to a power of two, what tiles are made of."""
    return max(16, 1 << (size - 1).bit_length())


def why_not(name: str, tensor: Tensor) -> str | None:
    """None, or why no kernel takes such a tensor; ``name`` is the argument it came in."""
    return None if tensor.dtype in DTYPES else f"it takes float32, float16 and bfloat16 and {name} is {tensor.dtype}."


def why_no_row(name: str, rows: Tensor) -> str | None:
    """The same for a kernel that keeps whole rows in registers."""
    if rows.dtype in DTYPES and rows.shape[-1] > MAX_SIZE:
        return f"it takes rows of at most {MAX_SIZE} elements and {name} has {rows.shape[-1]}."
    return why_not(name, rows)


def forward_tile(size: int) -> dict[str, int]:
    """Of a LayerNorm: one row a warp as long as it fits there. No warp then waits for another."""
    if IS_INTERPRETED:
        return dict(BLOCK_N=block(size), ROWS=16, num_warps=1)
    return dict(BLOCK_N=block(size), ROWS=1, num_warps=max(1, block(size) // 1024))


def backward_tile(size: int, registers: int = BACKWARD_REGISTERS) -> dict[str, int]:
    """Of a LayerNorm: eight elements a thread, sixteen in the longest rows. Sums of columns stay in registers beside
    them: three for rows of at most ``SUMMED_SIZE``, else two."""
    if IS_INTERPRETED:
        return dict(BLOCK_N=block(size), ROWS=16, num_warps=1)
    rows = max(1, 1024 // block(size))
    tile = dict(BLOCK_N=block(size), ROWS=rows, num_warps=min(16, rows * block(size) // 256))
    return tile if size > SUMMED_SIZE else tile | dict(maxnreg=registers)


def resident(tile: dict[str, int]) -> int:
    """Programs that an SM has registers for."""
    return max(1, 65536 // (32 * tile["num_warps"] * tile.get("maxnreg", 128)))


def programs(tensor: Tensor, tiles: int, per_processor: int) -> int:
    """How many programs share ``tiles`` tiles of rows where each leaves partial sums."""
    processors = torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
    return max(1, min(tiles, processors * per_processor))


def rows(tensor: Tensor) -> Tensor:
    """(..., N) as (rows, N) whose elements lie side by side; rows may have any distance."""
    flat = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


@triton.jit
def reaches(first, second, third, fourth, odd, upper, high, threshold):
    """Whether 16 of the bits of four random words reach ``threshold``: ``odd``, ``upper`` and ``high``, where not zero,
    take the second word of a pair, the second pair and the high half of the word."""
    low_pair = tl.where(odd == 0, first, second)
    high_pair = tl.where(odd == 0, third, fourth)
    word = tl.where(upper == 0, low_pair, high_pair)
    bits = tl.where(high == 0, word & 0xFFFF, word >> 16)
    return bits.to(tl.int32) >= threshold


@triton.jit
def is_kept(seeds, row, column, threshold):
    """Which elements dropout keeps: 16 random bits each, kept where they reach ``threshold``.

    Philox4x32 with 7 rounds, the fewest that pass BigCrush (Salmon et al. 2011). One draw serves eight neighbouring
    columns, which lie in one thread: the compiler draws once for them.
    """
    seed, offset = tl.load(seeds), tl.load(seeds + 1)
    group = (column >> 3) + row * 0
    high = (row >> 32).to(tl.int32)
    first, second, third, fourth = tl.philox(
        seed, row.to(tl.int32), group.to(tl.int32), offset.to(tl.int32), high, ROUNDS
    )
    return reaches(first, second, third, fourth, column & 2, column & 4, column & 1, threshold)


@triton.jit
def load_tile(base, row, stride, inside, column, BLOCK_N: tl.constexpr):
    """Rows ``row`` of a matrix in float32, zeros where not ``inside``."""
    return tl.load(base + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def statistics(z, inside, eps, N: tl.constexpr):
    """(mean, 1 / deviation, normalised rows) of rows that are zero where not ``inside``; two passes in registers."""
    # Rounded to nearest: a row of equal values must not be left with a variance, beside which eps 1e-12 is nothing.
    mean = tl.div_rn(tl.sum(z, 1), N * 1.0)
    centred = tl.where(inside, z - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / N
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    return mean, rstd, centred * rstd[:, None]


@triton.jit
def normalised_gradient(grad, normal, rstd, N: tl.constexpr):
    """Gradient of the rows that went into a LayerNorm; ``grad`` is that of the normalised rows."""
    along = tl.sum(grad * normal, 1) / N
    mean = tl.sum(grad, 1) / N
    return (grad - normal * along[:, None] - mean[:, None]) * rstd[:, None]


@triton.jit
def store_partial(partial, which, program, sums, column, N: tl.constexpr):
    """One row of partial (kinds, programs, N)."""
    at = (which * tl.num_programs(0) + program).to(tl.int64) * N
    tl.store(partial + at + column, sums, mask=column < N)


@triton.jit(do_not_specialize=["programs"])
def column_sums_kernel(
    partial, first, second, third, programs, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):
    """partial (kinds, programs, N) -> first, second, third (N). Grid: (column blocks, kinds)."""
    which = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for at in range(0, programs, BLOCK_P):
        row = at + tl.arange(0, BLOCK_P)
        inside = (row < programs)[:, None] & (column < N)[None, :]
        index = (which * programs + row).to(tl.int64)[:, None] * N + column[None, :]
        sums += tl.load(partial + index, mask=inside, other=0.0)
    total = tl.sum(sums, 0)
    if which == 0:
        tl.store(first + column, total.to(first.dtype.element_ty), mask=column < N)
    elif which == 1:
        tl.store(second + column, total.to(second.dtype.element_ty), mask=column < N)
    else:
        tl.store(third + column, total.to(third.dtype.element_ty), mask=column < N)


COLUMN_SUMS_TILE = dict(BLOCK_P=32, BLOCK_N=64, num_warps=4)


def column_sums(partial: Tensor, sums: list[Tensor]) -> None:
    """Add up the programs of partial (kinds, programs, N) into one tensor (N) per kind, at most three."""
    kinds, count, size = partial.shape
    # A kind that is not there is never stored to, but a pointer must have a type.
    first, second, third = (*sums, *[sums[0]] * (3 - kinds))
    grid = (triton.cdiv(size, COLUMN_SUMS_TILE["BLOCK_N"]), kinds)
    triton_launch.launch(column_sums_kernel, grid, partial, first, second, third, count, N=size, **COLUMN_SUMS_TILE)


def allocate_partial(kinds: int, count: int, size: int, like: Tensor) -> Tensor:
    return torch_ops.allocate((kinds, count, size), like, torch.float32)
