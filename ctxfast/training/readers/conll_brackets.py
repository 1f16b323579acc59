# SPDX-License-Identifier: Apache-2.0
"""Columns of brackets: semantic roles of CoNLL-2005 and 2012, coreference of CoNLL-2012."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..._core.checks import shown
from .conll import Sentence
from .files import fail, read_text
from .notes import Say, tell

ROLE_FORMATS = ("conll2005", "conll2012")
_FIELD = re.compile(r"(?P<open>\([^()*\s]+)?\*(?P<close>\))?")
_MENTION = re.compile(r"\(?\d+\)?")
# CoNLL-2012: document, part, number, word, part of speech, tree, lemma, frame, sense, speaker, entities, roles ...,
# coreference.
_WORD_2012, _SPEAKER_2012, _ROLES_2012 = 3, 9, 11
_NOTHING = "-"
_BEGIN = re.compile(r"#begin document (.+)")

Row = tuple[int, list[str]]


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its mentions.

    Attributes:
        name: of the document and its part.
        sentences: their words.
        clusters: mentions of the same, each the first and the last word, counted through the document.
        speakers: of each sentence; "-" for none.
        line: of its first word.
    """

    name: str
    sentences: list[list[str]]
    clusters: list[list[tuple[int, int]]]
    speakers: list[str]
    line: int

    @property
    def words(self) -> list[str]:
        return [word for sentence in self.sentences for word in sentence]


def read_roles(
    path: str | os.PathLike[str], layout: str, *, predicate_column: int = 1, say: Say | None = None
) -> list[Sentence]:
    """Read semantic roles: a sentence for each predicate of a sentence, with its roles as BIO2 tags.

    Args:
        path: white space separates columns; also .gz and .xz. The predicate is what its roles have as V.
        layout: "conll2012" (the last columns but one are roles), or "conll2005": the word, ..., the predicate's lemma
            (or sense) or "-", then a column of roles for every predicate of the sentence, to the end of the line.
        predicate_column: of the lemma, in "conll2005": 1 for the words and their props pasted together.
        say: called with a sentence for what was left out; None: warnings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: too few columns, or others than in the line before, brackets that do not match, roles without V;
            file, line and reason are named.

    Reference: Carreras & Marquez 2005; Pradhan et al. 2012.
    """
    if layout not in ROLE_FORMATS:
        raise ValueError(f"ctxfast.readers: layout is {layout!r}; expected one of {', '.join(ROLE_FORMATS)}.")
    is_2012 = layout == "conll2012"
    word, first = (_WORD_2012, _ROLES_2012) if is_2012 else (0, predicate_column + 1)
    found: list[Sentence] = []
    without = 0
    for _, rows in _sentences(path, first + is_2012):
        words = [fields[word] for _, fields in rows]
        end = len(rows[0][1]) - is_2012
        if not is_2012:
            marked = sum(fields[predicate_column] != _NOTHING for _, fields in rows)
            if marked != end - first:
                counts = f"{marked} predicates in column {predicate_column} and {end - first} columns of roles"
                raise fail(path, f"line {rows[0][0]}", f"the sentence that begins here has {counts}; expected as many")
        without += end == first
        for column in range(first, end):
            tags = _roles(path, rows, column)
            marks = [tag[2:] == "V" for tag in tags]
            if not any(marks):
                raise fail(path, f"line {rows[0][0]}", f"column {column} of the sentence that begins here has no (V*)")
            lines = tuple(line for line, _ in rows)
            found.append(Sentence(words, tags, marks, lines[0], lines))
    if without:
        tell(say, path, f"{without:,} sentences without a predicate left out")
    if not found:
        raise fail(path, "", "no sentence has a predicate; expected columns of roles")
    return found


def _roles(path: str | os.PathLike[str], rows: list[Row], column: int) -> list[str]:
    """BIO2 tags of a column such as "(A0*", "*", "*)"."""
    tags, kind = [], ""
    for line, fields in rows:
        match = _FIELD.fullmatch(fields[column])
        if match is None:
            raise fail(path, f"line {line}", f"column {column} is {shown(fields[column])}; expected *, (X*, *) or (X*)")
        opened, closes = match.group("open"), match.group("close")
        if opened:
            if kind:
                raise fail(path, f"line {line}", f"{shown(fields[column])} begins within {kind}; expected it to end")
            kind = opened[1:]
        elif closes and not kind:
            raise fail(path, f"line {line}", f"{shown(fields[column])} ends what did not begin")
        tags.append(f"{'B' if opened else 'I'}-{kind}" if kind else "O")
        kind = "" if closes else kind
    if kind:
        raise fail(path, f"line {rows[-1][0]}", f"the sentence ends within {kind} in column {column}; expected *)")
    return tags


