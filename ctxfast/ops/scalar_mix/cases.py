# SPDX-License-Identifier: Apache-2.0
"""Test cases of ``scalar_mix``: ELMo's 3 layers, BERT's 13, the batch LayerNorm."""

from __future__ import annotations

from typing import Any

import torch

from ..._core.registry import HALF_AND_FLOAT, Case
from ..shared.samples import Sampler


def _case(name: str, K: int, shape: tuple[int, ...], *, norm: bool = False, stacked: bool = False) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        sample = Sampler(device, dtype, seed)
        layers = [sample.normal(*shape, mean=0.3 * k, spread=1.0 + k) for k in range(K)]
        mask = None
        if norm:
            mask = torch.arange(shape[1]) < torch.arange(shape[1], shape[1] - shape[0], -1)[:, None]
            mask = mask.to(device)
        return dict(
            tensors=torch.stack(layers) if stacked else layers,
            scalar_parameters=sample.normal(K),
            gamma=sample.normal(1, mean=1.0, spread=0.3),
            mask=mask,
            do_layer_norm=norm,
            # As AllenNLP: 1e-13 is nothing in half precision.
            eps=1e-4 if dtype == torch.float16 else 1e-13,
        )

    dtypes = (torch.float32, torch.float16) if norm else HALF_AND_FLOAT  # refused in bfloat16
    return Case(name, make, ("tensors", "scalar_parameters", "gamma"), dtypes, dtypes)


CASES = (
    _case("elmo", 3, (2, 7, 32)),
    _case("elmo-stacked", 3, (2, 7, 32), stacked=True),
    _case("elmo-layer-norm", 3, (4, 6, 16), norm=True),
    _case("bert-13", 13, (3, 5, 64)),
    _case("one-layer", 1, (4, 9)),
    _case("one-number", 2, (1, 1, 1)),
    _case("two-dimensions", 4, (63, 65)),
    _case("no-rows", 3, (0, 5, 8)),
    _case("odd", 5, (3, 17, 129)),
    _case("large", 3, (8, 33, 512)),
)
