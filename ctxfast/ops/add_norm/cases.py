# SPDX-License-Identifier: Apache-2.0
"""Test cases of ``add_norm``: both norms, with and without biases and a residual, row sizes around tiles."""

from __future__ import annotations

from typing import Any

import torch

from ..._core.registry import Case
from ..shared.samples import Sampler


def _case(
    name: str,
    shape: tuple[int, ...],
    norm: str = "layer",
    *,
    given: tuple[str, ...] = ("residual",),
    eps: float = 1e-5,
    mean: float = 0.0,
    spread: float = 1.0,
) -> Case:
    """``given``: which of ``residual``, ``bias`` and ``x_bias`` there are."""

    def make(device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        sample = Sampler(device, dtype, seed)
        drawn = dict(
            x=sample.normal(*shape, mean=mean, spread=spread),
            residual=sample.normal(*shape, spread=spread),
            weight=sample.normal(shape[-1], mean=1.0, spread=0.2),
            bias=sample.normal(shape[-1], spread=0.2),
            x_bias=sample.normal(shape[-1], spread=0.3 * spread),
        )
        missing = {name: None for name in ("residual", "bias", "x_bias") if name not in given}
        return drawn | missing | dict(norm=norm, eps=eps)

    grads = (each for each in ("x", "residual", "weight", "bias", "x_bias") if each in ("x", "weight", *given))
    return Case(name, make, tuple(grads))


_ALL = ("residual", "bias", "x_bias")
CASES = (
    _case("modernbert", (37, 768)),
    _case("rms", (37, 768), "rms"),
    _case("layer-biases", (9, 384), given=_ALL),
    _case("rms-biases", (9, 384), "rms", given=_ALL),
    _case("layer-alone", (9, 65), given=("bias",)),
    _case("rms-alone", (9, 65), "rms", given=()),
    _case("no-residual", (9, 63), given=("x_bias",)),
    _case("three-dimensions", (2, 5, 96), "rms", given=("residual", "x_bias")),
    _case("one-row", (1, 64), "rms"),
    _case("two-columns", (6, 2), eps=0.5),
    _case("one-column", (4, 1), "rms", eps=0.5),
    _case("no-rows", (0, 32)),
    _case("odd", (17, 127), given=_ALL),
    _case("odd-large", (3, 1023), "rms"),
    _case("big-mean", (8, 256), mean=8.0),
    _case("tiny", (8, 129), "rms", spread=1e-2),
    _case("large", (300, 768), given=_ALL),
)
