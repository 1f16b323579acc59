# SPDX-License-Identifier: Apache-2.0
"""Text files read in windows of lines, in constant memory. Lines are bytes here: what they mean is for the model to
say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from .._core.text_files import DAMAGE, PACKED_SUFFIXES, damage, existing, numbered_lines, open_binary

EMPTY_RULES = ("keep", "skip", "error")
# A window holds no more text than this, however many lines were allowed: what is being worked on is lost by a kill.
_WINDOW_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 20
_WHO = "ctxfast.embed"


@dataclass(frozen=True)
class Position:
    """A place between two lines: bytes of (uncompressed) text before it, and lines before it."""

    offset: int = 0
    line: int = 0


@dataclass
class Window:
    """Lines read together.

    Attributes:
        texts: the lines, without their ends.
        numbers: the number of each in the file, from 0 (they jump where blank lines are skipped).
        end: where the next window starts.
        is_last: whether nothing follows.
        skipped: blank lines left out.
    """

    end: Position
    texts: list[bytes] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    is_last: bool = False
    skipped: int = 0


def is_blank(line: bytes) -> bool:
    """Whether a line holds only white space, Unicode's included."""
    text = line.strip()
    if not text:
        return True
    # What is left can only be white space if it begins with some that is not ASCII.
    return text[0] > 127 and not text.decode("utf-8", "replace").strip()


class Corpus:
    """The lines of a text file, plain, .gz or .xz.

    Args:
        path: the file.
        empty: what to do with a blank line: "keep" it as a text without words, "skip" it, or "error".
        window: most lines of a window.
        multiple: windows end after a multiple of this many lines (the last one excepted).
        name: what messages call it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown rule, a window below 1.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        empty: str = "keep",
        window: int = 4096,
        multiple: int = 1,
        name: str = "",
    ) -> None:
        self.name = name or str(path)
        if empty not in EMPTY_RULES:
            raise ValueError(f"{_WHO}: empty is {empty!r}; expected one of {', '.join(EMPTY_RULES)}.")
        if window < 1:
            raise ValueError(f"{_WHO}: window is {window}; expected 1 line or more.")
        self.path = existing(path, _WHO, f"input {self.name}")
        self.empty, self.multiple = empty, multiple
        self.window = max(window // multiple, 1) * multiple
        self.is_compressed = self.path.suffix in PACKED_SUFFIXES

    @property
    def size(self) -> int | None:
        """Bytes of text in the file; None where they are compressed."""
        return None if self.is_compressed else self.path.stat().st_size

    def windows(self, start: Position | None = None) -> Iterator[Window]:
        """The lines from ``start`` on; the last window says so and may be empty.

        Raises:
            ValueError: a blank line under "error", a line of more than 16 MiB, or a damaged compressed file; the
                message has its number, counted from 1.
        """
        start = start or Position()
        try:
            with open_binary(self.path) as file:
                _skip(file, start.offset, self.is_compressed)
                lines = numbered_lines(file, _WHO, self.name, start.line)
                position, is_last = start, False
                while not is_last:
                    window = self._read(lines, position)
                    position, is_last = window.end, window.is_last
                    yield window
        except DAMAGE as error:
            raise ValueError(f"{_WHO}: {self.name} {damage(self.path, error)}") from error

    def _read(self, lines: Iterator[tuple[int, int, bytes]], start: Position) -> Window:
        window = Window(start)
        texts, limit, multiple = window.texts, self.window, self.multiple
        offset, number, size = start.offset, start.line, 0
        while len(texts) < limit and (size < _WINDOW_BYTES or len(texts) % multiple):
            line = next(lines, None)
            if line is None:
                window.is_last = True
                break
            number, length, text = line
            offset += length
            if self.empty != "keep" and is_blank(text):
                if self.empty == "error":
                    raise ValueError(
                        f"{_WHO}: line {number} of {self.name} is blank; expected a sentence on every line. Pass "
                        f"--empty keep or --empty skip."
                    )
                window.skipped += 1
            else:
                texts.append(text)
                window.numbers.append(number - 1)
                size += len(text)
        window.end = Position(offset, number)
        return window


def _skip(file: BinaryIO, offset: int, is_compressed: bool) -> None:
    if not is_compressed:
        file.seek(offset)
        return
    while offset and (block := file.read(min(offset, _BLOCK_BYTES))):
        offset -= len(block)
