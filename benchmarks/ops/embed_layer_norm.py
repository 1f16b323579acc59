# SPDX-License-Identifier: Apache-2.0
"""``embed_layer_norm``: BERT's embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..cases import Case, Row, Work
from ..inputs import integers, normal
from ..provider import Call, Outputs, Provider, leaves_of

ROWS = (
    Row("bert-base 1024 tokens", dict(T=1024, N=768, V=30522), "small"),
    Row("bert-base 16384 tokens", dict(T=16384, N=768, V=30522), cpu=(), passes=("f", "fb")),
)
TINY = dict(T=4, N=8, V=11)
GRADS = ("word_embeddings", "position_embeddings", "token_type_embeddings", "weight", "bias")


def make(random: torch.Generator, T: int, N: int, V: int) -> dict[str, Any]:
    return dict(
        input_ids=integers(random, V, T),
        position_ids=torch.arange(T) % 128,
        token_type_ids=integers(random, 2, T),
        word_embeddings=normal(random, V, N, std=0.02),
        position_embeddings=normal(random, 512, N, std=0.02),
        token_type_embeddings=normal(random, 2, N, std=0.02),
        weight=1 + normal(random, N, std=0.1),
        bias=normal(random, N, std=0.1),
    )


def work(sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    # Forward: three table rows in, one out. Backward: the gradient and the rows again, and three gradients out.
    return Work(bytes=(11.0 if backward else 4.0) * sizes["T"] * sizes["N"] * itemsize, tokens=sizes["T"])


def _build_embeddings(case: Case, args: Mapping[str, Any]) -> Call:
    kinds = (
        ("input_ids", "word_embeddings"),
        ("token_type_ids", "token_type_embeddings"),
        ("position_ids", "position_embeddings"),
    )
    pairs = [(args[ids], args[table]) for ids, table in kinds]
    weight, bias = args["weight"], args["bias"]

    # What the modules nn.Embedding and nn.LayerNorm call.
    def forward() -> Outputs:
        x = sum(F.embedding(ids, table) for ids, table in pairs)
        return (F.layer_norm(x, weight.shape, weight, bias, 1e-12),)

    return Call(forward, leaves_of(case, args))


PEERS = (Provider("nn.Embedding and nn.LayerNorm", _build_embeddings),)
