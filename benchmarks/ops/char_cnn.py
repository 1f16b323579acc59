# SPDX-License-Identifier: Apache-2.0
"""``char_cnn``: the original ELMo's character filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cases import Case, Row, Work
from ..inputs import integers, normal
from ..provider import Call, Outputs, Provider

# ELMo's released filters (width, number), the characters of a word, their vectors' size, rows of their table.
FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
CHARACTERS = 50
DEPTH = 16
ALPHABET = 262

ROWS = (
    Row("elmo-original 32 words", dict(W=32), "small"),
    Row("elmo-original 256 words", dict(W=256)),
    Row("elmo-original 4096 words", dict(W=4096), cpu=()),
)
TINY = dict(W=3)


def make(random: torch.Generator, W: int) -> dict[str, Any]:
    return dict(
        char_ids=word_characters(random, W),
        char_embeddings=normal(random, ALPHABET, DEPTH),
        conv_weights=tuple(normal(random, n, DEPTH, w, std=(DEPTH * w) ** -0.5) for w, n in FILTERS),
        conv_biases=tuple(normal(random, n, std=0.1) for _, n in FILTERS),
        activation="relu",
    )


def word_characters(random: torch.Generator, words: int) -> Tensor:
    """(words, 50) int64: random words of 1 to 12 letters in ELMo's coding (begin 259, end 260, padding 261)."""
    ids = torch.full((words, CHARACTERS), 261)
    ids[:, 0] = 259
    letters = integers(random, 123, words, CHARACTERS, low=98)
    sizes = integers(random, 13, words, low=1)[:, None]
    column = torch.arange(CHARACTERS)[None]
    ids = torch.where((column >= 1) & (column <= sizes), letters, ids)
    return torch.where(column == sizes + 1, torch.tensor(260), ids)


def work(sizes: dict[str, Any], itemsize: int, backward: bool) -> Work:
    # Of all windows: a kernel that computes those in the padding once does about a fifth of it.
    windows = sum(n * w * DEPTH * (CHARACTERS - w + 1) for w, n in FILTERS)
    return Work(flops=2.0 * sizes["W"] * windows)


def _build_conv1d(case: Case, args: Mapping[str, Any]) -> Call:
    ids, table = args["char_ids"], args["char_embeddings"]
    layers = []
    for weight, bias in zip(args["conv_weights"], args["conv_biases"]):
        with torch.device("meta"):
            layer = nn.Conv1d(weight.shape[1], weight.shape[0], weight.shape[2])
        layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
        layers.append(layer)

    def forward() -> Outputs:
        x = F.embedding(ids, table).transpose(1, 2)
        return (torch.cat([torch.relu(layer(x).max(dim=-1).values) for layer in layers], dim=-1),)

    return Call(forward)


def _build_unfold(case: Case, args: Mapping[str, Any]) -> Call:
    ids, table = args["char_ids"], args["char_embeddings"]
    matrices = [weight.permute(0, 2, 1).flatten(1).contiguous() for weight in args["conv_weights"]]  # (n, w * D)
    widths = [weight.shape[2] for weight in args["conv_weights"]]
    biases, depth = args["conv_biases"], table.shape[1]

    def forward() -> Outputs:
        x = F.embedding(ids, table).flatten(1)  # (W, C * D)
        pooled = []
        for width, matrix, bias in zip(widths, matrices, biases):
            windows = x.unfold(1, width * depth, depth)  # (W, C - w + 1, w * D)
            pooled.append(torch.relu(F.linear(windows, matrix).amax(dim=1) + bias))
        return (torch.cat(pooled, dim=1),)

    return Call(forward)


PEERS = (
    Provider("nn.Conv1d (AllenNLP style)", _build_conv1d),
    Provider("unfold and matrix product", _build_unfold),
)
