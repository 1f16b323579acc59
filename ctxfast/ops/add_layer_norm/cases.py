# SPDX-License-Identifier: Apache-2.0
"""Test cases of ``add_layer_norm``: row sizes around tiles, rows whose variance is small beside their mean."""

from __future__ import annotations

from typing import Any

import torch

from ..._core.registry import HALF_AND_FLOAT, Case
from ..shared.samples import Sampler


def _case(
    name: str,
    shape: tuple[int, ...],
    *,
    residual: bool = True,
    x_bias: bool = True,
    eps: float = 1e-12,
    mean: float = 0.0,
    spread: float = 1.0,
    mixed: bool = False,
) -> Case:
    """``mixed``: x alone is of the case's dtype, as under autocast; all else is float32."""

    def make(device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        sample = Sampler(device, dtype, seed)
        found = dict(
            x=sample.normal(*shape, mean=mean, spread=spread),
            residual=sample.normal(*shape, spread=spread) if residual else None,
            weight=sample.normal(shape[-1], mean=1.0, spread=0.2),
            bias=sample.normal(shape[-1], spread=0.2),
            x_bias=sample.normal(shape[-1], spread=0.3 * spread) if x_bias else None,
            eps=eps,
        )
        if mixed:
            wide = {name: each.float() for name, each in found.items() if isinstance(each, torch.Tensor)}
            found |= wide | dict(x=found["x"], out_dtype=torch.float32)
        return found

    # A row of one element is its own mean: the gradients of what enters it are zero but for rounding.
    inside = ["x", *["residual"] * residual, *["x_bias"] * x_bias] if shape[-1] > 1 else []
    dtypes = (torch.float16, torch.bfloat16) if mixed else HALF_AND_FLOAT
    return Case(name, make, (*inside, "weight", "bias"), dtypes, dtypes)


CASES = (
    _case("bert-base", (37, 768)),
    _case("bert-large", (5, 1024)),
    _case("minilm", (130, 384)),
    _case("three-dimensions", (2, 5, 96)),
    _case("one-row", (1, 64)),
    _case("one-column", (4, 1), eps=0.5),
    _case("two-columns", (6, 2), eps=0.5),
    _case("no-rows", (0, 32)),
    _case("odd", (17, 127)),
    _case("odd-large", (3, 1023)),
    _case("no-residual", (9, 65), residual=False),
    _case("no-bias", (9, 65), x_bias=False),
    _case("plain-layer-norm", (9, 63), residual=False, x_bias=False, eps=1e-5),
    _case("big-mean", (8, 256), mean=30.0, spread=0.5, eps=1e-5),
    _case("tiny", (8, 129), spread=1e-3),
    _case("mixed", (37, 768), mixed=True),
    _case("mixed-plain-layer-norm", (9, 63), mixed=True, residual=False, x_bias=False),
    _case("large", (300, 768)),
)
