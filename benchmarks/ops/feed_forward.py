# SPDX-License-Identifier: Apache-2.0
"""``feed_forward``: the feed-forward block of BERT-Base and MiniLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

import ctxfast

from ..cases import Case, Row, Work
from ..inputs import EVERY_BERT, normal
from ..provider import Call, Outputs, Provider, leaves_of

ROWS = (
    Row("minilm FFN 16 rows", dict(T=16, N=384, M=1536), "small", cpu=EVERY_BERT, cuda=()),
    Row("minilm FFN 128 rows", dict(T=128, N=384, M=1536), "small", cpu=EVERY_BERT, cuda=()),
    Row("bert-base FFN 1024 rows", dict(T=1024, N=768, M=3072), passes=("f", "fb"), cpu=("float32", "bfloat16")),
    Row("bert-base FFN 16384 rows", dict(T=16384, N=768, M=3072), passes=("f", "fb"), cpu=()),
)
TINY = dict(T=4, N=8, M=12)
GRADS = ("x", "weight1", "bias1", "weight2", "bias2")


def make(random: torch.Generator, T: int, N: int, M: int) -> dict[str, Any]:
    return dict(
        x=normal(random, T, N),
        weight1=normal(random, M, N, std=N**-0.5),
        bias1=normal(random, M, std=0.1),
        weight2=normal(random, N, M, std=M**-0.5),
        bias2=normal(random, N, std=0.1),
    )


def work(sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    # A product has two gradients, each a product of the same size.
    return Work(flops=(3 if backward else 1) * 4.0 * sizes["T"] * sizes["N"] * sizes["M"])


def _build_linear(case: Case, args: Mapping[str, Any]) -> Call:
    # What the modules nn.Linear and nn.GELU call; a module would take copies of the leaves.
    def forward() -> Outputs:
        wide = F.gelu(F.linear(args["x"], args["weight1"], args["bias1"]))
        return (F.linear(wide, args["weight2"], args["bias2"]),)

    return Call(forward, leaves_of(case, args))


def _build_linear_act(case: Case, args: Mapping[str, Any]) -> Call:
    weight_dtype = args.get("weight_dtype")

    def forward() -> Outputs:
        up = ctxfast.linear_act(
            args["x"], args["weight1"], args["bias1"], activation="gelu", weight_dtype=weight_dtype
        )  # fmt: skip
        return (ctxfast.linear_act(up, args["weight2"], args["bias2"], weight_dtype=weight_dtype),)

    return Call(forward, leaves_of(case, args))


PEERS = (
    Provider("ctxfast, two linear_act", _build_linear_act, "keeps the activation's result too", ours=True),
    Provider("nn.Linear, GELU, nn.Linear", _build_linear),
)
