# SPDX-License-Identifier: Apache-2.0
"""Where words, phrases and entities stand in a text, and which word pieces begin one: what knowledge masking masks.

A source gives spans of characters; ``begins`` carries them over to pieces. A piece's flags say which units begin with
it, so units survive the cutting and joining that makes pretraining pairs.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from ..._core.checks import shown
from ..._core.extras import need
from ...models.bert.tokenization import Encoding
from .text import text_lines

WORD, PHRASE, ENTITY = 1, 2, 4
KINDS = {"word": WORD, "phrase": PHRASE, "entity": ENTITY}
# Beside these, on the first piece of a turn: a dialogue's second speaker has it.
SPEAKER = 8
# A piece and its flags travel as one integer: id | flags << FLAG_SHIFT.
FLAG_SHIFT = 24
ID_MASK = (1 << FLAG_SHIFT) - 1


class Span(NamedTuple):
    """Characters ``start`` to ``end`` (not included) are one unit; ``kind``: "word", "phrase" or "entity"."""

    start: int
    end: int
    kind: str


class SpanSource(Protocol):
    """Finds spans in a text."""

    def spans(self, text: str) -> list[Span]:
        """Spans in any order; they may overlap, the longer one counts."""
        ...


class Gazetteer:
    """Spans of a list of phrases or names, found by Aho-Corasick in one pass over the text, longest first.

    Args:
        entries: the strings to find.
        kind: "word", "phrase" or "entity".
        ignore_case: find them in any case.

    In scripts with spaces a match counts only where words begin and end; Chinese and Japanese match anywhere.

    Raises:
        ValueError: an unknown kind, or no entries.
        RuntimeError: ahocorasick-rs is not installed.
    """

    def __init__(self, entries: Iterable[str], kind: str = "entity", *, ignore_case: bool = True) -> None:
        ahocorasick_rs = need("ctxfast.training.Gazetteer", "ahocorasick_rs", "gazetteers", "pretrain")
        if kind not in KINDS:
            raise ValueError(f"ctxfast.training.Gazetteer: kind is {kind!r}; expected one of {', '.join(KINDS)}.")
        self.kind, self.ignore_case = kind, ignore_case
        cleaned = {self._folded(" ".join(entry.split())) for entry in entries}
        cleaned.discard("")
        if not cleaned:
            raise ValueError("ctxfast.training.Gazetteer: entries has no text; expected one phrase or name each.")
        self.size = len(cleaned)
        self._entries = sorted(cleaned)
        # Overlapping matches: which of them counts depends on word boundaries.
        self._matcher = ahocorasick_rs.AhoCorasick(self._entries)

    def __reduce__(self) -> tuple[Any, ...]:  # to workers: the matcher is made anew
        return functools.partial(type(self), ignore_case=self.ignore_case), (self._entries, self.kind)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], kind: str = "entity", *, column: int = 0, ignore_case: bool = True
    ) -> Gazetteer:
        """Entries from a text file (plain, .gz, .xz), one a line; with tabs, the given column.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a line without that column (its number is named), or a file without entries.
        """
        return cls(read_gazetteer(path, column), kind, ignore_case=ignore_case)

    def _folded(self, text: str) -> str:
        if not self.ignore_case:
            return text
        # Letter by letter, so that places stay: "İ".lower() has two characters.
        return "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)

    def spans(self, text: str) -> list[Span]:
        folded = self._folded(text)
        found = []
        for _, start, end in self._matcher.find_matches_as_indexes(folded, overlapping=True):
            if _is_boundary(folded, start) and _is_boundary(folded, end):
                found.append(Span(start, end, self.kind))
        return found


def read_gazetteer(path: str | os.PathLike[str], column: int = 0) -> list[str]:
    """Entries of a text file, see ``Gazetteer.from_file``."""
    entries = []
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if column >= len(fields):
            raise ValueError(
                f"ctxfast.training.Gazetteer: {path}, line {number} has {len(fields)} columns; "
                f"expected more than column={column}."
            )
        entries.append(fields[column])
    if not any(entry.strip() for entry in entries):
        raise ValueError(f"ctxfast.training.Gazetteer: {path} has no text; expected a phrase or name a line.")
    return entries


class SpanFile:
    """Spans that somebody else found, by the lines of a text.

    Args:
        path: TSV rows (plain, .gz, .xz) ``line, start, end, kind``: the line's number from 1, counted through all files
            of the text; the characters of the line (end not included); "word", "phrase" or "entity".
        files: the text (plain, .gz, .xz).

    Lines are known again by their content, so the same line has its spans wherever it stands.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a row that is not a span, or one outside its line, by the row's number.
    """

    def __init__(self, path: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]]) -> None:
        rows: dict[int, list[tuple[int, Span]]] = {}
        for number, row in enumerate(text_lines(path), 1):
            if not row.strip():
                continue
            fields = row.split("\t")
            try:
                line, start, end = map(int, fields[:3])
                (kind,) = fields[3:]
            except ValueError:
                raise ValueError(
                    f"ctxfast.training.SpanFile: {path}, row {number} is {shown(row)}; expected line, start, end, kind "
                    "with tabs between."
                ) from None
            if kind not in KINDS or line < 1:
                raise ValueError(
                    f"ctxfast.training.SpanFile: {path}, row {number} has line {line} and kind {shown(kind)}; expected "
                    f"a line from 1 and one of {', '.join(KINDS)}."
                )
            rows.setdefault(line, []).append((number, Span(start, end, kind)))
        self._spans: dict[bytes, list[Span]] = {}
        before = 0
        for file in files:
            for line, text in enumerate(text_lines(file), before + 1):
                before = line
                stripped = text.strip()
                shift = len(text) - len(text.lstrip())
                for number, span in rows.pop(line, ()):
                    start, end = span.start - shift, span.end - shift
                    if not 0 <= start < end <= len(stripped):
                        raise ValueError(
                            f"ctxfast.training.SpanFile: {path}, row {number} has characters {span.start} to "
                            f"{span.end}; expected some of line {line}, which has {len(text)}."
                        )
                    self._spans.setdefault(_key(stripped), []).append(Span(start, end, span.kind))
        if rows:
            line = min(rows)
            raise ValueError(
                f"ctxfast.training.SpanFile: {path}, row {rows[line][0][0]} is about line {line}; expected at most "
                f"{before}, the lines of the text."
            )

    def spans(self, text: str) -> list[Span]:
        return self._spans.get(_key(text), [])


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


class SegmentedText:
    """Text that comes with its words apart by spaces (Chinese too): each stretch between spaces is a word."""

    def spans(self, text: str) -> list[Span]:
        found, start = [], None
        for place, letter in enumerate(text + " "):
            if letter.isspace():
                if start is not None:
                    found.append(Span(start, place, "word"))
                start = None
            elif start is None:
                start = place
        return found


class ChineseWords:
    """Words of Chinese text, by jieba.

    Args:
        user_dictionary: file of further words, as jieba reads it.

    Raises:
        RuntimeError: jieba is not installed.
    """

    def __init__(self, user_dictionary: str | os.PathLike[str] | None = None) -> None:
        jieba = need("ctxfast.training.ChineseWords", "jieba", "words of Chinese text", "pretrain")
        jieba.setLogLevel(60)
        self._user_dictionary = user_dictionary
        self._tokenizer = jieba.Tokenizer()
        if user_dictionary is not None:
            self._tokenizer.load_userdict(os.fspath(user_dictionary))

    def __reduce__(self) -> tuple[Any, ...]:  # to workers: its dictionary has a lock
        return type(self), (self._user_dictionary,)

    def spans(self, text: str) -> list[Span]:
        return [Span(start, end, "word") for word, start, end in self._tokenizer.tokenize(text) if not word.isspace()]


def _is_spaced(letter: str) -> bool:
    """Whether a letter belongs to a script that sets spaces between words."""
    return letter.isalnum() and not ("\u3040" <= letter <= "\u30ff" or "\u3400" <= letter <= "\u9fff")


def _is_boundary(text: str, place: int) -> bool:
    if place == 0 or place == len(text):
        return True
    return not (_is_spaced(text[place - 1]) and _is_spaced(text[place]))


def begins(encoding: Encoding, spans: Sequence[Span]) -> list[int]:
    """Flags of every piece of an encoded text without special tokens: which units begin with it.

    A unit at a level runs from a piece with that level's flag up to the next. Where no span of a kind lies, its units
    are words; words are the tokenizer's own where no "word" span lies. A span that begins or ends inside a piece takes
    the whole piece. Of spans of one kind that overlap the longer one counts, of equally long ones the first.
    """
    offsets, word_ids = encoding.offsets, encoding.word_ids
    own = [i == 0 or word_ids[i] is None or word_ids[i] != word_ids[i - 1] for i in range(len(offsets))]
    words = _joined(own, offsets, [span for span in spans if span.kind == "word"])
    flags = [WORD if begin else 0 for begin in words]
    for kind in ("phrase", "entity"):
        for i, begin in enumerate(_joined(words, offsets, [span for span in spans if span.kind == kind])):
            flags[i] |= KINDS[kind] if begin else 0
    return flags


def _joined(starts: Sequence[bool], offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[bool]:
    """``starts`` with every span's pieces made one unit."""
    found = list(starts)
    taken = [False] * len(found)
    for span in sorted(spans, key=lambda span: (span.start - span.end, span.start)):
        inside = _pieces(offsets, span)
        if not inside or any(taken[i] for i in inside):
            continue
        for i in inside:
            taken[i], found[i] = True, False
        found[inside[0]] = True
        after = inside[-1] + 1
        if after < len(found):
            found[after] = True
    return found


def _pieces(offsets: Sequence[tuple[int, int]], span: Span) -> range:
    # Offsets rise, and pieces do not overlap.
    first = bisect.bisect_right(offsets, span.start, key=lambda piece: piece[1])
    last = bisect.bisect_left(offsets, span.end, key=lambda piece: piece[0])
    return range(first, max(first, last))
