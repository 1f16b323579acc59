# SPDX-License-Identifier: Apache-2.0
"""``add_layer_norm``: after the adds, as a layer of BERT runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..cases import Case, Row, Work
from ..inputs import normal
from ..provider import Call, Outputs, Provider, leaves_of, require

ROWS = (
    Row("bert-base 1024 rows", dict(T=1024, N=768), "small"),
    Row("bert-base 1024 rows", dict(T=1024, N=768), passes=("fb",)),
    Row("bert-base 16384 rows", dict(T=16384, N=768), cpu=(), passes=("f", "fb")),
)
TINY = dict(T=4, N=8)
GRADS = ("x", "residual", "weight", "bias", "x_bias")


def make(random: torch.Generator, T: int, N: int) -> dict[str, Any]:
    return dict(
        x=normal(random, T, N),
        residual=normal(random, T, N),
        weight=1 + normal(random, N, std=0.1),
        bias=normal(random, N, std=0.1),
        x_bias=normal(random, N, std=0.1),
        eps=1e-12,
    )


def work(sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    # Forward: x and residual in, y out. Backward: the gradient and x + residual in, one gradient out.
    return Work(bytes=(6.0 if backward else 3.0) * sizes["T"] * sizes["N"] * itemsize)


def _build_layer_norm(case: Case, args: Mapping[str, Any]) -> Call:
    x, residual, x_bias = args["x"], args["residual"], args["x_bias"]
    weight, bias, eps = args["weight"], args["bias"], args["eps"]

    def forward() -> Outputs:
        return (F.layer_norm(x + x_bias + residual, (x.shape[-1],), weight, bias, eps),)

    return Call(forward, leaves_of(case, args))


def _build_liger_layer_norm(case: Case, args: Mapping[str, Any]) -> Call:
    require("liger_kernel", "liger-kernel")
    from liger_kernel.transformers.functional import liger_layer_norm

    x, residual, x_bias = args["x"], args["residual"], args["x_bias"]
    weight, bias, eps = args["weight"], args["bias"], args["eps"]
    return Call(lambda: (liger_layer_norm(x + x_bias + residual, weight, bias, eps),), leaves_of(case, args))


PEERS = (
    Provider("F.layer_norm after adds", _build_layer_norm),
    Provider("Liger layer_norm after adds", _build_liger_layer_norm, device="cuda"),
)
