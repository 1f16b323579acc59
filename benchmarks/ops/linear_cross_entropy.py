# SPDX-License-Identifier: Apache-2.0
"""``linear_cross_entropy``: BERT-Base's masked-LM head and loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..cases import Case, Row, Work
from ..inputs import integers, normal
from ..provider import Call, Outputs, Provider, leaves_of, require

ROWS = (
    Row("bert-base MLM 20 of 128 rows", dict(T=128, labelled=20, N=768, V=30522), "small"),
    Row("bert-base MLM 20 of 128 rows", dict(T=128, labelled=20, N=768, V=30522), passes=("fb",)),
    Row("bert-base MLM 2457 of 16384 rows", dict(T=16384, labelled=2457, N=768, V=30522), cpu=(), passes=("f", "fb")),
)
TINY = dict(T=6, labelled=2, N=8, V=11)
GRADS = ("hidden", "weight", "bias")


def make(random: torch.Generator, T: int, labelled: int, N: int, V: int) -> dict[str, Any]:
    labels = torch.full((T,), -100)
    rows = torch.randperm(T, generator=random)[:labelled]
    labels[rows] = integers(random, V, labelled)
    return dict(
        hidden=normal(random, T, N),
        weight=normal(random, V, N, std=N**-0.5),
        labels=labels,
        bias=normal(random, V, std=0.1),
    )


def work(sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    return Work(flops=(3 if backward else 1) * 2.0 * sizes["labelled"] * sizes["N"] * sizes["V"])


def _build_labelled_rows(case: Case, args: Mapping[str, Any]) -> Call:
    hidden, weight, bias, labels = args["hidden"], args["weight"], args["bias"], args["labels"]

    def forward() -> Outputs:
        rows = (labels != -100).nonzero()[:, 0]
        logits = F.linear(hidden[rows], weight, bias).float()
        return (F.cross_entropy(logits, labels[rows]),)

    return Call(forward, leaves_of(case, args))


def _build_liger_loss(case: Case, args: Mapping[str, Any]) -> Call:
    require("liger_kernel", "liger-kernel")
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    hidden, weight, bias, labels = args["hidden"], args["weight"], args["bias"], args["labels"]
    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=-100)
    return Call(lambda: (loss(weight, hidden, labels, bias),), leaves_of(case, args))


PEERS = (
    Provider("only labelled rows, F.cross_entropy", _build_labelled_rows),
    Provider("Liger fused linear cross entropy", _build_liger_loss, device="cuda"),
)
