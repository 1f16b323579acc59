# SPDX-License-Identifier: Apache-2.0
"""``linear_act``: both products of BERT-Base's feed-forward block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..cases import Case, Row, Work
from ..inputs import normal
from ..provider import Call, Outputs, Provider, leaves_of

ROWS = (
    Row("bert-base FFN up 128 rows", dict(T=128, N=768, M=3072, activation="gelu"), "small"),
    Row("bert-base FFN up 1024 rows", dict(T=1024, N=768, M=3072, activation="gelu"), cpu=("float32", "bfloat16")),
    Row("bert-base FFN up 16384 rows", dict(T=16384, N=768, M=3072, activation="gelu"), cpu=(), passes=("f", "fb")),
    Row("bert-base FFN down 128 rows", dict(T=128, N=3072, M=768, activation="none"), "small"),
    Row("bert-base FFN down 1024 rows", dict(T=1024, N=3072, M=768, activation="none"), cpu=("float32", "bfloat16")),
)
TINY = dict(T=4, N=8, M=6, activation="gelu")
GRADS = ("x", "weight", "bias")


def make(random: torch.Generator, T: int, N: int, M: int, activation: str) -> dict[str, Any]:
    return dict(
        x=normal(random, T, N),
        weight=normal(random, M, N, std=N**-0.5),
        bias=normal(random, M, std=0.1),
        activation=activation,
    )


def work(sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    # A product has two gradients, each a product of the same size.
    return Work(flops=(3 if backward else 1) * 2.0 * sizes["T"] * sizes["N"] * sizes["M"])


def _build_linear(case: Case, args: Mapping[str, Any]) -> Call:
    x, weight, bias = args["x"], args["weight"], args["bias"]

    # What the modules nn.Linear and nn.GELU call; a module would take copies of the leaves.
    def forward() -> Outputs:
        product = F.linear(x, weight, bias)
        return (F.gelu(product) if args["activation"] == "gelu" else product,)

    return Call(forward, leaves_of(case, args))


PEERS = (Provider("nn.Linear and activation", _build_linear),)
