# SPDX-License-Identifier: Apache-2.0
"""Word vectors from convolutions over characters, under the names of AllenNLP's ELMo encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from . import tools


def encode_words(
    words: Tensor,
    characters: Tensor,
    convolutions: Sequence[nn.Conv1d],
    highways: Callable[[Tensor], Tensor] | None,
    projection: nn.Module | None,
    *,
    activation: str,
    impl: str | None,
) -> Tensor:
    """ELMo's token encoder: ``CharCnn``, highways, a linear layer; the last two where there are any. Words as rows of
    character ids (W, C) -> (W, P)."""
    weights, biases = zip(*[(convolution.weight, convolution.bias) for convolution in convolutions])
    vectors = functional.char_cnn(words, characters, weights, biases, activation=activation, impl=impl)
    vectors = vectors if highways is None else highways(vectors)
    return vectors if projection is None else tools.linear(vectors, projection, impl=impl)


class CharCnn(tools.NotScriptable):
    """Character embedding, convolutions of several widths, maximum over positions, activation.

    Args:
        num_characters: V, rows of the character table; row 0 ("no word") starts as zeros.
        embedding_dim: D, size of a character's vector.
        filters: (width, count) of every convolution.
        activation: "relu" or "tanh".
        impl: implementation of ``char_cnn``; None chooses.

    Parameters: ``_char_embedding_weights`` (V, D); ``char_conv_i.weight`` (count, D, width), ``char_conv_i.bias``.

    Reference: Kim et al. 2016; Peters et al. 2018; AllenNLP's _ElmoCharacterEncoder.
    """

    def __init__(
        self,
        num_characters: int,
        embedding_dim: int,
        filters: Sequence[tuple[int, int]],
        activation: str = "relu",
        *,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.filters = tuple((width, count) for width, count in filters)
        self.activation, self.impl = activation, impl
        place = {"device": device, "dtype": dtype}
        self._char_embedding_weights = nn.Parameter(torch.empty(num_characters, embedding_dim, **place))
        for i, (width, count) in enumerate(self.filters):
            self.add_module(f"char_conv_{i}", nn.Conv1d(embedding_dim, count, width, **place))
        self.reset_parameters()

    @property
    def num_filters(self) -> int:
        """Size of a word's vector: the filters of all widths together."""
        return sum(count for _, count in self.filters)

    def convolutions(self) -> list[nn.Conv1d]:
        names = [f"char_conv_{i}" for i in range(len(self.filters))]
        return [tools.readable(self, name, getattr(self, name), nn.Conv1d) for name in names]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize as bilm-tf does: character vectors uniform in +-1, small filters, zero biases."""
        self._char_embedding_weights.uniform_(-1, 1)
        self._char_embedding_weights[0].zero_()
        for convolution in self.convolutions():
            if self.activation == "relu":
                convolution.weight.uniform_(-0.05, 0.05)
            else:
                convolution.weight.normal_(0, convolution.weight[0].numel() ** -0.5)
            if convolution.bias is not None:
                convolution.bias.zero_()

    def _arguments(self, char_ids: Tensor) -> dict[str, Any]:
        """Those of ``functional.char_cnn``."""
        convolutions = self.convolutions()
        return dict(
            char_ids=char_ids,
            char_embeddings=self._char_embedding_weights,
            conv_weights=[convolution.weight for convolution in convolutions],
            conv_biases=[convolution.bias for convolution in convolutions],
            activation=self.activation,
            impl=self.impl,
        )

    def features(self, char_ids: Tensor) -> Tensor:
        """Words as rows of character ids (W, C) -> (W, num_filters)."""
        return functional.char_cnn(**self._arguments(char_ids))

    @tools.fx_leaf
    def forward(self, char_ids: Tensor) -> Tensor:
        """(W, C) int64 -> (W, num_filters)."""
        return self.features(char_ids)

    def extra_repr(self) -> str:
        return (
            f"characters={self._char_embedding_weights.shape[0]}, filters={self.filters}, "
            f"activation={self.activation}, impl={self.impl or 'auto'}"
        )
