# SPDX-License-Identifier: Apache-2.0
"""Test cases of ``linear_act``: every activation, sizes around tiles."""

from __future__ import annotations

from typing import Any

import torch

from ..._core.registry import Case
from ..shared.samples import Sampler


def _case(
    name: str,
    shape: tuple[int, ...],
    out: int,
    activation: str,
    *,
    bias: bool = True,
    weight_dtype: torch.dtype | None = None,
) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        sample = Sampler(device, dtype, seed)
        return dict(
            x=sample.normal(*shape),
            weight=sample.normal(out, shape[-1], spread=max(shape[-1], 1) ** -0.5),
            bias=sample.normal(out, spread=0.5) if bias else None,
            activation=activation,
            weight_dtype=weight_dtype,
        )

    if weight_dtype is not None:  # a step more or less of a row moves the result by more than half precision's rounding
        return Case(name, make, dtypes=(torch.float32,), tolerance=1e-2)
    return Case(name, make, ("x", "weight", *["bias"] * bias))


CASES = (
    _case("gelu", (13, 64), 96, "gelu"),
    _case("none", (13, 64), 48, "none"),
    _case("gelu-tanh", (13, 64), 96, "gelu_tanh"),
    _case("relu", (13, 64), 96, "relu"),
    _case("tanh", (13, 64), 96, "tanh"),
    _case("silu", (13, 64), 96, "silu"),
    _case("no-bias", (7, 65), 33, "gelu", bias=False),
    _case("one", (1, 1), 1, "tanh"),
    _case("one-row", (1, 768), 127, "gelu"),
    _case("no-rows", (0, 16), 8, "gelu"),
    _case("three-dimensions", (2, 3, 31), 17, "gelu"),
    _case("odd", (129, 63), 65, "gelu"),
    _case("large", (64, 768), 1023, "gelu"),
    _case("int8", (13, 64), 96, "gelu", weight_dtype=torch.int8),
    _case("int8-odd", (5, 33), 7, "tanh", bias=False, weight_dtype=torch.int8),
    _case("int8-one-row", (1, 768), 127, "none", weight_dtype=torch.int8),
)
