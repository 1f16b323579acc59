# SPDX-License-Identifier: Apache-2.0
"""Pictures drawn with matplotlib, which only who draws needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .extras import need
from .files import replacing

SUFFIXES = (".png", ".svg", ".pdf")


def figure_class(who: str) -> Any:
    """Matplotlib's Figure.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    return need(who, "matplotlib.figure", "a plot", "plot").Figure


def check_picture(path: str | None, who: str) -> None:
    """Refuse a name that is no picture's, and a missing matplotlib, before hours of work.

    Raises:
        ValueError: another ending.
        RuntimeError: matplotlib is not installed.
    """
    if path is None:
        return
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{who}: --plot is {path!r}; expected a name that ends with {', '.join(SUFFIXES)}.")
    figure_class(who)


def save(figure: Any, path: str | Path, dpi: int = 120) -> None:
    """Write a figure; the name appears when the picture is whole."""
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, dpi=dpi)
