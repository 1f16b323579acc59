# SPDX-License-Identifier: Apache-2.0
"""Tagged sentences in columns: a word a line, a blank line after a sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..._core.checks import shown
from .files import fail, read_text
from .notes import Say, label_notes, tell

SCHEMES = ("bio2", "iob1", "bioes", "none")
_NO_PREDICATE = ("", "-", "_", "O", "0")
# White space that separates; a no-break space, say, may stand in a word.
_SPACES = re.compile(r"[ \t]+")
# A CoNLL-U row of several words ("1-2 don't") or of a word that is not in the text ("8.1"): its words have own rows.
_RANGE = re.compile(r"\d+[-.]\d+")
_CONLLU_COLUMNS = 10
# Of a sentence. More are a text without blank lines, most likely.
_MANY_WORDS = 1000


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words, their tags (None where the file has none), which words are the predicate, and the first word's line;
    ``lines`` are those of all words where they do not follow one another."""

    words: list[str]
    tags: list[str] | None
    predicate: list[bool] | None
    line: int
    lines: tuple[int, ...] | None = None

    @property
    def gold(self) -> list[str]:
        """The tags of a sentence that has them: all have where the reader was to find tags."""
        assert self.tags is not None
        return self.tags

    @property
    def marks(self) -> list[bool]:
        """The predicate of a sentence that has one."""
        assert self.predicate is not None
        return self.predicate

    def line_of(self, word: int) -> int:
        """The line of a word, by its number."""
        return self.line + word if self.lines is None else self.lines[word]


