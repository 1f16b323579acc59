# SPDX-License-Identifier: Apache-2.0
"""What Triton kernels over rows share: statistics of LayerNorm, dropout from a counter, launches, sums of columns.

Imports Triton: only implementations named ``triton`` import this.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A program holds its rows in registers; beyond this they spill.
MAX_COLUMNS = 8192
# Elements of a program: enough bytes under way to fill the memory's pipe, few enough for registers.
_ELEMENTS = 4096
# Programs that sum columns, each over every so-many-th block of rows: two for each multiprocessor of an H100.
PARTIAL_SUMS = 264

_ROUNDS = tl.constexpr(7)  # of Philox, the fewest that pass BigCrush (Salmon et al. 2011)


@triton.jit
def is_kept(seeds, row, columns: tl.constexpr, threshold):
    """(rows, columns) which elements stay: 16 random bits each, kept where they reach ``threshold``.

    The counter is (row, column / 8, offset): the mask depends on nothing else, so every kernel draws the same.
    """
    seed, offset = tl.load(seeds), tl.load(seeds + 1)
    group = tl.arange(0, columns // 8)
    low = (row & 0xFFFFFFFF).to(tl.int32)[:, None] + tl.zeros((row.shape[0], columns // 8), tl.int32)
    words = tl.philox(seed, low, group[None, :] + tl.zeros_like(low), offset.to(tl.int32), 0, _ROUNDS)
    pairs = tl.join(tl.join(words[0], words[1]), tl.join(words[2], words[3]))  # (rows, columns / 8, 2, 2)
    bits = tl.join((pairs & 0xFFFF).to(tl.int32), (pairs >> 16).to(tl.int32) & 0xFFFF)
    return tl.reshape(bits, (row.shape[0], columns)) >= threshold


@triton.jit
def moments(x, inside, count, eps):
    """Mean and 1 / standard deviation of each row, float32, in two passes over registers."""
    mean = tl.sum(x, 1) / count
    apart = tl.where(inside, x - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(apart * apart, 1) / count + eps)


def tile(columns: int) -> dict[str, int]:
    """Rows and columns of a program, and its warps."""
    width = max(16, triton.next_power_of_2(columns))
    rows = max(1, min(16, _ELEMENTS // width))
    return dict(BLOCK_ROWS=rows, BLOCK=width, num_warps=8 if width > 2048 else 4)


def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """Threshold on 16 random bits, and one over the share it keeps."""
    threshold = min(round(dropout_p * 65536), 65535)
    return threshold, 65536 / (65536 - threshold)


def draw_seeds(like: Tensor, dropout_p: float) -> Tensor | None:
    """Seed and offset of one mask, drawn on the device: a captured graph draws new ones at every replay."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), device=like.device) if dropout_p > 0 else None


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def objection(name: str, tensor: Tensor, columns: int | None = None) -> str | None:
    """None, or why kernels over rows cannot take ``tensor``."""
    if tensor.dtype not in DTYPES:
        return f"it takes float32, float16 and bfloat16 and {name} is {tensor.dtype}."
    if columns is not None and columns > MAX_COLUMNS:
        return f"it takes rows of at most {MAX_COLUMNS} and {name} has {columns} columns."
    return None


def needs_grad(args: Mapping[str, Any], *names: str) -> bool:
    return torch.is_grad_enabled() and any(args[name] is not None and args[name].requires_grad for name in names)
