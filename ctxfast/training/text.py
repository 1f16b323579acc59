# SPDX-License-Identifier: Apache-2.0
"""Lines of text files, plain or compressed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..corpus import BOM, DAMAGE, MAX_LINE_BYTES, archive_test, damage, open_binary

# A closed sentence before white space and an opening word, or Chinese punctuation with nothing after it.
# Only a run's first sign starts a match, so that a long row of dots is looked at once.
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]+[\"')\]”’]*(?=\s+[\"'(\[“‘]*(\w))|[。！？]+[”’」』）]*")


def text_lines(path: str | os.PathLike[str]) -> Iterator[str]:
    """Lines of a text file (plain, .gz, .xz), UTF-8, without their ends and without a byte order mark.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no UTF-8 or longer than 16 MiB, by its number; an archive that is damaged, with the
            last line read.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"ctxfast.training: text {path} {found}; expected a text file.")
    number = 0
    try:
        with open_binary(path) as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise ValueError(
                        f"ctxfast.training: line {number} of {path} has more than {MAX_LINE_BYTES} bytes; expected "
                        "lines of text. Is it a text file, with line feeds at the ends of its lines?"
                    )
                try:
                    line = (raw.removeprefix(BOM) if number == 1 else raw).decode("utf-8")
                except UnicodeDecodeError as error:
                    # A damaged archive may give wrong bytes before its checksum is reached.
                    way = archive_test(path) or "iconv converts other encodings"
                    raise ValueError(
                        f"ctxfast.training: line {number} of {path} is no UTF-8 ({error.reason}); expected UTF-8 text. "
                        f"{way}."
                    ) from None
                yield line.rstrip("\r\n")
    except DAMAGE as error:
        raise ValueError(f"ctxfast.training: text {path}, after line {number}, {damage(path, error)}") from error


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
