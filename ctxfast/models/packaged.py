# SPDX-License-Identifier: Apache-2.0
"""Models that come with this package: each a folder of ``ctxfast/models/packaged``, which has its name and card."""

from __future__ import annotations

import os
from pathlib import Path

_FOLDER = Path(__file__).with_suffix("")


def packaged_models() -> list[str]:
    """Names of the models in the package."""
    return sorted(place.name for place in _FOLDER.iterdir() if place.is_dir()) if _FOLDER.is_dir() else []


def packaged_model(name: str | os.PathLike[str]) -> Path | None:
    """The folder of a model in the package; None if there is none of this name."""
    return _FOLDER / name if isinstance(name, str) and name in packaged_models() else None
