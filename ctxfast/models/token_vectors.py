# SPDX-License-Identifier: Apache-2.0
"""What a head reads of each word: a mix of an encoder's layers, a character CNN, a table of word vectors.

Shape letters: B texts, T words, K layers, N size of a layer, C characters of a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn import ScalarMix
from ..nn.char_cnn import CharCnn
from ..nn.words import encode_unique

# ELMo's: 256 bytes and six signs, and row 0 for no word. As in AllenNLP's configuration of ELMo's NER.
_CHARACTERS, _CHARACTER_DIM, _FILTERS = 262, 16, ((3, 128),)


@dataclass(frozen=True)
class Sources:
    """What a word's vector is made of; one of layers, characters and table at least.

    Attributes:
        num_layers: K, layers of an encoder; 0 for no encoder.
        dim: N.
        has_characters: whether a CNN reads the characters of words: 128 filters over 3 characters.
        table_rows: rows of a table of word vectors, the first for words that it does not hold; 0 for no table.
        table_dim: size of its vectors.
        trains_table: whether they are trained.
        mix_norm: whether layers are normalised before they are mixed.
        mix_l2: factor of the sum of squares of the mix's weights (before the softmax) in the loss.
        output_mix: whether a second mix of the layers stands beside the output of one of a head's LSTMs.
    """

    num_layers: int = 0
    dim: int = 0
    has_characters: bool = False
    table_rows: int = 0
    table_dim: int = 0
    trains_table: bool = True
    mix_norm: bool = False
    mix_l2: float = 0.0
    output_mix: bool = False

    def __post_init__(self) -> None:
        if not (self.num_layers or self.has_characters or self.table_rows):
            raise ValueError("ctxfast.Sources: nothing is chosen; expected layers, characters or a table.")
        if self.output_mix and not self.num_layers:
            raise ValueError("ctxfast.Sources: output_mix is set without layers; expected an encoder's for it.")

    @property
    def width(self) -> int:
        """Size of a word's vector."""
        characters = sum(count for _, count in _FILTERS) if self.has_characters else 0
        return (self.dim if self.num_layers else 0) + characters + (self.table_dim if self.table_rows else 0)

    @property
    def output_width(self) -> int:
        """Size of what ``TokenVectors.beside`` gives."""
        return self.dim if self.output_mix else 0


class TokenVectors(nn.Module):
    """Vectors of words, (B, T, ``sources.width``): the mix of layers, the character CNN's and the table's side by side.

    Several layers are mixed by learned weights; a single one is taken as it is, unless it is normalised.

    Reference: Peters et al. 2018, equation 1 and 3.3; AllenNLP's Elmo and its text field embedder.
    """

    def __init__(self, sources: Sources) -> None:
        super().__init__()
        self.sources = sources
        self.mix = self._new_mix() if sources.num_layers > 1 or (sources.num_layers and sources.mix_norm) else None
        self.output_mix = self._new_mix() if sources.output_mix else None
        self.characters = CharCnn(_CHARACTERS, _CHARACTER_DIM, _FILTERS) if sources.has_characters else None
        self.table = nn.Embedding(sources.table_rows, sources.table_dim) if sources.table_rows else None
        if self.table is not None:
            self.table.weight.requires_grad_(sources.trains_table)

    def _new_mix(self) -> ScalarMix:
        return ScalarMix(self.sources.num_layers, do_layer_norm=self.sources.mix_norm)

    def vectors(
        self, layers: Tensor | None, lengths: Tensor, words: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Vectors of words and which are real.

        Args:
            layers: (B, K, T, N), zeros past a text's end; None for sources without an encoder.
            lengths: (B,) int64.
            words: ``characters`` (B, T, C), ELMo's ids, and ``rows`` (B, T) of the table, int64, as the sources are.

        Returns:
            (B, T, width), zeros past a text's end, and the mask (B, T).
        """
        parts: list[Tensor] = []
        mask: Tensor | None = None
        if layers is not None:
            mask = _mask(lengths, layers.shape[2])
            parts.append(layers[:, 0] if self.mix is None else self.mix(layers.unbind(1), mask))
        if self.characters is not None:
            assert words is not None
            ids = words["characters"]
            mask = _mask(lengths, ids.shape[1])
            parts.append(encode_unique(ids.flatten(0, 1), self.characters).unflatten(0, ids.shape[:2]))
        if self.table is not None:
            assert words is not None
            mask = _mask(lengths, words["rows"].shape[1])
            parts.append(self.table(words["rows"]))
        assert mask is not None
        return torch.cat(parts, -1).masked_fill(~mask[..., None], 0.0), mask

    def beside(self, output: Tensor, layers: Tensor | None, lengths: Tensor) -> Tensor:
        """An LSTM's output (B, T, H) and, with ``sources.output_mix``, the second mix of the layers beside it."""
        if self.output_mix is None:
            return output
        assert layers is not None
        return torch.cat((output, self.output_mix(layers.unbind(1), _mask(lengths, layers.shape[2]))), -1)

    def penalty(self) -> Tensor | float:
        """What the mixes' weights add to the loss, in training only: ``mix_l2`` times the sum of their squares."""
        if not self.training or not self.sources.mix_l2:
            return 0.0
        mixes = [mix for mix in (self.mix, self.output_mix) if mix is not None]
        return self.sources.mix_l2 * sum(
            (weight.square().sum() for mix in mixes for weight in mix.scalar_parameters), torch.zeros(())
        )


def _mask(lengths: Tensor, steps: int) -> Tensor:
    return torch.arange(steps, device=lengths.device) < lengths[:, None]
