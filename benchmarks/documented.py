# SPDX-License-Identifier: Apache-2.0
"""Results that a page of the documentation shows: a JSON file each, and a table between two marks of the page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctxfast._core.files import replacing

from . import results

_ROOT = Path(__file__).resolve().parents[1]


def taken() -> dict[str, Any]:
    """On what, and of which state of the tree, figures are taken."""
    head, dirty = results.commit()
    return {
        "machine": results.machine("cpu", torch.get_num_threads()),
        "instruction_sets": results.instruction_sets(),
        "commit": head,
        "dirty": dirty,
    }


def where(found: dict[str, Any]) -> str:
    """``taken``, said in a sentence's beginning."""
    return f"{found['machine']} ({', '.join(found['instruction_sets'])}), commit {found['commit']}"


def between(text: str, begin: str, end: str, inside: str) -> str | None:
    """``text`` with other lines between its marks; None where it lacks one of them."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    return before + begin + inside + end + after if found_begin and found_end else None


@dataclass(frozen=True)
class Documented:
    """A result and its place: what ``python -m benchmarks.NAME`` measures and ``--docs`` writes out.

    Attributes:
        name: of the module and of the file in benchmarks/quality.
        pages: those that show it, from the root of the tree.
        table: the result as Markdown, ending with a line's end.
    """

    name: str
    pages: Sequence[str]
    table: Callable[[dict[str, Any]], str]

    @property
    def result(self) -> Path:
        return _ROOT / "benchmarks" / "quality" / f"{self.name}.json"

    def text(self, page: str, found: dict[str, Any]) -> str:
        """A page's text with the table of this result.

        Raises:
            ValueError: the page has no marks.
        """
        begin, end = f"<!-- figures: python -m benchmarks.{self.name} --docs -->\n", "<!-- end of figures -->\n"
        written = between(page, begin, end, self.table(found))
        if written is None:
            raise ValueError(f"benchmarks.{self.name}: a page has no line {begin.strip()!r}, or no end of it.")
        return written

    def save(self, found: dict[str, Any]) -> None:
        """Write the result."""
        with replacing(self.result) as temporary:
            Path(temporary).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def load(self) -> dict[str, Any]:
        """The committed result."""
        return json.loads(self.result.read_text(encoding="utf-8"))

    def stale_pages(self) -> list[tuple[Path, str]]:
        """Pages that do not show the committed result, each with the text that would."""
        found, stale = self.load(), []
        for name in self.pages:
            path = _ROOT / name
            text = path.read_text(encoding="utf-8")
            if self.text(text, found) != text:
                stale.append((path, self.text(text, found)))
        return stale

    def write_pages(self) -> None:
        """Make the pages show the committed result."""
        for path, text in self.stale_pages():
            with replacing(path) as temporary:
                Path(temporary).write_text(text, encoding="utf-8")
