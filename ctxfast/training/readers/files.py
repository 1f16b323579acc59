# SPDX-License-Identifier: Apache-2.0
"""Text files, packed or not, and errors that say where."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..._core.text_files import DAMAGE, MAX_LINE_BYTES, PACKED_SUFFIXES, damage, existing, read_whole

_LONGEST_REASON = 500


def fail(path: str | os.PathLike[str], where: str, reason: str) -> ValueError:
    """The error of something wrong in a data file; ``where`` is such as "line 12"."""
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:_LONGEST_REASON]}..."
    place = f"{os.fspath(path)}, {where}" if where else os.fspath(path)
    return ValueError(f"ctxfast.readers: {place}: {reason}")


def data_suffix(path: str | os.PathLike[str]) -> str:
    """The suffix that names the format: of x.tsv.xz it is .tsv."""
    path = Path(path)
    return (Path(path.stem) if path.suffix in PACKED_SUFFIXES else path).suffix.lower()


def read_text(path: str | os.PathLike[str], *, has_lines: bool = True) -> str:
    """The text of a UTF-8 file, .gz and .xz unpacked, without a byte order mark; line ends become "\\n".

    Args:
        path: the file.
        has_lines: whether lines have a length that makes sense, 16 MiB at most.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, not what its suffix says, too large, or empty.
    """
    path = existing(path, "ctxfast.readers", str(path), "a file of labelled data")
    try:
        data = read_whole(path)
    except DAMAGE as error:
        raise fail(path, "", damage(path, error)) from error
    except ValueError as error:
        raise fail(path, "", str(error)) from None
    if has_lines:
        _check_lines(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise fail(path, f"line {line}", f"byte {data[error.start]:#04x} is not UTF-8; expected UTF-8 text") from error
    if not text.strip():
        raise fail(path, "", "is empty; expected labelled data")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise fail(path, f"line {line}", "holds a NUL character; expected UTF-8 text. Is it UTF-16?")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check_lines(path: Path, data: bytes) -> None:
    """Refuse lines that are none of a text."""
    start = 0
    while len(data) - start > MAX_LINE_BYTES:
        end = max(
            data.rfind(b"\n", start, start + MAX_LINE_BYTES + 1), data.rfind(b"\r", start, start + MAX_LINE_BYTES + 1)
        )
        if end < 0:
            line = data.count(b"\n", 0, start) + 1
            raise fail(path, f"line {line}", f"has more than {MAX_LINE_BYTES} bytes; expected lines of labelled data")
        start = end + 1


def parse_json(path: str | os.PathLike[str], line: int, text: str) -> object:
    """A value of JSON.

    Args:
        path, line: where the text begins, for errors.
        text: the JSON.

    Raises:
        ValueError: no JSON, nested too deep, or a number of thousands of digits; with its line and column.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except _Twice as error:
        raise fail(
            path, f"line {line}", f"has the key {error.args[0]!r} twice in one object; expected it once"
        ) from None
    except json.JSONDecodeError as error:
        reason = f"is not JSON ({error.msg} at column {error.colno})"
        raise fail(path, f"line {line + error.lineno - 1}", reason) from error
    except (RecursionError, ValueError) as error:
        reason = "is nested too deep" if isinstance(error, RecursionError) else "has a number of thousands of digits"
        raise fail(path, f"line {line}", f"{reason}; expected JSON of labelled data") from None


class _Twice(Exception):
    pass


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object; ``json`` itself keeps the last value of a key that comes again."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found
