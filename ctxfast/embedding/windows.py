# SPDX-License-Identifier: Apache-2.0
"""Texts that are longer than a model takes, as windows that overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..models.bert.encoding import Encoding, TokenIds


@dataclass(frozen=True)
class Windows:
    """A text in pieces.

    Attributes:
        pieces: what the model sees of each: the tokens before a text (special ones, a prompt), a part of the text, the
            special tokens after it.
        rows: (n,), for each token of the whole text its row among those of all pieces, one after another: in the piece
            in which it has most context.
    """

    pieces: list[TokenIds]
    rows: np.ndarray


def cut(encoding: Encoding, before: int, after: int, limit: int, overlap: int) -> Windows:
    """The windows of a text.

    Args:
        encoding: the whole text.
        before, after: tokens at its ends that every window has.
        limit: most tokens of a window, these included.
        overlap: tokens that a window has in common with the next one.

    Of the windows that hold a token it is taken from the one whose nearer edge is farthest from it, the first of
    equals; the text's own ends are no edges.
    """
    size = len(encoding) - before - after
    most = limit - before - after
    count = max(-(-(size - overlap) // (most - overlap)), 1)
    starts = np.arange(count) * (most - overlap)
    ends = np.minimum(starts + most, size)
    rows = np.arange(len(encoding))
    context = np.full(size, -1)
    place = 0  # of the window's first row
    for start, end in zip(starts, ends):
        tokens = np.arange(start, end)
        left = tokens - start if start > 0 else np.full_like(tokens, size)
        right = end - 1 - tokens if end < size else np.full_like(tokens, size)
        own = np.minimum(left, right)
        is_best = own > context[start:end]
        context[start:end][is_best] = own[is_best]
        rows[before + start : before + end][is_best] = (place + before + tokens - start)[is_best]
        place += before + (end - start) + after
    rows[len(rows) - after :] = np.arange(place - after, place)
    ids, types, parts = encoding.ids, encoding.type_ids, zip(starts.tolist(), ends.tolist())
    return Windows([_piece(ids, types, before, after, *part) for part in parts], rows)


def _piece(ids: list[int], types: list[int], before: int, after: int, start: int, end: int) -> TokenIds:
    def part(values: Sequence[int]) -> list[int]:
        return [*values[:before], *values[before + start : before + end], *values[len(values) - after :]]

    return TokenIds(part(ids), part(types))
