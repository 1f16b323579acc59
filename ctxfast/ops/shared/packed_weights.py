# SPDX-License-Identifier: Apache-2.0
"""Weights of linear layers as the compiled CPU products want them (csrc/linear_act/linear_act.h), made once."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import capability
from .definitions import whole_steps
from .weight_cache import WeightCache

_ANY = 1 << 62
_HUGE = 2 << 20  # bytes of a huge page
# Rows up to which the compiled bfloat16 product is at least as fast as oneDNN's, by instruction set (BERT's sizes,
# 2026-11: AMX 1.2 to 1.7 times at 16 rows, even at 128; AVX-512 BF16 1.3 times at 16, even from 128 on).
_FEW_ROWS = {"amx": 128, "avx512bf16": _ANY}

CACHE = WeightCache()


@lru_cache
def _most_rows(dtype: torch.dtype) -> int:
    extension = capability.extension()
    if extension is None:
        return 0
    # In float32 all: a row's bits would tell which product it went through.
    return _ANY if dtype is torch.float32 else _FEW_ROWS.get(extension.cpu_isa(), 0)


@capability.constant
def most_rows(dtype: torch.dtype) -> int:
    """Rows up to which the compiled product is taken."""
    return _most_rows(dtype)


def on_cache_line(size: int) -> Tensor:
    """``size`` bytes that begin on a cache line."""
    memory = torch.empty(size + 64, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % 64
    return memory[start : start + size]


def _room(size: int) -> Tensor:
    """``size`` bytes that begin on a cache line; most of a large weight on huge pages, where the system has them.

    Products of few rows read weights as fast as memory gives them, and pages are found once for each: a MiniLM call of
    16 tokens in float32 took 8 to 10 % less (one thread of an AMD EPYC, 2026-11).
    """
    huge = (size + _HUGE // 4) // _HUGE * _HUGE  # no page is taken for less than three quarters of it
    if huge == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return on_cache_line(size)
    pages = mmap.mmap(-1, max(size, huge) + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE
    with suppress(OSError):  # a system without them
        pages.madvise(mmap.MADV_HUGEPAGE, start, huge)
    return memory[start : start + size]


def in_panels(weight: Tensor) -> Tensor:
    """int8, bfloat16 or float32 (N_out, N_in) in the layout of csrc/linear_act/linear_act.h, on a cache line."""
    per_word = 4 // weight.element_size()
    out, size = (-(-weight.shape[0] // 32), -(-weight.shape[1] // (16 * per_word)))
    padded = weight.new_zeros(out * 32, size * 16 * per_word)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    panels = padded.view(out, 2, 16, size, 16, per_word).permute(0, 3, 1, 4, 2, 5)
    memory = _room(padded.numel() * padded.element_size())
    memory.view(weight.dtype).view(panels.shape).copy_(panels)
    return memory


def in_int8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 panels; what a step of each row is worth, float32; 128 times the sum of each row's steps, int32."""
    whole, worth = whole_steps(weight.float())
    whole = whole.to(torch.int8)
    padding = (0, -weight.shape[0] % 32)
    sums = 128 * whole.sum(dim=1, dtype=torch.int32)
    return in_panels(whole), F.pad(worth.squeeze(1), padding), F.pad(sums, padding)


def kept(weight: Tensor, kind: str, pack: Callable[[Tensor], Any]) -> Any:
    """``pack`` of a weight, made again when it changes."""
    return CACHE.get((weight,), kind, lambda: pack(weight.detach()))


def _side_by_side(weight: Tensor) -> Tensor:
    """(2M, N_in) -> rows as a gated product's panels hold them: 16 of the first half, then the same of the second."""
    halves = F.pad(weight.unflatten(0, (2, -1)), (0, 0, 0, -(weight.shape[0] // 2) % 16))
    return halves.unflatten(1, (-1, 16)).transpose(0, 1).flatten(0, 2)


def panels(weight: Tensor, is_gated: bool = False) -> Tensor:
    """A float32 or bfloat16 weight (N_out, N_in), packed."""
    if is_gated:
        return kept(weight, "gated panels", lambda weight: in_panels(_side_by_side(weight)))
    return kept(weight, "panels", in_panels)


def int8(weight: Tensor, is_gated: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """A weight packed in 8 bits: see ``in_int8``."""
    if is_gated:
        return kept(weight, "gated int8", lambda weight: in_int8(_side_by_side(weight)))
    return kept(weight, "int8", in_int8)
