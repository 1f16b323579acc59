# SPDX-License-Identifier: Apache-2.0
"""Seeded inputs and the lengths that several ops and models share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

# 32 texts as a sentence encoder meets them: the longest fills 121 columns, together they fill 0.39 of the rectangle.
RAGGED_32 = (
    121, 104, 96, 88, 82, 76, 71, 67, 63, 60, 57, 54, 51, 48, 46, 44,
    41, 39, 37, 35, 33, 31, 29, 27, 24, 22, 20, 18, 15, 12, 9, 7,
)  # fmt: skip

# 256 texts whose lengths are a log-normal's quantiles around 40, and one of 320 tokens: 0.15 of the rectangle.
_QUANTILES = [NormalDist().inv_cdf((i + 0.5) / 256) for i in range(255)]
_BY_LENGTH = (*(max(5, round(40 * math.exp(0.6 * quantile))) for quantile in _QUANTILES), 320)
RAGGED_256 = tuple(_BY_LENGTH[i * 37 % 256] for i in range(256))

# Dtypes of ELMo and its LSTM, and of BERT and its layers.
EVERY_WEIGHT = ("float32", "float32+bf16", "float32+int8")
EVERY_BERT = ("float32", "bfloat16", "float32+int8")


def normal(random: torch.Generator, *size: int, std: float = 1.0) -> Tensor:
    return torch.randn(size, generator=random) * std


def integers(random: torch.Generator, high: int, *size: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, size, generator=random)


def starts(lengths: tuple[int, ...]) -> Tensor:
    """(S + 1,) int32: the row where each of the packed sequences starts, and the end of the last."""
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


def padding(args: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """For packed ``args``: row of each place of the padded grid, which places hold tokens, each token's grid place."""
    offsets = args["cu_seqlens"].long()
    lengths, longest = offsets[1:] - offsets[:-1], args["max_seqlen"]
    column = torch.arange(longest, device=offsets.device)
    inside = column < lengths[:, None]
    row = (offsets[:-1, None] + column).clamp(max=int(offsets[-1]) - 1)
    return row, inside, inside.flatten().nonzero()[:, 0]
