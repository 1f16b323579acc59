# SPDX-License-Identifier: Apache-2.0
"""The table of word vectors beside, or in place of, a contextual encoder: which words have a row, and what is in it."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._core.files import replacing
from ..._core.reading import reading
from ..readers.vectors import read_vectors

WORDS_FILE = "words.json"
# A word that occurs once in training is one that the table does not hold, so that the row of such words is learned.
_LEAST = 2
# Of a file of vectors, which has frequent words first: words of new texts beside those of training.
_MOST_OF_FILE = 50_000


class WordTable:
    """Words and their rows; row 0 is that of words which are not among them, and of padding.

    A word is looked up as it is and, if it is not there, in lower case.

    Args:
        words: those of rows 1 and on.
        vectors: (words + 1, D) float32 to begin with; None for new ones.
        dim: D, of new ones.
    """

    def __init__(self, words: Sequence[str], vectors: np.ndarray | None = None, dim: int = 100) -> None:
        self.words, self.vectors = tuple(words), vectors
        self.dim = dim if vectors is None else vectors.shape[1]
        self._rows = {word: row for row, word in enumerate(self.words, 1)}

    @classmethod
    def of(
        cls, texts: Iterable[Sequence[str]], *, vectors: str | os.PathLike[str] | None = None, dim: int = 100
    ) -> WordTable:
        """From the words of training data.

        Args:
            texts: lists of words.
            vectors: a file of vectors, see ``read_vectors``: the table has the words of training that it holds, and its
                first 50,000; row 0 is the mean of all. None: the words that occur twice or more, with new vectors.
            dim: size of new vectors.

        Raises:
            FileNotFoundError, ValueError: as ``read_vectors``; no word occurs twice.
        """
        counts = collections.Counter(word for text in texts for word in text)
        if vectors is not None:
            words, found = read_vectors(vectors, {*counts, *(word.lower() for word in counts)}, most=_MOST_OF_FILE)
            return cls(words, np.concatenate((found.mean(0, keepdims=True), found)))
        words = sorted(word for word, count in counts.items() if count >= _LEAST)
        if not words:
            raise ValueError(
                "ctxfast.finetune: no word occurs twice in the training data; expected so for a table of learned "
                "vectors. Choose characters, or give vectors."
            )
        return cls(words, dim=dim)

    @property
    def rows(self) -> int:
        """How many there are, row 0 included."""
        return len(self.words) + 1

    def fill(self, weight: Tensor) -> None:
        """Put the vectors to begin with, if there are some, into a parameter (rows, D)."""
        if self.vectors is not None:
            with torch.no_grad():
                weight.copy_(torch.from_numpy(self.vectors))

    def numbers(self, texts: Sequence[Sequence[str]]) -> Tensor:
        """(B, T) int64 rows of words, 0 past a text's end."""
        result = torch.zeros(len(texts), max(map(len, texts), default=0), dtype=torch.int64)
        for k, text in enumerate(texts):
            rows = [self._rows.get(word) or self._rows.get(word.lower(), 0) for word in text]
            result[k, : len(rows)] = torch.tensor(rows, dtype=torch.int64)
        return result

    def save(self, directory: Path) -> None:
        """Write the words; their vectors are among the head's weights."""
        with replacing(directory / WORDS_FILE) as temporary:
            temporary.write_text(json.dumps(list(self.words), ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, dim: int, who: str) -> WordTable:
        """Open what ``save`` wrote; the vectors are new ones.

        Raises:
            FileNotFoundError: no such file.
            ValueError: what is in it is no list of different words.
        """
        file = directory / WORDS_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{who}: {file} does not exist; expected the words of the head's table.")
        with reading(file, who, "list of words"):
            words: Any = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise ValueError(f"{who}: {file} is no list of words.")
            if len(set(words)) < len(words):
                raise ValueError(f"{who}: {file} has a word twice; expected every word once.")
        return cls(words, dim=dim)
