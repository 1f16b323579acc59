# SPDX-License-Identifier: Apache-2.0
"""Builds the API reference from docstrings: ``python docs/reference.py FOLDER``, or ``make docs``.

Fails where pdoc warns of anything, or a link between the pages leads nowhere.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import get_type_hints
from urllib.parse import unquote, urldefrag

# What users import; what a package's __all__ names below it comes along.
MODULES = (
    "ctxfast",
    "ctxfast.training.loop.train",
    "ctxfast.training.loop.config",
    "ctxfast.training.loop.task",
    "ctxfast.training.tasks.build",
)


def resolve_tuples(names: list[str]) -> None:
    """Python keeps a named tuple's annotations as words without their module, until 3.14: pdoc cannot read them."""
    for name in names:
        for kind in vars(import_module(name)).values():
            if inspect.isclass(kind) and issubclass(kind, tuple) and hasattr(kind, "_fields"):
                kind.__new__.__annotations__ = get_type_hints(kind)


class _Page(HTMLParser):
    """The links of a page, and what links can lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def dead_links(folder: Path) -> dict[Path, list[str]]:
    """Links between the pages of a folder that lead to no page, or to no place on it, by page."""
    folder = folder.resolve()
    pages = {path: _Page(path) for path in sorted(folder.rglob("*.html"))}
    dead: dict[Path, list[str]] = {}
    for path, page in pages.items():
        for link in page.links:
            target, anchor = urldefrag(link)
            if ":" in target:  # an address elsewhere
                continue
            file = (path.parent / unquote(target)).resolve() if target else path
            is_there = file.is_file() and (not anchor or file not in pages or unquote(anchor) in pages[file].anchors)
            if not is_there:
                dead.setdefault(path, []).append(link)
    return dead


def unlink_names(folder: Path) -> None:
    """Take away links that pdoc made of bare names, of classes that are not public and of what nobody described."""
    for path, links in dead_links(folder).items():
        text = path.read_text(encoding="utf-8")
        for link in set(links):
            text = re.sub(rf'<a href="{re.escape(link)}">([\w.]+)</a>', r"\1", text)
        path.write_text(text, encoding="utf-8")


def main(folder: Path) -> int:
    from pdoc import extract, pdoc, render

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        resolve_tuples(list(extract.walk_specs(MODULES)))
        render.configure(docformat="google", include_undocumented=False)
        pdoc(*MODULES, output_directory=folder)
    unlink_names(folder)
    faults = sorted({str(each.message) for each in said})
    faults += [f"{path.name}: dead link {link}" for path, links in dead_links(folder).items() for link in links]
    print(*faults, f"{folder}: {len(list(folder.rglob('*.html')))} pages, {len(faults)} faults", sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
