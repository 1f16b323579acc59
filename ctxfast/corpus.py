# SPDX-License-Identifier: Apache-2.0
"""Text files read in windows of lines, in constant memory, and batches made of them.

A line ends at "\\n"; a "\\r" before it and a byte order mark at the start of the file are dropped. Nothing else ends
a line, so that line numbers are those of every editor and of ``wc -l``. Lines are bytes here: what they mean is for
the model to say.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ._core.files import create, naming

PACKED_SUFFIXES = (".gz", ".xz")
# What unpacking raises where a file is no archive, is cut short, or holds wrong bytes.
DAMAGE = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, MemoryError)
EMPTY_RULES = ("keep", "skip", "error")
# A file without line ends must not fill the memory before anything says so.
MAX_LINE_BYTES = 16 << 20
# A window holds no more text than this, however many lines were allowed: what is being worked on is lost by a kill.
_WINDOW_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
_EDGE_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 20
# What is read whole: at most so many bytes; and of a packed file, beyond the second, so many times its size. Text is
# packed to a tenth or less; a few megabytes that unpack to gigabytes are a mistake, or a trap.
MAX_WHOLE_BYTES = 4 << 30
_SURE_BYTES = 64 << 20
_MOST_PACKED = 50
# xz keeps up to 64 MiB of what it has unpacked at its highest level; files may ask for 4 GiB.
_XZ_MEMORY = 512 << 20


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


def open_binary(path: Path) -> BinaryIO:
    """A file to read, .gz and .xz unpacked."""
    if path.suffix == ".gz":
        if path.stat().st_size == 0:
            raise EOFError("it is empty")
        return gzip.open(path, "rb")
    if path.suffix == ".xz":
        return io.BufferedReader(_Xz(path), _BLOCK_BYTES)
    return open(path, "rb", buffering=_BLOCK_BYTES)


class _Xz(io.RawIOBase):
    """The streams of an .xz file, one after another. Python's own reader takes whatever it cannot read after the first
    one for the end, damage included, and gives a file as much memory as it asks for."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._stream: lzma.LZMADecompressor | None = None
        self._packed = b""
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while True:
            if self._stream is None and not self._begin():
                return 0
            if self._stream.needs_input and not self._packed:
                self._packed = self._file.read(_EDGE_BYTES)
                if not self._packed:
                    raise EOFError("it ends in the middle")
            data = self._stream.decompress(self._packed, len(buffer))
            self._packed = b""
            if self._stream.eof:
                self._packed, self._stream = self._stream.unused_data, None
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _begin(self) -> bool:
        """Whether another stream follows; zeros, four by four, may stand between."""
        zeros = 0
        while True:
            if not self._packed:
                self._packed = self._file.read(_EDGE_BYTES)
            rest = self._packed.lstrip(b"\0") if self._count else self._packed
            zeros += len(self._packed) - len(rest)
            if rest or not self._packed:
                break
            self._packed = b""
        if zeros % 4 or (not self._count and not rest):
            raise EOFError("its padding is no multiple of four bytes" if zeros else "it is empty")
        self._packed = rest
        if rest:
            self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
            self._count += 1
        return bool(rest)

    def close(self) -> None:
        self._file.close()
        super().close()


def read_whole(path: Path) -> bytes:
    """All bytes of a file, .gz and .xz unpacked.

    Raises:
        ValueError: more than is read whole; the reason alone, without the file. ``DAMAGE`` of packed files as it comes.
    """
    size = path.stat().st_size
    limit = MAX_WHOLE_BYTES
    if path.suffix in PACKED_SUFFIXES:
        limit = min(limit, max(_SURE_BYTES, _MOST_PACKED * size))
    blocks, total = [], 0
    with open_binary(path) as file:
        while block := file.read(_BLOCK_BYTES):
            total += len(block)
            if total > limit:
                what = f"is packed to less than a {_MOST_PACKED}th" if limit < MAX_WHOLE_BYTES else "is large"
                raise ValueError(
                    f"{what}: more than {limit >> 20} MiB of text; expected less, as it is read whole. Unpack it, or "
                    f"split it"
                )
            blocks.append(block)
    return b"".join(blocks)


def damage(path: Path, error: Exception) -> str:
    """What one of ``DAMAGE`` says of a packed file, and the way out."""
    reason = str(error) or type(error).__name__
    return f"is damaged, cut short or no {path.suffix} file ({reason}). {archive_test(path)}; fetch or pack it anew."


