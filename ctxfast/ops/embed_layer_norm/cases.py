# SPDX-License-Identifier: Apache-2.0
"""Test cases of ``embed_layer_norm``: BERT's, RoBERTa's padding rows, ERNIE's task embedding."""

from __future__ import annotations

from typing import Any

import torch

from ..._core.registry import Case
from ..shared.samples import Sampler


def _case(name: str, *, T: int, N: int, V: int = 50, padding: int | None = None, task: bool = False) -> Case:
    def make(device: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
        sample = Sampler(device, dtype, seed)
        return dict(
            input_ids=sample.integers(0, V, T),
            position_ids=sample.integers(0, 20, T),
            token_type_ids=sample.integers(0, 2, T),
            word_embeddings=sample.normal(V, N),
            position_embeddings=sample.normal(20, N),
            token_type_embeddings=sample.normal(2, N),
            weight=sample.normal(N, mean=1.0, spread=0.2),
            bias=sample.normal(N, spread=0.2),
            task_type_ids=sample.integers(0, 3, T) if task else None,
            task_type_embeddings=sample.normal(3, N) if task else None,
            padding_idx=padding,
            position_padding_idx=padding,
        )

    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    return Case(name, make, (*tables, "weight", "bias", *["task_type_embeddings"] * task))


CASES = (
    _case("tiny", T=7, N=6, V=5, task=True),
    _case("bert-base", T=19, N=768),
    _case("minilm", T=65, N=384, padding=0),
    _case("roberta-padding", T=40, N=64, padding=1),
    _case("ernie-task", T=23, N=96, padding=0, task=True),
    _case("one-token", T=1, N=33),
    _case("no-tokens", T=0, N=32),
    _case("odd", T=127, N=65, V=3),
    _case("large", T=200, N=768, V=1000),
)