def read_conll(
    path: str | os.PathLike[str],
    *,
    word_column: int = 0,
    tag_column: int | None = -1,
    predicate_column: int | None = None,
    scheme: str = "bio2",
    separator: str | None = None,
    say: Say | None = None,
) -> list[Sentence]:
    """Read tagged sentences.

    Args:
        path: columns parted by tabs, or by spaces where no line has a tab; also .gz and .xz. Lines that begin with
            "-DOCSTART-" are left out, and, in a file with tabs, lines "# name = value" as well, and CoNLL-U's rows of
            ranges ("1-2") and empty words ("8.1").
        word_column, tag_column: numbers from 0; negative ones from the end. None for no tags.
        predicate_column: column that is none of "", "-", "_", "O", "0" for the words of the predicate; every sentence
            has one.
        scheme: "bio2"; "iob1" (B- only between neighbours of one kind) and "bioes" (also written BILOU), both converted
            to BIO2; "none" for tags that are not spans, such as parts of speech. With "bio2" a tag must be O, B-x, or
            I-x after B-x or I-x.
        separator: "tab" or "space"; None to look.
        say: called with a sentence for what looks odd; None: warnings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line with too few columns (word, tag and predicate never share one), or with others than the line
            before in its sentence, an empty word, a tag that is none of the scheme, no predicate; file, line and reason
            are named.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"ctxfast.readers: scheme is {scheme!r}; expected one of {', '.join(SCHEMES)}.")
    text = read_text(path)
    has_tabs = "\t" in text if separator is None else separator == "tab"
    wanted = (("word", word_column), ("tag", tag_column), ("predicate", predicate_column))
    columns = [(name, column) for name, column in wanted if column is not None]
    width = 0
    widths: dict[int, int] = {}
    sentences: list[Sentence] = []
    rows: list[tuple[int, list[str]]] = []
    for line, content in enumerate([*text.split("\n"), ""], 1):
        if content.strip():
            is_comment = has_tabs and content.startswith("# ") and "\t" not in content
            if content.startswith("-DOCSTART-") or is_comment:
                continue
            fields = content.split("\t") if has_tabs else _SPACES.split(content.strip(" \t"))
            if len(fields) != width:
                _check_columns(path, line, fields, columns, has_tabs)
                if rows:
                    reason = f"{len(fields)} columns; expected {width}, as in the line before in the same sentence"
                    raise fail(path, f"line {line}", reason)
                width = len(fields)
                widths.setdefault(width, line)
            if has_tabs and len(fields) == _CONLLU_COLUMNS and _RANGE.fullmatch(fields[0]):
                continue
            rows.append((line, fields))
        elif rows:
            sentences.append(_sentence(path, rows, word_column, tag_column, predicate_column, scheme))
            rows = []
    if not sentences:
        raise fail(path, "", "holds no sentences; expected a word a line")
    for note in _notes(sentences, widths, min(column for _, column in columns) < 0, scheme):
        tell(say, path, note)
    return sentences


def _notes(sentences: list[Sentence], widths: dict[int, int], from_end: bool, scheme: str) -> Iterator[str]:
    """What looks odd."""
    if len(widths) > 1 and from_end:
        found = " and ".join(f"{width} (line {line})" for width, line in list(widths.items())[:3])
        yield f"sentences have different numbers of columns, {found}; columns are counted from the end in each"
    longest = max(sentences, key=lambda sentence: len(sentence.words))
    if len(longest.words) > _MANY_WORDS:
        yield f"the sentence of line {longest.line} has {len(longest.words):,} words; is a blank line missing?"
    labels: dict[str, list[int]] = {}
    for sentence in sentences:
        for word, tag in enumerate(sentence.tags or ()):
            kind = tag[2:] if scheme != "none" and tag != "O" else tag
            labels.setdefault(kind, []).append(sentence.line_of(word))
    yield from label_notes(labels)


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
        _check_tags(path, [line for line, _ in rows], tags, scheme)
        if scheme in ("iob1", "bioes"):
            tags = iob1_to_bio2(tags) if scheme == "iob1" else bioes_to_bio2(tags)
    predicate = None
    if predicate_column is not None:
        predicate = [fields[predicate_column].strip() not in _NO_PREDICATE for _, fields in rows]
        if not any(predicate):
            raise fail(path, f"line {rows[0][0]}", "the sentence that begins here has no predicate")
    lines = tuple(line for line, _ in rows)
    follow = lines[-1] - lines[0] + 1 == len(lines)
    return Sentence(words, tags, predicate, lines[0], None if follow else lines)


def _check_columns(
    path: str | os.PathLike[str], line: int, fields: list[str], columns: list[tuple[str, int]], has_tabs: bool
) -> None:
    """Whether a line has the columns asked for, one for each."""
    width = len(fields)
    signs = "tabs (as other lines are)" if has_tabs else "spaces"
    if width == 1 and "," in fields[0].strip(","):
        signs += " (commas do not separate here)"
    needed = max(column + 1 if column >= 0 else -column for _, column in columns)
    if width < needed:
        raise fail(path, f"line {line}", f"{width} columns, separated by {signs}; expected {needed}")
    taken: dict[int, str] = {}
    for name, column in columns:
        other = taken.setdefault(column % width, name)
        if other != name:
            found = f"{width} columns, separated by {signs}: the {other}'s is the {name}'s"
            raise fail(path, f"line {line}", f"{found}; expected one for each")


def _check_tags(path: str | os.PathLike[str], lines: list[int], tags: list[str], scheme: str) -> None:
    marks = "BIESLU" if scheme == "bioes" else "BI"
    before = "O"
    for line, tag in zip(lines, tags):
        if scheme == "none":
            if not tag:
                raise fail(path, f"line {line}", "the tag is empty")
            continue
        if tag != "O" and (len(tag) < 3 or tag[0] not in marks or tag[1] != "-"):
            expected = f"expected O, {', '.join(f'{mark}-x' for mark in marks[:-1])} or {marks[-1]}-x"
            other = "" if scheme == "bioes" else "E-x and S-x: scheme 'bioes'; o"
            raise fail(path, f"line {line}", f"tag {shown(tag)}; {expected}. {other or 'O'}ther tags: scheme 'none'")
        if scheme == "bio2" and tag[0] == "I" and (before == "O" or before[2:] != tag[2:]):
            reason = (
                f"tag {shown(tag)} goes on with nothing, as {before!r} comes before it; expected 'B-{tag[2:]}' in BIO2"
            )
            raise fail(path, f"line {line}", f"{reason}. Where such tags begin spans: scheme 'iob1'")
        before = tag


def bioes_to_bio2(tags: Sequence[str]) -> list[str]:
    """Tags of BIOES, or BILOU, as BIO2: S-x and U-x begin a span, and so does any other that goes on with nothing."""
    result, before = [], "O"
    for tag in tags:
        goes_on = tag[0] in "IEL" and before[0] in "BI" and before[2:] == tag[2:]
        result.append("O" if tag == "O" else ("I-" if goes_on else "B-") + tag[2:])
        before = tag
    return result


def iob1_to_bio2(tags: Sequence[str]) -> list[str]:
    """Tags of IOB1 as BIO2: an I-x that begins a span becomes B-x."""
    result, before = [], "O"
    for tag in tags:
        begins = tag.startswith("I-") and (before == "O" or before[2:] != tag[2:])
        result.append("B-" + tag[2:] if begins else tag)
        before = tag
    return result
