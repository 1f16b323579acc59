"""A small BERT whose calls go through graphs on the CPU, with ``fake_cuda`` in the place of torch.cuda."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import ctxfast
from ctxfast.models.bert.config import BertConfig
from ctxfast.nn.graphs import PackedGraphs

CONFIG = BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=600,
)  # fmt: skip


class OnCpu(PackedGraphs):
    def can_run(self, tokens: Tensor) -> bool:
        return not torch.is_grad_enabled() and 0 < tokens.shape[0] <= self.max_tokens


def batch(lengths: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (len(lengths), max(lengths)), generator=generator)
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


@torch.no_grad()
def plain(model: ctxfast.Bert, *inputs: Tensor, **options: bool) -> ctxfast.models.bert.modeling.BertOutput:
    model.cuda_graphs = False
    try:
        return model(*inputs, **options)
    finally:
        model.cuda_graphs = True


def small_bert() -> ctxfast.Bert:
    torch.manual_seed(0)
    model = ctxfast.Bert(CONFIG).eval()
    model._graphs = OnCpu()
    return model
