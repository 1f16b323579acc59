# SPDX-License-Identifier: Apache-2.0
"""Folders of prepared data: one command at a time makes them, and none takes the place of what somebody else has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ..._core.files import clear_left, locked
from ..._core.reading import read_json, reading


def hold(path: str | os.PathLike[str]) -> FileLock:
    """Keep other commands from preparing in a folder, and remove what killed ones left half-made there.

    Returns:
        The lock; its ``release``, or the end of the process, lets others in.

    Raises:
        RuntimeError: another process has it.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    busy = f"another process works in {path.parent}; wait for it, or choose another directory."
    lock = locked(path / "lock", "ctxfast.training", busy)
    clear_left(path)
    return lock


def read_note(path: Path, name: str) -> dict[str, Any] | None:
    """What a folder of prepared data was made of, by its file ``name``; None where there is nothing yet.

    Raises:
        ValueError: the folder holds something and no such note, so that it is not for us to replace.
    """
    try:
        note = read_json(path / name, "ctxfast.training")
        if "files" in note:
            return note
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass
    found = [path.name] if path.is_file() else []
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if found:
        raise ValueError(
            f"ctxfast.training: {path} holds {found[0]} and no {name} that says what it was made of; expected prepared "
            "data, or nothing. Move it away, or choose another directory."
        )
    return None


def save_array(path: Path, values: np.ndarray) -> None:
    """``np.save``, but what the disk says of a write arrives; numpy's own says how much of it was written."""
    with open(path, "wb") as file:
        header = {"descr": values.dtype.str, "fortran_order": False, "shape": values.shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(values).reshape(-1).data.cast("B"))


@contextmanager
def stored(path: Path, who: str) -> Iterator[None]:
    """Reading prepared data back: errors name the folder ``path`` and the way out."""
    try:
        with reading(path, who, "folder of prepared data"):
            yield
    except ValueError as error:
        raise ValueError(f"{error}. Remove it; the same command makes it again.") from error
