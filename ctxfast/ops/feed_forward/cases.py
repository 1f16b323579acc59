# SPDX-License-Identifier: Apache-2.0
"""Test cases of ``feed_forward``: every activation, with and without biases, sizes around tiles."""

from __future__ import annotations

from typing import Any

import torch

from ..._core.registry import Case
from ..shared.samples import Sampler


def _case(
    name: str,
    shape: tuple[int, ...],
    wide: int,
    out: int,
    activation: str = "gelu",
    *,
    biases: tuple[str, ...] = ("bias1", "bias2"),
    weight_dtype: torch.dtype | None = None,
    gated: bool = False,
) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        sample, rows = Sampler(device, dtype, seed), 2 * wide if gated else wide
        drawn = dict(
            x=sample.normal(*shape),
            weight1=sample.normal(rows, shape[-1], spread=shape[-1] ** -0.5),
            bias1=sample.normal(rows, spread=0.5),
            weight2=sample.normal(out, wide, spread=wide**-0.5),
            bias2=sample.normal(out, spread=0.5),
        )
        missing = {name: None for name in ("bias1", "bias2") if name not in biases}
        return drawn | missing | dict(activation=activation, weight_dtype=weight_dtype, gated=gated)

    if weight_dtype is not None:  # see linear_act: values near the middle of two steps go either way
        return Case(name, make, dtypes=(torch.float32,), tolerance=2e-2)
    grads = (name for name in ("x", "weight1", "bias1", "weight2", "bias2") if "bias" not in name or name in biases)
    return Case(name, make, tuple(grads))


CASES = (
    _case("gelu", (13, 64), 96, 64),
    _case("gelu-tanh", (13, 64), 96, 64, "gelu_tanh"),
    _case("relu", (13, 64), 96, 48, "relu"),
    _case("tanh", (13, 64), 96, 48, "tanh"),
    _case("silu", (13, 64), 96, 48, "silu"),
    _case("geglu", (13, 64), 96, 64, biases=(), gated=True),
    _case("swiglu", (13, 64), 96, 48, "silu", gated=True),
    _case("gated-odd", (7, 65), 33, 65, "gelu_tanh", biases=("bias1",), gated=True),
    _case("gated-one", (1, 1), 1, 1, "tanh", gated=True),
    _case("gated-no-rows", (0, 16), 8, 16, "relu", gated=True),
    _case("gated-none", (2, 3, 31), 17, 5, "none", gated=True),
    _case("gated-large", (64, 384), 1152, 384, biases=(), gated=True),
    _case("none", (13, 64), 96, 64, "none"),
    _case("no-biases", (7, 65), 33, 65, biases=()),
    _case("no-second-bias", (7, 32), 130, 32, biases=("bias1",)),
    _case("no-first-bias", (7, 32), 130, 32, "relu", biases=("bias2",)),
    _case("one", (1, 1), 1, 1, "tanh"),
    _case("one-row", (1, 96), 1025, 127),
    _case("no-rows", (0, 16), 8, 16),
    _case("three-dimensions", (2, 3, 31), 17, 5),
    _case("odd", (129, 63), 65, 33),
    _case("large", (64, 384), 1536, 384),
    _case("int8", (13, 64), 96, 64, weight_dtype=torch.int8),
    _case("int8-odd", (5, 33), 7, 9, "tanh", biases=(), weight_dtype=torch.int8),
    _case("int8-gated", (13, 64), 90, 64, "silu", gated=True, weight_dtype=torch.int8),
    _case("int8-one-row", (1, 96), 130, 127, "relu", weight_dtype=torch.int8),
)
