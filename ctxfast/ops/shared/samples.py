# SPDX-License-Identifier: Apache-2.0
"""Seeded inputs for test cases: the same numbers for every dtype and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Sampler:
    """Draws in float64 on the CPU, then rounds to a dtype and moves to a device."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._device, self._dtype = device, dtype

    def normal(self, *shape: int, spread: float = 1.0, mean: float = 0.0) -> Tensor:
        """Normal values of this mean and standard deviation."""
        drawn = torch.randn(*shape, generator=self._generator, dtype=torch.float64) * spread + mean
        return drawn.to(device=self._device, dtype=self._dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in low..high - 1."""
        return torch.randint(low, high, shape, generator=self._generator).to(self._device)

    def integers_given(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)
