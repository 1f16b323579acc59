# SPDX-License-Identifier: Apache-2.0
"""The kernels' random numbers in plain PyTorch: Philox4x32 with 7 rounds (Salmon et al. 2011).

A kernel draws a dropout mask from a counter at its forward and again at its backward, and stores none. A backward that
is itself differentiated runs the op's definition, which is given the very same mask, made here.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FACTORS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_WORD = 0xFFFFFFFF


def draw_seeds(tensor: Tensor, dropout_p: float) -> Tensor | None:
    """Seed and offset of a call's mask, drawn where the tensor is: a captured graph draws new ones at every replay."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), device=tensor.device) if dropout_p > 0 else None


def numbers(dropout_p: float) -> tuple[int, float]:
    """Threshold on 16 random bits, and one over the share it keeps."""
    threshold = min(round(dropout_p * 65536), 65535)
    return threshold, 65536 / (65536 - threshold)


def draw(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Four random 32-bit words for every counter of four, in int64; counters broadcast, ``seed`` is one int64."""
    c0, c1, c2, c3 = (word & _WORD for word in counter)
    key = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(_ROUNDS):
        # The 64-bit product may wrap around into the sign, which the masks take off again.
        first, second = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0, c1 = ((second >> 32) & _WORD) ^ c1 ^ key[0], second & _WORD
        c2, c3 = ((first >> 32) & _WORD) ^ c3 ^ key[1], first & _WORD
        key = [(word + step) & _WORD for word, step in zip(key, _WEYL)]
    return [c0, c1, c2, c3]


def half(words: list[Tensor], which: Tensor, is_high: Tensor) -> Tensor:
    """16 bits: the high or low half of word ``which`` (0..3)."""
    word = sum(torch.where(which == i, each, 0) for i, each in enumerate(words))
    return torch.where(is_high, word >> 16, word & 0xFFFF)


def multiplier(bits: Tensor, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies by: 0 where 16 random bits are too few, else one over the share kept."""
    threshold, scale = numbers(dropout_p)
    return (bits >= threshold).to(dtype) * scale


def row_bits(rows: int, size: int, seeds: Tensor) -> Tensor:
    """(rows, size): the bits of ``triton_rows.is_kept``."""
    row = torch.arange(rows, device=seeds.device)[:, None]
    column = torch.arange(size, device=seeds.device)
    words = draw((row, column >> 3, seeds[1], row >> 32), seeds[0])
    return half(words, (column >> 1) & 3, (column & 1) == 1)
