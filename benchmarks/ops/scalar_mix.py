# SPDX-License-Identifier: Apache-2.0
"""``scalar_mix``: over ELMo's layers and BERT-Base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..cases import Case, Row, Work
from ..inputs import normal
from ..provider import Call, Outputs, Provider

ROWS = (
    Row("elmo 3 layers 32x32", dict(K=3, B=32, T=32, N=1024), "small"),
    Row("bert-base 13 layers 8x128", dict(K=13, B=8, T=128, N=768), "small"),
)
TINY = dict(K=3, B=2, T=3, N=4)


def make(random: torch.Generator, K: int, B: int, T: int, N: int) -> dict[str, Any]:
    return dict(
        tensors=tuple(normal(random, B, T, N) for _ in range(K)),
        scalar_parameters=normal(random, K),
        gamma=torch.full((1,), 0.9),
    )


def work(sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    return Work(bytes=(sizes["K"] + 1.0) * sizes["B"] * sizes["T"] * sizes["N"] * itemsize)


def _build_mix_loop(case: Case, args: Mapping[str, Any]) -> Call:
    layers, scalars, gamma = args["tensors"], args["scalar_parameters"], args["gamma"]

    def forward() -> Outputs:
        weights = torch.softmax(scalars, dim=0).split(1)
        return (gamma * sum(weight * layer for weight, layer in zip(weights, layers)),)

    return Call(forward)


def _build_mix_product(case: Case, args: Mapping[str, Any]) -> Call:
    layers, scalars, gamma = args["tensors"], args["scalar_parameters"], args["gamma"]

    def forward() -> Outputs:
        return (torch.einsum("k,k...->...", gamma * torch.softmax(scalars, dim=0), torch.stack(layers)),)

    return Call(forward)


PEERS = (
    Provider("sum of products (AllenNLP style)", _build_mix_loop),
    Provider("stack and einsum", _build_mix_product),
)
