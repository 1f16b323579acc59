# SPDX-License-Identifier: Apache-2.0
"""Word vectors as GloVe and word2vec write them as text: a word and its numbers a line."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator

import numpy as np

from ..._core.checks import shown
from ..._core.text_files import DAMAGE, damage, existing, numbered_lines, open_binary
from .files import fail


def read_vectors(
    path: str | os.PathLike[str], wanted: Collection[str] = (), *, most: int = 0
) -> tuple[list[str], np.ndarray]:
    """Read vectors of some words.

    Args:
        path: a word and its numbers a line, separated by single spaces, also .gz and .xz; word2vec's first line of two
            numbers is left out. A word may hold spaces, as some of GloVe's 840B do.
        wanted: the words that are to be read.
        most: how many of the file's first words are read besides, asked for or not.

    Returns:
        The words, in the file's order, and (words, D) float32. A word that comes again counts where it came first.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line with another number of numbers than the first, or with what is no finite number; file and
            line are named. None of the words is there.
    """
    names = frozenset(wanted)
    words: dict[str, int] = {}
    rows: list[np.ndarray] = []
    width, seen = 0, 0
    for line, content in _lines(path):
        if not content.strip():
            continue
        fields = content.rstrip(" ").split(" ")
        if line == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
            continue
        width = width or len(fields) - 1
        if width < 1 or len(fields) < width + 1:
            expected = f"{width} numbers, as in the first line" if width else "a word and numbers"
            raise fail(path, f"line {line}", f"has a word and {len(fields) - 1} numbers; expected {expected}")
        word = " ".join(fields[:-width])
        seen += 1
        if word in words or (word not in names and seen > most):
            continue
        try:
            row = np.array(fields[-width:], dtype=np.float32)
        except ValueError:
            row = np.array([np.nan], dtype=np.float32)
        if not np.isfinite(row).all():
            bad = next(field for field in fields[-width:] if not _is_number(field))
            raise fail(path, f"line {line}", f"has {shown(bad)} among its numbers; expected finite numbers")
        words[word] = len(rows)
        rows.append(row)
    if not rows:
        raise fail(path, "", f"has none of the {len(names):,} words asked for; expected vectors of some")
    return list(words), np.stack(rows)


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Numbered lines, one at a time: such files are large."""
    path = existing(path, "ctxfast.readers", str(path), "a file of word vectors")
    try:
        with open_binary(path) as file:
            for line, _, content in numbered_lines(file, "ctxfast.readers", str(path)):
                try:
                    yield line, content.decode("utf-8")
                except UnicodeDecodeError as error:
                    reason = f"byte {content[error.start]:#04x} is not UTF-8; expected UTF-8 text"
                    raise fail(path, f"line {line}", reason) from error
    except DAMAGE as error:
        raise fail(path, "", damage(path, error)) from error


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(np.float32(text)))
    except ValueError:
        return False
