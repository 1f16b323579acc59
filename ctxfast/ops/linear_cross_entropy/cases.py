# SPDX-License-Identifier: Apache-2.0
"""Test cases of ``linear_cross_entropy``: rows without labels, every reduction, vocabularies off the tiles."""

from __future__ import annotations

from typing import Any

import torch

from ..._core.registry import Case
from ..shared.samples import Sampler


def _case(
    name: str,
    *,
    T: int,
    N: int,
    V: int,
    labelled: float = 0.5,
    bias: bool = True,
    reduction: str = "mean",
    ignore: int | None = -100,
) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        sample = Sampler(device, dtype, seed)
        labels = sample.integers(0, V, T)
        without = sample.integers(0, 1000, T) >= 1000 * labelled
        return dict(
            hidden=sample.normal(T, N),
            weight=sample.normal(V, N, spread=N**-0.5),
            labels=labels if ignore is None else labels.masked_fill(without, ignore),
            bias=sample.normal(V, spread=0.5) if bias else None,
            ignore_index=ignore,
            reduction=reduction,
        )

    return Case(name, make, ("hidden", "weight", *["bias"] * bias))


CASES = (
    _case("masked-lm", T=40, N=64, V=1000, labelled=0.15),
    _case("all-labelled", T=17, N=48, V=99, labelled=1.0),
    _case("none-labelled", T=5, N=16, V=11, labelled=0.0),
    _case("sum", T=33, N=32, V=127, reduction="sum"),
    _case("each-row", T=33, N=32, V=127, reduction="none"),
    _case("no-bias", T=9, N=31, V=65, bias=False),
    _case("own-ignore-index", T=12, N=8, V=7, ignore=-1),
    _case("every-row-has-one", T=9, N=8, V=7, ignore=None),
    _case("every-row-has-one-each", T=9, N=8, V=7, ignore=None, reduction="none", bias=False),
    _case("one-row", T=1, N=8, V=3, labelled=1.0),
    _case("one-class", T=4, N=8, V=1, labelled=1.0),
    _case("no-rows", T=0, N=8, V=5),
    _case("large", T=64, N=256, V=5003, labelled=0.3),
)
