# SPDX-License-Identifier: Apache-2.0
"""Tagged sentences in columns: a word a line, a blank line after a sentence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from .lines import fail, read_text

SCHEMES = ("bio2", "iob1", "none")
_NO_PREDICATE = ("", "-", "_", "O", "0")


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words, their tags (None where the file has none), which words are the predicate, and the first word's line."""

    words: list[str]
    tags: list[str] | None
    predicate: list[bool] | None
    line: int


def read_conll(
    path: str | os.PathLike[str],
    *,
    word_column: int = 0,
    tag_column: int | None = -1,
    predicate_column: int | None = None,
    scheme: str = "bio2",
    separator: str | None = None,
) -> list[Sentence]:
    """Read tagged sentences.

    Args:
        path: columns parted by tabs, or by spaces where no line has a tab; also .gz and .xz. Lines that begin with
            "-DOCSTART-" are left out, and, in a file with tabs, lines "# name = value" as well.
        word_column, tag_column: numbers from 0; negative ones from the end. None for no tags.
        predicate_column: column that is none of "", "-", "_", "O", "0" for the words of the predicate; every sentence
            has one.
        scheme: "bio2"; "iob1" (B- only between neighbours of one kind; converted to BIO2); "none" for tags that are no
            spans, such as parts of speech. With "bio2" a tag must be O, B-x or I-x.
        separator: "tab" or "space"; None to look.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line with too few columns (the word's is never the tag's), an empty word, a tag that is none of
            the scheme, no predicate; file, line and reason are named.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"ctxfast.readers: scheme is {scheme!r}; expected one of {', '.join(SCHEMES)}.")
    text = read_text(path)
    has_tabs = "\t" in text if separator is None else separator == "tab"
    columns = [column for column in (word_column, tag_column, predicate_column) if column is not None]
    needed = max(column + 1 if column >= 0 else -column for column in columns)
    sentences: list[Sentence] = []
    rows: list[tuple[int, list[str]]] = []
    for line, content in enumerate([*text.split("\n"), ""], 1):
        if content.strip():
            is_comment = has_tabs and content.startswith("# ") and "\t" not in content
            if content.startswith("-DOCSTART-") or is_comment:
                continue
            fields = content.split("\t") if has_tabs else content.split()
            if len(fields) < needed:
                signs = "tabs" if has_tabs else "spaces"
                raise fail(path, f"line {line}", f"{len(fields)} columns, parted by {signs}; expected {needed}")
            if tag_column is not None and tag_column % len(fields) == word_column % len(fields):
                signs = "tabs (as other lines are)" if has_tabs else "spaces"
                found = f"{len(fields)} columns, parted by {signs}: the word's is the tag's"
                raise fail(path, f"line {line}", f"{found}; expected one for each")
            rows.append((line, fields))
        elif rows:
            sentences.append(_sentence(path, rows, word_column, tag_column, predicate_column, scheme))
            rows = []
    if not sentences:
        raise fail(path, "", "holds no sentences; expected a word a line")
    return sentences


def _sentence(
    path: str | os.PathLike[str],
    rows: list[tuple[int, list[str]]],
    word_column: int,
    tag_column: int | None,
    predicate_column: int | None,
    scheme: str,
) -> Sentence:
    words = [fields[word_column].strip() for _, fields in rows]
    for (line, _), word in zip(rows, words):
        if not word:
            raise fail(path, f"line {line}", "the word is empty")
    tags = None
    if tag_column is not None:
        tags = [fields[tag_column].strip() for _, fields in rows]
        for (line, _), tag in zip(rows, tags):
            if scheme == "none":
                if not tag:
                    raise fail(path, f"line {line}", "the tag is empty")
            elif tag != "O" and (tag[:2] not in ("B-", "I-") or len(tag) < 3):
                raise fail(path, f"line {line}", f"tag {tag!r}; expected O, B-x or I-x. Other tags: scheme 'none'")
        if scheme == "iob1":
            tags = iob1_to_bio2(tags)
    predicate = None
    if predicate_column is not None:
        predicate = [fields[predicate_column].strip() not in _NO_PREDICATE for _, fields in rows]
        if not any(predicate):
            raise fail(path, f"line {rows[0][0]}", "the sentence that begins here has no predicate")
    return Sentence(words, tags, predicate, rows[0][0])


def iob1_to_bio2(tags: Sequence[str]) -> list[str]:
    """Tags of IOB1 as BIO2: an I-x that begins a span becomes B-x."""
    result, before = [], "O"
    for tag in tags:
        begins = tag.startswith("I-") and (before == "O" or before[2:] != tag[2:])
        result.append("B-" + tag[2:] if begins else tag)
        before = tag
    return result
