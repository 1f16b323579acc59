# SPDX-License-Identifier: Apache-2.0
"""ELMo's token encoder: characters of a batch of sentences to one vector a token, no context yet.

Every distinct word of a batch is computed once. Sentence marks are put in place without a loop over sentences.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional
from ..._core import checks
from ...nn import tools
from ...nn.char_cnn import CharCnn, encode_words
from ...nn.highway import Highway
from ...nn.words import encode_sentences, encode_unique
from .config import ElmoConfig
from .tokenization import BEGIN_SENTENCE, END_SENTENCE, ElmoCharacterMapper

# Words per call when results must not depend on the batch but the products do: matrix libraries round differently for
# different numbers of rows, so every call gets this many. The original model's encoder on 2 AVX-512
# cores: 12 to 13 ms in place of 3 to 6 for a sentence alone (2026-11), no more for many.
_FIXED_ROWS = 64


def without_sentence_marks(mask: Tensor) -> Tensor:
    """The mask of sentences with their marks, (B, T + 2), as it is without them, (B, T)."""
    lengths = mask.sum(1, keepdim=True) - 2
    return torch.arange(mask.shape[1] - 2, device=mask.device)[None] < lengths


def remove_sentence_marks(tokens: Tensor, mask: Tensor) -> Tensor:
    """Take the first and the last row of every sentence away: (B, T + 2, N) -> (B, T, N), zeros at padding."""
    return tokens[:, 1:-1].masked_fill(~without_sentence_marks(mask)[:, :, None], 0.0)


def check_right_padded(mask: Tensor, name: str) -> None:
    """Raise ValueError if a sentence has padding before a token, where values may be read."""
    if not checks.is_readable(mask):
        return
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(
            f"ctxfast.Elmo: {name} has zeros before a token; expected padding at the end of a sentence only."
        )


class ElmoCharacterEncoder(CharCnn):
    """Characters to token vectors: convolutions, highways, projection.

    Args:
        config: sizes.
        requires_grad: whether the parameters are trained.
        impl: implementation of ``char_cnn`` and ``linear_act``; None chooses.

    Parameters: those of ``CharCnn``, ``_highways._layers.k.{weight,bias}``, ``_projection.{weight,bias}``; the last two
    are absent where the model has none.

    Reference: AllenNLP's _ElmoCharacterEncoder.
    """

    ops = ("char_cnn", "linear_act")
    _marks: Tensor

    def __init__(self, config: ElmoConfig, requires_grad: bool = False, *, impl: str | None = None) -> None:
        super().__init__(262, config.char_embedding_dim, config.filters, config.activation, impl=impl)
        self.config = config
        filters, size = config.num_filters, config.projection_dim
        self._highways = Highway(filters, config.num_highways, impl=impl) if config.num_highways else None
        self._projection = nn.Linear(filters, size) if config.has_cnn_projection else None
        marks = ElmoCharacterMapper(max_characters=config.max_characters).rows([BEGIN_SENTENCE, END_SENTENCE])
        self.register_buffer("_marks", torch.tensor(marks, device="cpu"), persistent=False)
        self.requires_grad_(requires_grad)

    def get_output_dim(self) -> int:
        return self.config.projection_dim

    def encode(self, words: Tensor, *, batch_invariant: bool = False) -> Tensor:
        """Words as rows of character ids, (W, C) -> (W, P).

        Args:
            words: ids, see ``batch_to_ids``.
            batch_invariant: make a word's vector bitwise independent of the other words in the call: where the products
                are not by themselves, a fixed number of words is computed at a time. On the CPU only; a GPU's products
                may differ in the last bits.
        """
        is_free = not batch_invariant or words.device.type != "cpu" or torch.compiler.is_compiling()
        if is_free or words.shape[0] == 0 or not checks.has_values(words) or self._is_row_wise(words):
            return self._encode(words)
        count = words.shape[0]
        filled = torch.cat([words, words.new_zeros(-count % _FIXED_ROWS, words.shape[1])])
        return torch.cat([self._encode(part) for part in filled.split(_FIXED_ROWS)])[:count]

    def _linear_layers(self) -> list[nn.Linear]:
        """Highways, then the projection, as far as there are any."""
        layers: list[Any] = [] if self._highways is None else list(self._highways._layers)
        return layers if self._projection is None else [*layers, self._projection]

    def _is_row_wise(self, words: Tensor) -> bool:
        """Whether a word's vector is bitwise independent of the other words in the call, which ctxfast's CPU kernels
        guarantee in float32."""
        if self._char_embedding_weights.dtype is not torch.float32 or torch.is_autocast_enabled("cpu"):
            return False
        if functional.explain("char_cnn", **self._arguments(words[:1])).used != "cpu":
            return False
        return all(
            tools.is_plain(one)
            and functional.explain("linear_act", one.weight[:1], one.weight, one.bias, impl=self.impl).used == "cpu"
            for one in self._linear_layers()
        )

    def _encode(self, words: Tensor) -> Tensor:
        return encode_words(
            words, self._char_embedding_weights, self.convolutions(), self._highways, self._projection,
            activation=self.activation, impl=self.impl,
        )  # fmt: skip

    def encode_unique(self, rows: Tensor, *, batch_invariant: bool = False) -> Tensor:
        """(N, C) -> (N, P), every distinct row computed once: see ``nn.words.encode_unique``."""
        return encode_unique(rows, partial(self.encode, batch_invariant=batch_invariant))

    def mark_vectors(self, *, batch_invariant: bool = False) -> Tensor:
        """Vectors of <S> and </S>, (2, P)."""
        return self.encode(self._marks, batch_invariant=batch_invariant)

    def forward(self, inputs: Tensor, *, batch_invariant: bool = False) -> dict[str, Tensor]:
        """(B, T, C) character ids -> ``token_embedding`` (B, T + 2, P) and ``mask`` (B, T + 2) bool.

        Sentence marks are added. Vectors past a sentence's end are those of an all-zero row, not zeros.
        """
        mask = (inputs > 0).any(dim=-1)
        check_right_padded(mask, "inputs")
        encode = partial(self.encode, batch_invariant=batch_invariant)
        begin, end = self._marks.to(inputs.dtype)
        return encode_sentences(inputs, mask, begin, end, encode)