def archive_test(path: Path) -> str:
    """What tells whether a packed file is sound; "" for one that is not packed."""
    return {".gz": "gzip -t tests it", ".xz": "xz -t tests it"}.get(path.suffix, "")


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
        self.path = Path(path)
        self.name = name or str(path)
        if empty not in EMPTY_RULES:
            raise ValueError(f"ctxfast.embed: empty is {empty!r}; expected one of {', '.join(EMPTY_RULES)}.")
        if window < 1:
            raise ValueError(f"ctxfast.embed: window is {window}; expected 1 line or more.")
        if not self.path.is_file():
            found = "is a directory" if self.path.is_dir() else "does not exist"
            raise FileNotFoundError(f"ctxfast.embed: input {self.name} {found}; expected a text file.")
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
                offset, number = start.offset, start.line
                is_last = False
                while not is_last:
                    window = self._read(file, offset, number)
                    offset, number, is_last = window.end.offset, window.end.line, window.is_last
                    yield window
        except DAMAGE as error:
            raise ValueError(f"ctxfast.embed: {self.name} {damage(self.path, error)}") from error

    def _read(self, file: BinaryIO, offset: int, number: int) -> Window:
        window = Window(Position())
        texts, numbers = window.texts, window.numbers
        limit, multiple, size = self.window, self.multiple, 0
        while len(texts) < limit and (size < _WINDOW_BYTES or len(texts) % multiple):
            raw = file.readline(MAX_LINE_BYTES + 1)
            if not raw:
                window.is_last = True
                break
            if len(raw) > MAX_LINE_BYTES:
                raise ValueError(
                    f"ctxfast.embed: line {number + 1} of {self.name} has more than {MAX_LINE_BYTES} bytes; expected "
                    f"one sentence a line. Is it a text file?"
                )
            text = raw[:-1] if raw.endswith(b"\n") else raw
            if text.endswith(b"\r"):
                text = text[:-1]
            if offset == 0:
                text = text.removeprefix(BOM)
            offset += len(raw)
            if self.empty != "keep" and is_blank(text):
                if self.empty == "error":
                    raise ValueError(
                        f"ctxfast.embed: line {number + 1} of {self.name} is blank; expected a sentence on every line. "
                        f"Pass --empty keep or --empty skip."
                    )
                window.skipped += 1
            else:
                texts.append(text)
                numbers.append(number)
                size += len(text)
            number += 1
        window.end = Position(offset, number)
        return window


def _skip(file: BinaryIO, offset: int, is_compressed: bool) -> None:
    if not is_compressed:
        file.seek(offset)
        return
    while offset and (block := file.read(min(offset, _BLOCK_BYTES))):
        offset -= len(block)


def token_batches(lengths: Sequence[int], budget: int, *, is_padded: bool) -> list[list[int]]:
    """Group texts into batches of similar length, the longest first.

    Args:
        lengths: tokens of each text.
        budget: most tokens of a batch; a longer text is a batch of its own.
        is_padded: whether padding counts: all texts of a batch cost as much as its longest.

    Returns:
        Indices into ``lengths``, every one in exactly one batch; equal lengths keep their order.
    """
    batches: list[list[int]] = []
    batch: list[int] = []
    longest = total = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[index]
        cost = (len(batch) + 1) * longest if is_padded else total + length
        if batch and cost > budget:
            batches.append(batch)
            batch, total = [], 0
        if not batch:
            longest = length
        batch.append(index)
        total += length
    if batch:
        batches.append(batch)
    return batches


def fixed_batches(count: int, size: int) -> list[list[int]]:
    """Batches of ``size`` texts in the order of the input."""
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content."""
    result = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            result.update(block)
    return result.hexdigest()


def fingerprint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What tells one version of a large file from another: size, time of change, SHA-256 of its two ends."""
    status = os.stat(path)
    result = hashlib.sha256()
    with open(path, "rb") as file:
        result.update(file.read(_EDGE_BYTES))
        file.seek(max(status.st_size - _EDGE_BYTES, 0))
        result.update(file.read(_EDGE_BYTES))
    return {"size": status.st_size, "modified_ns": status.st_mtime_ns, "ends": result.hexdigest()}


def spool(stream: BinaryIO, path: Path) -> int:
    """Write all of a stream to a file, under a temporary name first; returns its bytes."""
    temporary = path.with_name(path.name + ".tmp")
    size = 0
    with naming(path), create(temporary) as file:
        while block := stream.read(_BLOCK_BYTES):
            size += file.write(block)
    os.replace(temporary, path)
    return size
