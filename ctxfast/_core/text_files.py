# SPDX-License-Identifier: Apache-2.0
"""Text files, plain, .gz or .xz: their lines one by one in constant memory, or all of a file within bounds."""

from __future__ import annotations

import gzip
import io
import itertools
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

PACKED_SUFFIXES = (".gz", ".xz")
# What decompression raises where a file is not an archive, is truncated, or holds wrong bytes.
DAMAGE = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, MemoryError)
# A file without line ends must not fill the memory before anything says so.
MAX_LINE_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"
_EDGE_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 20
# What is read whole: at most so many bytes; and of a packed file, beyond the second, so many times its size. Text is
# packed to a tenth or less; a few megabytes that unpack to gigabytes are a mistake, or a trap.
MAX_WHOLE_BYTES = 4 << 30
_SURE_BYTES = 64 << 20
_MOST_PACKED = 50
# xz keeps up to 64 MiB of what it has unpacked at its highest level; files may ask for 4 GiB.
_XZ_MEMORY = 512 << 20


def open_binary(path: Path) -> BinaryIO:
    """A file to read, .gz and .xz unpacked."""
    if path.suffix == ".gz":
        if path.stat().st_size == 0:
            raise EOFError("it is empty")
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".xz":
        return io.BufferedReader(_Xz(path), _BLOCK_BYTES)
    return open(path, "rb", buffering=_BLOCK_BYTES)


def position(file: BinaryIO) -> int:
    """How many bytes of the file on the disk have been read, by what ``open_binary`` gave."""
    opened: Any = file  # more than a BinaryIO shows
    if isinstance(opened, gzip.GzipFile):
        opened = opened.fileobj
    elif isinstance(opened.raw, _Xz):
        return opened.raw.position
    return opened.tell()


class _Xz(io.RawIOBase):
    """The streams of an .xz file, one after another. Python's own reader takes whatever it cannot read after the first
    one for the end, damage included, and gives a file as much memory as it asks for."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115
        self._stream: lzma.LZMADecompressor | None = None
        self._packed = b""
        self._count = 0

    @property
    def position(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while True:
            stream = self._stream or self._begin()
            if stream is None:
                return 0
            if stream.needs_input and not self._packed:
                self._packed = self._file.read(_EDGE_BYTES)
                if not self._packed:
                    raise EOFError("it ends in the middle")
            data = stream.decompress(self._packed, len(buffer))
            self._packed = b""
            if stream.eof:
                self._packed, self._stream = stream.unused_data, None
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _begin(self) -> lzma.LZMADecompressor | None:
        """The next stream, if one follows; zeros, four by four, may stand between."""
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
            raise EOFError("its padding is not a multiple of four bytes" if zeros else "it is empty")
        self._packed = rest
        if not rest:
            return None
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        self._count += 1
        return self._stream

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


def existing(path: str | os.PathLike[str], who: str, name: str, expected: str = "a text file") -> Path:
    """The path of a file that is there.

    Raises:
        FileNotFoundError: no such file; ``who: name does not exist; expected ...``.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{who}: {name} {found}; expected {expected}.")
    return path


def numbered_lines(file: BinaryIO, who: str, name: str, before: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """Lines of an open file, ``before`` of which were read already.

    A line ends at "\\n"; a "\\r" before it and a byte order mark at the start of the file are dropped. Nothing else
    ends a line, so that line numbers are those of every editor and of ``wc -l``.

    Yields:
        The line's number, from 1; its bytes in the file; its content.

    Raises:
        ValueError: a line of more than 16 MiB, by its number.
    """
    for number in itertools.count(before + 1):
        raw = file.readline(MAX_LINE_BYTES + 1)
        if not raw:
            return
        if len(raw) > MAX_LINE_BYTES:
            raise ValueError(
                f"{who}: line {number} of {name} has more than {MAX_LINE_BYTES} bytes; expected lines of text. Is it a "
                f"text file, with line feeds at the ends of its lines?"
            )
        text = raw.removesuffix(b"\n").removesuffix(b"\r")
        yield number, len(raw), text.removeprefix(_BOM) if number == 1 else text
