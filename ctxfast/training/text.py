# SPDX-License-Identifier: Apache-2.0
"""Lines of text files, plain or compressed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..corpus import open_binary

# A closed sentence before white space and an opening word, or Chinese punctuation with nothing after it.
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]”’]*(?=\s+[\"'(\[“‘]*(\w))|[。！？]+[”’」』）]*")


def text_lines(path: str | os.PathLike[str]) -> Iterator[str]:
    """Lines of a text file (plain, .gz, .xz), UTF-8, without their ends.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no UTF-8, by its number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"ctxfast.training: text {path} does not exist; expected a text file.")
    with open_binary(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"ctxfast.training: line {number} of {path} is no UTF-8 ({error.reason}).") from None
            yield line.rstrip("\r\n")


def split_sentences(line: str) -> Iterator[str]:
    """Sentences of a line of running text, by simple rules.

    A sentence ends after ``. ! ?`` and closing quotes or brackets where white space and a capital or a digit follow,
    and after ``。！？``. Abbreviations before a name end one, too.
    """
    start = 0
    for found in _SENTENCE_END.finditer(line):
        follows = found[1]
        if follows is None or follows.isupper() or follows.isdigit():
            if sentence := line[start : found.end()].strip():
                yield sentence
            start = found.end()
    if sentence := line[start:].strip():
        yield sentence
