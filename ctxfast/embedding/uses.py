# SPDX-License-Identifier: Apache-2.0
"""Uses of a word: its vectors in many sentences, layer by layer, which are near which, and a picture of them.

Reference: Peters et al. 2018, table 4: nearest neighbours of a word in its context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._core import pictures
from .embedder import Embedder

_WHO = "ctxfast.neighbours"
_BATCH = 512
_SHOWN = 8
_COLOURS = ("#c04a2b", "#1b7f79", "#6a51a3", "#b07aa1", "#8c6d31", "#3182bd")
_OTHERS = "#b8bec5"


@dataclass(frozen=True)
class Use:
    """A word in its sentence: ``words[index]``."""

    words: tuple[str, ...]
    index: int

    @property
    def word(self) -> str:
        return self.words[self.index]

    def shown(self, around: int = _SHOWN) -> str:
        """The word between asterisks, with so many words before and after it."""
        first, last = max(0, self.index - around), self.index + around + 1
        marked = [*self.words[first : self.index], f"*{self.word}*", *self.words[self.index + 1 : last]]
        return " ".join(["..."] * (first > 0) + marked + ["..."] * (last < len(self.words)))


def marked_use(text: str) -> Use:
    """The use that a text marks: words between white space, one of them between asterisks.

    Raises:
        ValueError: no word is marked, or several.
    """
    words = text.split()
    found = [index for index, word in enumerate(words) if len(word) > 2 and word[0] == word[-1] == "*"]
    if len(found) != 1:
        raise ValueError(
            f"{_WHO}: {text!r} marks {len(found)} words; expected one, between asterisks: 'a grassy *bank* by the "
            "river'. Punctuation stands apart from words."
        )
    (index,) = found
    words[index] = words[index][1:-1]
    return Use(tuple(words), index)


def uses_of(word: str, sentences: Iterable[Sequence[str]], *, context: int = 40) -> Iterator[Use]:
    """Every use of a word, upper and lower case alike, each with at most ``context`` words on either side."""
    wanted = word.casefold()
    for words in sentences:
        for index, other in enumerate(words):
            if other.casefold() == wanted:
                first = max(0, index - context)
                yield Use(tuple(words[first : index + context + 1]), index - first)


def embed_uses(embedder: Embedder, uses: Sequence[Use], progress: Callable[[int], None] | None = None) -> np.ndarray:
    """Vectors of words in their sentences, (uses, layers, dim) float32 of length 1: the mean of a word's pieces.

    Args:
        embedder: of BERT or ELMo.
        uses: what to embed.
        progress: called with the number of uses that are done.
    """
    vectors = np.empty((len(uses), embedder.num_layers, embedder.dim), np.float32)
    pieces: dict[str, Any] = {"word_pieces": "mean"} if embedder.kind == "bert" else {}
    for start in range(0, len(uses), _BATCH):
        part = uses[start : start + _BATCH]
        found = embedder([list(use.words) for use in part], layers="all", **pieces)
        for row, (use, layers) in enumerate(zip(part, found)):
            vectors[start + row] = layers[:, use.index]
        if progress is not None:
            progress(start + len(part))
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, norms, out=vectors, where=norms > 0)


def nearest(query: np.ndarray, vectors: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The uses nearest to one, by cosine, in every layer.

    Args:
        query: (layers, dim), of length 1.
        vectors: (uses, layers, dim), of length 1.
        top: how many; fewer if there are fewer.

    Returns:
        Numbers of uses (layers, top), the nearest first (of equals the first), and their cosines.
    """
    cosines = np.einsum("nkd,kd->kn", vectors, query)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
    return order, np.take_along_axis(cosines, order, axis=1)


def plane(vectors: np.ndarray) -> np.ndarray:
    """(N, dim) on the plane of its two largest principal components, (N, 2)."""
    centred = vectors - vectors.mean(0)
    left, singular, _ = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    found = left[:, :2] * singular[:2]
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


def _nearest_query(queries: np.ndarray, vectors: np.ndarray, top: int) -> np.ndarray:
    """For each use the query that it is nearest to, of those among whose ``top`` nearest it is; -1: of none.

    Args:
        queries, vectors: of one layer, (queries, dim) and (uses, dim), of length 1.
    """
    cosines = vectors @ queries.T
    order = np.argsort(-cosines, axis=0, kind="stable")[:top]
    near = np.full_like(cosines, -np.inf)
    np.put_along_axis(near, order, np.take_along_axis(cosines, order, axis=0), axis=0)
    return np.where(np.isfinite(near).any(1), near.argmax(1), -1)


def picture(path: str | Path, asked: Sequence[Use], queries: np.ndarray, vectors: np.ndarray, top: int) -> None:
    """Draw all uses, one panel a layer: each query a star, its ``top`` nearest uses in its colour.

    A use that is near several queries has the colour of the nearest. Both axes of a panel have one scale.

    Args:
        path: .png, .svg or .pdf.
        asked: the queries in their sentences, for title and legend.
        queries, vectors: as ``nearest`` takes them, queries stacked.
        top: see ``nearest``.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    layers = vectors.shape[1]
    columns = min(layers, 4)
    rows = -(-layers // columns)
    size = (3.2 * columns, 3.1 * rows + 0.5)
    drawing = pictures.figure_class(_WHO)(figsize=size, layout="constrained")
    drawing.suptitle(f"uses of {asked[0].word!r}, layer by layer (two principal components)")
    stars = []
    for layer, axes in enumerate(drawing.subplots(rows, columns, squeeze=False).flat):
        if layer >= layers:
            axes.set_visible(False)
            continue
        places = plane(np.concatenate([vectors[:, layer], queries[:, layer]]))
        uses, own = places[: len(vectors)], places[len(vectors) :]
        axes.scatter(*uses.T, s=9, color=_OTHERS, linewidths=0)
        stars = []
        taken = _nearest_query(queries[:, layer], vectors[:, layer], top)
        for number, star in enumerate(own):
            colour = _COLOURS[number % len(_COLOURS)]
            near = uses[taken == number]
            axes.scatter(*near.T, s=16, color=colour, linewidths=0)
            look = {"marker": "*", "s": 130, "color": colour, "edgecolors": "white", "linewidths": 0.8, "zorder": 3}
            stars.append(axes.scatter(*star, **look))
        axes.set_title("token layer" if layer == 0 else f"layer {layer}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        # Vectors have length 1: what is apart by roundings alone lies on one point.
        middle, half = (places.max(0) + places.min(0)) / 2, max(float(np.ptp(places, axis=0).max()) * 0.56, 0.05)
        axes.set_xlim(middle[0] - half, middle[0] + half)
        axes.set_ylim(middle[1] - half, middle[1] + half)
    drawing.legend(stars, [use.shown() for use in asked], loc="outside lower left", fontsize=8, frameon=False)
    pictures.save(drawing, path, dpi=150)
