# SPDX-License-Identifier: Apache-2.0
"""``add_norm``: residual and norm, as a pre-norm layer runs them (ModernBERT's LayerNorm, EuroBERT's RMSNorm)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..cases import Case, Row, Work
from ..inputs import normal
from ..provider import Call, Outputs, Provider, leaves_of

ROWS = (
    Row("modernbert-base 1024 rows", dict(T=1024, N=768, norm="layer"), "small"),
    Row("modernbert-base 16384 rows", dict(T=16384, N=768, norm="layer"), cpu=(), passes=("f", "fb")),
    Row("eurobert-210m 1024 rows", dict(T=1024, N=768, norm="rms"), "small"),
    Row("eurobert-210m 16384 rows", dict(T=16384, N=768, norm="rms"), cpu=(), passes=("f", "fb")),
)
TINY = dict(T=4, N=8, norm="rms")
GRADS = ("x", "residual", "weight")


def make(random: torch.Generator, T: int, N: int, norm: str) -> dict[str, Any]:
    x, residual = normal(random, T, N), normal(random, T, N)
    return dict(x=x, residual=residual, weight=1 + normal(random, N, std=0.1), norm=norm, eps=1e-5)


def work(sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    # Forward: x and residual in, total and norm out. Backward: two gradients and the total in, one gradient out.
    return Work(bytes=(8.0 if backward else 4.0) * sizes["T"] * sizes["N"] * itemsize)


def _build_torch(case: Case, args: Mapping[str, Any]) -> Call:
    x, residual, weight = args["x"], args["residual"], args["weight"]

    def forward() -> Outputs:
        total, shape = residual + x, (x.shape[-1],)
        if args["norm"] == "rms":
            return total, F.rms_norm(total, shape, weight, args["eps"])
        return total, F.layer_norm(total, shape, weight, None, args["eps"])

    return Call(forward, leaves_of(case, args))


PEERS = (Provider("torch's norm after the add", _build_torch),)
