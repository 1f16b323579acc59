# SPDX-License-Identifier: Apache-2.0
"""A model without weights behind the face of ``TextEncoder``: the vector of a word is made of its letters.

Nothing here depends on the batch, so that what ``Embedder``, the file jobs and the writers do can be checked exactly.
With ``carries`` a text's vectors also hold the number of texts its row of the batch has seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctxfast.embedding.encoders import Prepared, Where
from ctxfast.embedding.selection import Selection

DIM, LAYERS = 5, 3


def vectors(words: Sequence[str], seen: int = 0) -> np.ndarray:
    """(LAYERS, n, DIM) float32 of a text."""
    result = np.zeros((LAYERS, len(words), DIM), dtype=np.float32)
    for place, word in enumerate(words):
        seed = zlib.crc32(f"{place} {word}".encode("utf-8", "replace"))
        rows = np.random.default_rng(seed).standard_normal((LAYERS, DIM))
        result[:, place] = rows.astype(np.float32)
    result[:, :, 0] += seen
    return result


class FakeEncoder:
    kind = "elmo"
    num_layers, dim, is_padded = LAYERS, DIM, True
    device = torch.device("cpu")
    files = ()

    def __init__(self, *, carries: bool = False, limit: int | None = None) -> None:
        self.carries, self.limit = carries, limit
        self.seen = np.zeros(0, dtype=np.int64)
        self.batches: list[list[int]] = []

    def read_lines(self, lines: Sequence[bytes], selection: Selection) -> tuple[list[Any], int]:
        texts = [line.decode("utf-8", "replace") for line in lines]
        return [text.split() for text in texts], sum(text.count("\ufffd") for text in texts)

    def prepare(self, texts: Sequence[Any], selection: Selection, where: Where, truncate: bool) -> list[Prepared]:
        items = []
        for index, text in enumerate(texts):
            words = text.split() if isinstance(text, str) else list(text)
            cut = max(len(words) - (self.limit or len(words)), 0)
            if cut and not truncate:
                raise ValueError(
                    f"ctxfast.embed: {where(index)} has {len(words)} tokens; expected at most {self.limit}."
                )
            words = words[: len(words) - cut]
            rows = 1 if selection.level == "sentence" else len(words)
            items.append(Prepared(len(words), rows, words, cut=cut))
        return items

    def encode(self, batch: Sequence[Prepared], selection: Selection) -> Tensor:
        self.batches.append([item.length for item in batch])
        before = np.zeros(len(batch), dtype=np.int64)
        if self.carries:
            self.seen = np.pad(self.seen, (0, max(len(batch) - len(self.seen), 0)))
            before = self.seen[: len(batch)].copy()
            self.seen[: len(batch)] += 1
        parts = []
        for item, seen in zip(batch, before):
            layers = vectors(item.data, int(seen))[list(selection.layers)]
            if selection.is_average:
                layers = layers.mean(axis=0, keepdims=True)
            if selection.level == "sentence":
                layers = layers.sum(axis=1, keepdims=True) / max(len(item.data), 1)
            parts.append(layers.transpose(1, 0, 2))
        return torch.from_numpy(np.concatenate(parts))

    def tokens(self, item: Prepared, selection: Selection) -> list[str]:
        return list(item.data)

    def state_dict(self) -> dict[str, Tensor]:
        return {"seen": torch.from_numpy(self.seen.copy())} if self.carries else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seen = state["seen"].long().numpy().copy() if state else np.zeros(0, dtype=np.int64)
