# SPDX-License-Identifier: Apache-2.0
"""Text files, packed or not, and errors that say where."""

from __future__ import annotations

import os
from pathlib import Path

from ...corpus import DAMAGE, PACKED_SUFFIXES, damage, open_binary


def fail(path: str | os.PathLike[str], where: str, reason: str) -> ValueError:
    """The error of something wrong in a data file; ``where`` is such as "line 12"."""
    place = f"{os.fspath(path)}, {where}" if where else os.fspath(path)
    return ValueError(f"ctxfast.readers: {place}: {reason}")


def data_suffix(path: str | os.PathLike[str]) -> str:
    """The suffix that names the format: of x.tsv.xz it is .tsv."""
    path = Path(path)
    return (Path(path.stem) if path.suffix in PACKED_SUFFIXES else path).suffix.lower()


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, .gz and .xz unpacked, without a byte order mark; line ends become "\\n".

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, not what its suffix says, or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"ctxfast.readers: there is no file {path}; expected labelled data.")
    try:
        with open_binary(path) as file:
            data = file.read()
    except DAMAGE as error:
        raise fail(path, "", damage(path, error)) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise fail(path, f"line {line}", f"byte {data[error.start]:#04x} is not UTF-8; expected UTF-8 text") from error
    if not text.strip():
        raise fail(path, "", "is empty; expected labelled data")
    return text.replace("\r\n", "\n").replace("\r", "\n")
