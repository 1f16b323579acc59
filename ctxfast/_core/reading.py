# SPDX-License-Identifier: Apache-2.0
"""The edge of every file reader: whatever goes wrong inside, the error is a sentence that names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# An error that begins so was written for the user already.
_OWN = ("ctxfast.", "CTXFAST_")
_MOST_OF_A_REASON = 200
# Numbers of a trained model hardly shrink when they are packed. A small file may hold zeros alone.
_MOST_GROWTH, _SMALL = 20, 64 << 20


@contextmanager
def reading(path: str | os.PathLike[str], who: str, what: str = "file") -> Iterator[None]:
    """Turn any error of the block into one that begins with ``who`` and names ``path``.

    The package's own errors keep their type and text; where they do not name the file, " (in PATH)" is added. A file
    that the system does not give (absent, not permitted, a folder) stays an OSError of its kind, too little memory a
    MemoryError. Everything else, be it from a parser, from arithmetic on what the file says or from a conversion of
    it, is a ValueError: nesting too deep for the parser, a number of thousands of digits, text that is not UTF-8.

    Args:
        path: what is read. Named in full.
        who: the public name, such as "ctxfast.load_checkpoint".
        what: the kind of file expected, for the sentence.

    Do not ``yield`` to a caller inside the block: the caller's errors are not the file's.
    """
    try:
        yield
    except BaseException as error:
        # Libraries written in Rust report a bug that a file brought out by this, which is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        text = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
        place = os.fspath(path)
        if text.startswith(_OWN):
            if place in text:
                raise
            raise _renewed(error, f"{text} (in {place})") from error
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise _renewed(error, f"{who}: {place} cannot be read ({error.strerror})") from error
        if isinstance(error, MemoryError):
            raise MemoryError(f"{who}: {place} needs more memory than there is ({_reason(error, text)})") from error
        raise ValueError(f"{who}: {place} is damaged, cut short or no {what} ({_reason(error, text)})") from error


def read_json(path: Path, who: str, what: str = "JSON file") -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ValueError: not JSON, not UTF-8, nested too deep, or another kind of value; begins with ``who``, names the file.
        OSError: the system does not give the file; so, too.
    """
    with reading(path, who, what):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"{who}: {path} holds a JSON {type(value).__name__}; expected an object")
    return value


def check_growth(size: int, stored: int, who: str, path: str | os.PathLike[str]) -> None:
    """Raise ValueError where ``stored`` bytes of a file would become ``size`` in memory, and no weights are like that:
    a packed bomb, one number spread over a matrix, one place read many times."""
    if size > max(_SMALL, _MOST_GROWTH * stored):
        raise ValueError(
            f"{who}: {os.fspath(path)} stores {stored:,} bytes that would become {size:,} in memory; expected at most "
            f"{_MOST_GROWTH} times as many. It is damaged, or no file of weights"
        )


def _renewed(error: BaseException, text: str) -> BaseException:
    """An error of the same type with another text; types that do not take one text become a ValueError."""
    try:
        return type(error)(text)
    except Exception:
        return ValueError(text)


def _reason(error: BaseException, text: str) -> str:
    """Type and first line of an error, cut where it is long."""
    line = text.strip().partition("\n")[0]
    if len(line) > _MOST_OF_A_REASON:
        line = line[:_MOST_OF_A_REASON] + "..."
    kind = type(error).__name__.lstrip("_")
    return f"{kind}: {line}" if line else kind
