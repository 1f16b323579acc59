# SPDX-License-Identifier: Apache-2.0
"""Folders of prepared data: one command at a time makes them, and none takes the place of what somebody else has."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, TextIO

from .._core.files import locked

# What ``_core.files`` gives folders and files for names until they are whole.
_TEMPORARY = re.compile(r"\.(tokenizer|train|held_out)\.[a-z0-9_]{8}(\.old)?")


def hold(path: str | os.PathLike[str]) -> TextIO:
    """Keep other commands from preparing in a folder, and remove what killed ones left half-made there.

    Returns:
        The lock; closing it, or the end of the process, lets others in.

    Raises:
        RuntimeError: another process has it.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    refusal = f"ctxfast.training: another process works in {path.parent}; wait for it, or choose another directory."
    lock = locked(path / "lock", refusal)
    for entry in path.iterdir():
        if _TEMPORARY.fullmatch(entry.name):
            shutil.rmtree(entry)
    return lock


def read_note(path: Path, name: str) -> dict[str, Any] | None:
    """What a folder of prepared data was made of, by its file ``name``; None where there is nothing yet.

    Raises:
        ValueError: the folder holds something and no such note, so that it is not for us to replace.
    """
    try:
        note = json.loads((path / name).read_text(encoding="utf-8"))
        if isinstance(note, dict) and "files" in note:
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
