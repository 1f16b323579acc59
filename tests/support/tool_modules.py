# SPDX-License-Identifier: Apache-2.0
"""Small modules of every kind, with arguments, for the tests of tools that take modules apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ctxfast
from ctxfast.models.bert.config import BertConfig
from ctxfast.models.elmo.config import ElmoConfig


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, bidirectional=True, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0])


class Upto(nn.Module):
    """A module that takes max_seqlen, as one of tensors alone: sequences of at most 5 tokens."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return self.module(x, cu_seqlens, 5)


def swapped() -> nn.Module:
    model = Tagger()
    ctxfast.swap_in(model)
    return model


def tiny_bert() -> nn.Module:
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return ctxfast.Bert(BertConfig(vocab_size=50, max_position_embeddings=32, **sizes))


def tiny_elmo() -> nn.Module:
    sizes = dict(char_embedding_dim=4, filters=((1, 8), (2, 8)), projection_dim=8, cell_size=16)
    config = ElmoConfig(**{**ElmoConfig.preset("small").__dict__, **sizes})
    return ctxfast.Elmo.from_config(config, state="zero", requires_grad=True, dropout=0.0)


def starts(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def mask_of(*lengths: int) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


_DRAWN = torch.Generator().manual_seed(5)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_DRAWN)


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 50, shape, generator=_DRAWN)


# Module, arguments of a call, and arguments of other sizes.
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], tuple[Any, ...]]] = {
    "LSTM": (
        lambda: ctxfast.nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True),
        (normal(3, 5, 6),),
        (normal(2, 9, 6),),
    ),
    "LSTM, clips": (
        lambda: ctxfast.nn.LSTM(6, 8, proj_size=4, bidirectional=True, cell_clip=0.2, proj_clip=0.1),
        (normal(5, 3, 6),),
        (normal(9, 2, 6),),
    ),
    "swapped LSTM": (swapped, (normal(3, 5, 6),), (normal(2, 9, 6),)),
    "LayerNorm": (lambda: ctxfast.nn.LayerNorm(6), (normal(3, 5, 6),), (normal(2, 9, 6),)),
    "AddLayerNorm": (lambda: ctxfast.nn.AddLayerNorm(6), (normal(3, 6), normal(3, 6)), (normal(9, 6), normal(9, 6))),
    "SelfAttention": (
        lambda: Upto(ctxfast.nn.SelfAttention(8, 2)),
        (normal(9, 8), starts(5, 4)),
        (normal(11, 8), starts(1, 5, 5)),
    ),
    "FeedForward": (lambda: ctxfast.nn.FeedForward(8, 16), (normal(9, 8),), (normal(11, 8),)),
    "TransformerLayer": (
        lambda: Upto(ctxfast.nn.TransformerLayer(8, 2, 16)),
        (normal(9, 8), starts(5, 4)),
        (normal(11, 8), starts(1, 5, 5)),
    ),
    "Embeddings": (
        lambda: ctxfast.nn.Embeddings(50, 8),
        (ids(7), torch.arange(7)),
        (ids(9), torch.arange(9)),
    ),
    "CharCnn": (lambda: ctxfast.nn.CharCnn(50, 4, [(1, 8), (2, 8)]), (ids(7, 5),), (ids(9, 5),)),
    "Highway": (lambda: ctxfast.nn.Highway(8, 2), (normal(7, 8),), (normal(9, 8),)),
    "ScalarMix": (
        lambda: ctxfast.nn.ScalarMix(2),
        ([normal(7, 8), normal(7, 8)],),
        ([normal(9, 8), normal(9, 8)],),
    ),
    "ElmoLstm": (
        lambda: ctxfast.nn.ElmoLstm(6, 6, 8, 2, True, 0.0, 0.2, 0.2),
        (normal(3, 5, 6), torch.tensor([5, 2, 3])),
        (normal(2, 7, 6), torch.tensor([4, 7])),
    ),
    "Bert": (tiny_bert, (ids(2, 7), mask_of(7, 4)), (ids(3, 9), mask_of(2, 9, 5))),
    "Elmo": (tiny_elmo, (ids(2, 3, 50),), (ids(2, 4, 50),)),
}  # fmt: skip


def first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


class First(nn.Module):
    """A module's first tensor: what tools can take that know tensors alone."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any) -> Tensor:
        return first(self.module(*given))


def made(name: str) -> tuple[nn.Module, tuple[Any, ...], tuple[Any, ...]]:
    """A module of ``MODULES``, and two sets of arguments."""
    make, given, other = MODULES[name]
    torch.manual_seed(3)
    return First(make()).eval(), given, other