def read_coreference(path: str | os.PathLike[str]) -> list[Document]:
    """Read CoNLL-2012's coreference: documents between "#begin document" and "#end document".

    Args:
        path: white space separates columns, the word is in column 3, mentions in the last: "(0|(1)", "0)", "-"; also
            .gz and .xz.

    Raises:
        FileNotFoundError: no such file.
        ValueError: too few columns, a mention that does not begin or end, or does in two clusters; file, line and
            reason are named.

    Reference: Pradhan et al. 2012.
    """
    found: list[Document] = []
    for name, group in _documents(path):
        if not group:
            raise fail(path, "", f"document {name} has no words")
        sentences, speakers, starts = [], [], 0
        clusters: dict[str, list[tuple[int, int]]] = {}
        opened: dict[str, list[tuple[int, int]]] = {}  # where each begun mention begins, and its line
        seen: dict[tuple[int, int], str] = {}
        for rows in group:
            for word, (line, fields) in enumerate(rows, starts):
                for part in fields[-1].split("|") if fields[-1] != _NOTHING else ():
                    if _MENTION.fullmatch(part) is None or part.isdigit():
                        expected = "-, or (1, 1) and (1), parted by |"
                        raise fail(path, f"line {line}", f"the last column has {shown(part)}; expected {expected}")
                    cluster = part.strip("()")
                    if part.startswith("("):
                        opened.setdefault(cluster, []).append((word, line))
                    if part.endswith(")"):
                        if not opened.get(cluster):
                            raise fail(path, f"line {line}", f"{shown(part)} ends a mention that did not begin")
                        span = (opened[cluster].pop()[0], word)
                        if span in seen:
                            reason = f"a mention of cluster {cluster} is one of cluster {seen[span]} too; expected one"
                            raise fail(path, f"line {line}", reason)
                        seen[span] = cluster
                        clusters.setdefault(cluster, []).append(span)
            sentences.append([fields[_WORD_2012] for _, fields in rows])
            speaker = rows[0][1][_SPEAKER_2012] if len(rows[0][1]) > _SPEAKER_2012 + 1 else _NOTHING
            speakers.append(speaker)
            starts += len(rows)
        for cluster, begun in opened.items():
            if begun:
                raise fail(path, f"line {begun[0][1]}", f"a mention of cluster {cluster} begins here and does not end")
        found.append(Document(name, sentences, [sorted(own) for own in clusters.values()], speakers, group[0][0][0]))
    if not found:
        raise fail(path, "", "holds no documents; expected '#begin document' before each")
    return found


def _documents(path: str | os.PathLike[str]) -> Iterator[tuple[str, list[list[Row]]]]:
    """Names of documents and their sentences."""
    name, group = "", []
    for found, rows in _sentences(path, _WORD_2012 + 2, has_documents=True):
        if found != name and name:
            yield name, group
            group = []
        name = found
        group.append(rows)
    if name:
        yield name, group


def _sentences(
    path: str | os.PathLike[str], least: int, *, has_documents: bool = False
) -> Iterator[tuple[str, list[Row]]]:
    """The document's name and the rows of every sentence, all of which have as many columns, ``least`` or more."""
    rows: list[Row] = []
    document = ""
    for line, content in enumerate([*read_text(path).split("\n"), ""], 1):
        is_sign = content.startswith(("#begin document", "#end document"))
        fields = [] if is_sign else content.split()
        if fields:
            if has_documents and not document:
                raise fail(path, f"line {line}", "stands outside a document; expected '#begin document' before it")
            expected = len(rows[0][1]) if rows else least
            if len(fields) != expected if rows else len(fields) < least:
                more = ", as in the line before in the same sentence" if rows else " or more"
                raise fail(path, f"line {line}", f"{len(fields)} columns; expected {expected}{more}")
            rows.append((line, fields))
        elif rows:
            yield document, rows
            rows = []
        if is_sign:
            match = _BEGIN.match(content)
            document = match.group(1).strip() if match else ""
