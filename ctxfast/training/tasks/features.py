# SPDX-License-Identifier: Apache-2.0
"""Inputs of the LSTM heads: layers of a frozen encoder, or the characters of an ELMo model that is trained, and words
by themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, pre_tokenizers
from torch import Tensor

from ..._core import progress
from ..._core.files import replacing
from ...embedding.embedder import Embedder
from ...models.elmo.bilm import ElmoBiLm
from ...models.elmo.tokenization import batch_to_ids
from ...models.elmo.weights import save_weights
from .bert_inputs import Frame, windows, word_pieces
from .word_table import WordTable

FEATURES = ("last", "second-to-last", "sum4", "concat4", "mix4", "mix", "embeddings")
_LAST4 = [-4, -3, -2, -1]
_LAYERS = {"last": [-1], "second-to-last": [-2], "sum4": _LAST4, "concat4": _LAST4, "mix4": _LAST4, "mix": "all"}
# All layers of so many texts exist at a time, also where but their sum is kept.
_EMBEDDED_TEXTS = 512
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# Chinese and Japanese have no spaces: each character is a word, as in BERT's tokenizer. Combining marks belong to
# their letter.
_IDEOGRAPH = r"[\p{Han}\p{Hiragana}\p{Katakana}]"
_AT_SPACES = pre_tokenizers.WhitespaceSplit()
_BY_SPACES = pre_tokenizers.Sequence([_AT_SPACES, pre_tokenizers.Split(Regex(_IDEOGRAPH), "isolated")])
_BY_SIGNS = pre_tokenizers.Sequence(
    [_AT_SPACES, pre_tokenizers.Split(Regex(rf"{_IDEOGRAPH}|[^\p{{L}}\p{{M}}\p{{N}}]"), "isolated")]
)
# Vectors of the training data are kept up to this much; beyond it they are computed anew for each batch.
_KEPT_BYTES = 4 << 30


def split_words(text: str, at_signs: bool = False) -> list[tuple[str, tuple[int, int]]]:
    """Words of a text and where they stand among its characters.

    They are separated by white space, and around every Chinese or Japanese character; with ``at_signs`` also around
    every other character that is not a letter, mark or number.
    """
    splitter = _BY_SIGNS if at_signs else _BY_SPACES
    # JSON may hold half a surrogate pair, which other libraries refuse. Replaced one for one, so that offsets stay.
    return splitter.pre_tokenize_str(_LONE_SURROGATE.sub("\ufffd", text))


@dataclass(slots=True)
class WordItem:
    """A text as words, what its task makes of it, and its vectors (K, n, N) if they are kept."""

    words: list[str]
    labels: Any = None
    predicate: list[bool] | None = None
    vectors: np.ndarray | None = None
    index: int = 0

    @property
    def length(self) -> int:
        return len(self.words)


class FrozenLayers:
    """Vectors of words from an encoder that is not trained.

    Args:
        embedder: BERT (the first piece of a word stands for it) or ELMo.
        features: "last", "second-to-last", "sum4" (sum of the last four layers), "concat4", "embeddings" (the token
            layer), or for a learned weighted sum "mix4" (the last four) and "mix" (all, the token layer included).

    Attributes:
        num_layers, dim: K and N of what ``__call__`` returns.

    Raises:
        ValueError: unknown features, or layers that the encoder does not have.
    """

    def __init__(self, embedder: Embedder, features: str) -> None:
        if features not in FEATURES:
            raise ValueError(f"ctxfast.finetune: features is {features!r}; expected one of {', '.join(FEATURES)}.")
        layers = _LAYERS.get(features, [0])
        if layers != "all" and len(layers) > embedder.num_layers:
            raise ValueError(
                f"ctxfast.finetune: features is {features!r}, but the model has {embedder.num_layers} layers; expected "
                f"4 or more for it. Choose 'mix'."
            )
        self.embedder, self.features, self._layers = embedder, features, layers
        self.num_layers = {"mix": embedder.num_layers, "mix4": 4}.get(features, 1)
        self.dim = embedder.dim * (4 if features == "concat4" else 1)

    def __call__(self, texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Lists of words -> (K, n, N) float32 each."""
        watch, found = progress.watched(), []
        for start in range(0, len(texts), _EMBEDDED_TEXTS):
            found += self._some(texts[start : start + _EMBEDDED_TEXTS])
            if watch is not None:
                watch("computing frozen layers", len(found), len(texts))
        return found

    def _some(self, texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        parts, owners = self._parts(texts)
        # Windows fit; only a single word longer than the model is cut, behind its first piece.
        found = self.embedder([words for words, _, _ in parts], layers=self._layers, truncate=True)
        rows: list[list[np.ndarray]] = [[] for _ in texts]
        for (_, start, end), owner, vectors in zip(parts, owners, found):
            vectors = vectors if vectors.ndim == 3 else vectors[None]
            rows[owner].append(vectors[:, start:end])
        return [self._combined(np.concatenate(own, 1)) for own in rows]

    def _parts(self, texts: Sequence[Sequence[str]]) -> tuple[list[tuple[list[str], int, int]], list[int]]:
        """Texts, in windows where BERT's positions do not suffice: words and which of them count."""
        parts, owners = [], []
        tokenizer = getattr(self.embedder.encoder, "tokenizer", None)
        if tokenizer is None or tokenizer.max_length is None:
            return [(list(text), 0, len(text)) for text in texts], list(range(len(texts)))
        room = Frame(tokenizer).room(tokenizer.max_length)
        for owner, (text, pieces) in enumerate(zip(texts, word_pieces(tokenizer, texts))):
            for window in windows([min(len(own), room) for own in pieces], room):
                words = list(text[window.start : window.end])
                parts.append((words, window.own_start - window.start, window.own_end - window.start))
                owners.append(owner)
        return parts, owners

    def _combined(self, vectors: np.ndarray) -> np.ndarray:
        if self.features == "sum4":
            return vectors.sum(0, keepdims=True)
        if self.features == "concat4":
            return np.concatenate(list(vectors), -1)[None]
        return vectors


def save_encoder(encoder: Any, directory: Path) -> None:
    """Write a BERT or ELMo encoder as files that ``Embedder`` opens."""
    directory.mkdir(parents=True, exist_ok=True)
    if encoder.kind == "bert":
        encoder.model.save_pretrained(directory, overwrite=True)
        encoder.tokenizer.save(directory)
        return
    save_bilm(encoder.model, directory)


def save_bilm(bilm: ElmoBiLm, directory: Path) -> None:
    """Write an ELMo language model as options.json and weights.hdf5."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "options.json", directory / "weights.hdf5"
    save_weights(bilm.state_dict(), bilm.config, *paths, overwrite=True)


def save_feature_model(model: Any, inputs: WordInputs, directory: Path) -> None:
    """Write ``encoder``/ if there is one, ``head.safetensors``, and the words of a table."""
    if inputs.form == "elmo":
        save_bilm(model.bilm, directory / "encoder")
    elif inputs.frozen is not None:
        save_encoder(inputs.frozen.embedder.encoder, directory / "encoder")
    head = model.head if inputs.form == "elmo" else model
    with replacing(directory / "head.safetensors") as temporary:
        save_file({name: value.contiguous().cpu() for name, value in head.state_dict().items()}, temporary)
    if inputs.table is not None:
        inputs.table.save(directory)


class WordInputs:
    """Words to a batch for an LSTM head: vectors of a frozen encoder, or characters of an ELMo that is trained; and
    what the head itself reads words by.

    Args:
        frozen: where vectors come from; None without a frozen encoder.
        max_characters: of a word, for an ELMo that is trained with the head; 0 without one.
        has_characters: whether the head reads the characters of words.
        table: the words of the head's table of vectors.

    Attributes:
        form: "features", "elmo", or "words" without an encoder.
    """

    def __init__(
        self,
        frozen: FrozenLayers | None = None,
        *,
        max_characters: int = 0,
        has_characters: bool = False,
        table: WordTable | None = None,
    ) -> None:
        self.frozen, self.max_characters = frozen, max_characters
        self.has_characters, self.table = has_characters, table
        self.form = "features" if frozen is not None else "elmo" if max_characters else "words"

    @property
    def features(self) -> str | None:
        """Which layers of a frozen encoder are read."""
        return None if self.frozen is None else self.frozen.features

    def keep(self, items: Sequence[WordItem]) -> None:
        """Compute the items' vectors once, if they fit."""
        if self.frozen is None:
            return
        size = 4 * self.frozen.num_layers * self.frozen.dim * sum(item.length for item in items)
        if size <= _KEPT_BYTES:
            for item, vectors in zip(items, self.frozen([item.words for item in items])):
                item.vectors = vectors

    @staticmethod
    def lengths(items: Sequence[WordItem]) -> Tensor:
        """(B,) int64."""
        return torch.tensor([item.length for item in items])

    def collate(self, items: Sequence[WordItem]) -> dict[str, Any]:
        """``lengths`` (B,); ``layers`` (B, K, T, N), or ``character_ids`` (B, T, C) of ELMo; ``words``, as
        ``TokenVectors.vectors`` takes them."""
        batch: dict[str, Any] = {"lengths": self.lengths(items)}
        texts = [item.words for item in items]
        if self.frozen is not None:
            batch["layers"] = self._layers(self.frozen, items)
        elif self.max_characters:
            batch["character_ids"] = batch_to_ids(texts, max_characters=self.max_characters)
        else:
            batch["layers"] = None
        words = {}
        if self.has_characters:
            words["characters"] = batch_to_ids(texts)
        if self.table is not None:
            words["rows"] = self.table.numbers(texts)
        if words:
            batch["words"] = words
        return batch

    @staticmethod
    def _layers(frozen: FrozenLayers, items: Sequence[WordItem]) -> Tensor:
        vectors = [item.vectors for item in items if item.vectors is not None]
        if len(vectors) < len(items):
            vectors = frozen([item.words for item in items])
        shape = (len(items), frozen.num_layers, max(item.length for item in items), frozen.dim)
        layers = np.zeros(shape, dtype=np.float32)
        for k, own in enumerate(vectors):
            layers[k, :, : own.shape[1]] = own
        return torch.from_numpy(layers)
