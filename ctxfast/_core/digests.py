# SPDX-License-Identifier: Apache-2.0
"""What tells one content of a file from another."""

from __future__ import annotations

import hashlib
import os
from typing import Any

_EDGE_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 20


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
