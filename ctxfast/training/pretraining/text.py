# SPDX-License-Identifier: Apache-2.0
"""Lines of text files, plain or compressed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ..._core import progress
from ..._core.text_files import DAMAGE, archive_test, damage, existing, numbered_lines, open_binary, position

_WHO = "ctxfast.training"
_LINES_BETWEEN = 256  # two words of how far a file is read

# A closed sentence before white space and an opening word, or Chinese punctuation with nothing after it.
# Only a run's first sign starts a match, so that a long row of dots is looked at once.
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]+[\"')\]”’]*(?=\s+[\"'(\[“‘]*(\w))|[。！？]+[”’」』）]*")


def text_lines(path: str | os.PathLike[str]) -> Iterator[str]:
    """Lines of a text file (plain, .gz, .xz), UTF-8, as ``numbered_lines`` gives them; whoever watches is told of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not UTF-8 or longer than 16 MiB, by its number; an archive that is damaged, with the
            last line read.
    """
    path = existing(path, _WHO, f"text {path}")
    number, watch = 0, progress.watched()
    what, size = f"reading {path.name}", path.stat().st_size
    try:
        with open_binary(path) as file:
            for number, _, text in numbered_lines(file, _WHO, str(path)):
                try:
                    line = text.decode("utf-8").rstrip("\r")
                except UnicodeDecodeError as error:
                    # A damaged archive may give wrong bytes before its checksum is reached.
                    way = archive_test(path) or "iconv converts other encodings"
                    raise ValueError(
                        f"{_WHO}: line {number} of {path} is not UTF-8 ({error.reason}); expected UTF-8 text. {way}."
                    ) from None
                if watch is not None and number % _LINES_BETWEEN == 0:
                    watch(what, position(file), size)
                yield line
        if watch is not None:
            watch(what, size, size)
    except DAMAGE as error:
        raise ValueError(f"{_WHO}: text {path}, after line {number}, {damage(path, error)}") from error


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
