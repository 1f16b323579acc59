# SPDX-License-Identifier: Apache-2.0
"""Labelled texts and pairs of texts: TSV, CSV, JSON lines."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..._core.checks import shown
from .files import data_suffix, fail, parse_json, read_text
from .notes import Say, first_row_note, label_notes, many, tell

Column = str | int
_FORMATS = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".txt": "tsv"}
_TEXT_NAMES = ("text", "sentence", "question", "review")
_FIRST_NAMES = ("sentence1", "question1", "text1", "premise", "#1 string", "question", "text")
_SECOND_NAMES = ("sentence2", "question2", "text2", "hypothesis", "#2 string", "sentence", "answer", "text_pair")
_LABEL_NAMES = ("label", "category", "score", "quality", "intent", "gold_label", "class")
# SNLI's and MultiNLI's label, and what stands there where most annotators did not agree on one.
_GOLD, _UNDECIDED = "gold_label", "-"


@dataclass(frozen=True, slots=True)
class Example:
    """A text or a pair of texts, its label (None where the file has none) and its line in the file."""

    text: str
    pair: str | None
    label: str | None
    line: int

    @property
    def gold(self) -> str:
        """The label of an example that has one: all have where the reader was to find labels."""
        assert self.label is not None
        return self.label


@dataclass(frozen=True)
class TableFormat:
    """How a table is laid out.

    Attributes:
        text, pair, label: columns by name or by number from 0; None for the usual names (text, sentence, sentence1,
            question, ...; label, category, score, ...). A table without a header has numbers only: by default the text
            is column 0, the pair column 1, the label the last.
        header: whether the first row names the columns; None: it does if it holds the names asked for or usual ones.
        quoting: whether quote signs delimit fields; None: in CSV they do, in TSV they are plain text (GLUE's files).
        format: "tsv", "csv" or "jsonl"; None for what the suffix says.
    """

    text: Column | None = None
    pair: Column | None = None
    label: Column | None = None
    header: bool | None = None
    quoting: bool | None = None
    format: str | None = None


def read_table(
    path: str | os.PathLike[str],
    table: TableFormat | None = None,
    *,
    is_pair: bool = False,
    needs_label: bool = True,
    say: Say | None = None,
) -> list[Example]:
    """Read labelled texts, or pairs of them.

    Args:
        path: .tsv, .csv, .jsonl (an object a line), also .gz and .xz.
        table: columns and signs; None for all defaults.
        is_pair: whether every row has two texts.
        needs_label: False reads files without a label column, too.
        say: called with a sentence for what was left out and what looks odd; None: warnings.

    Rows whose column ``gold_label`` is "-", as in SNLI and MultiNLI where annotators did not agree, are left out, as is
    customary; where labels are not needed they are kept, without one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row that does not fit, a missing column, an empty text or file; file, line and reason are named.
    """
    table = table or TableFormat()
    kind = table.format or _FORMATS.get(data_suffix(path))
    if kind not in ("tsv", "csv", "jsonl"):
        raise fail(path, "", f"format is {kind or data_suffix(path)!r}; expected .tsv, .csv or .jsonl. Pass the format")
    text = read_text(path)
    rows = _json_rows(path, text) if kind == "jsonl" else _rows(path, text, kind, table.quoting)
    found: list[Example] = []
    wanted: tuple[Any, Any, Any] | None = None
    read: list[str] | None = None
    width = undecided = quoted = 0
    has_header = True
    for line, row in rows:
        if wanted is None or kind == "jsonl":
            names = list(row) if kind == "jsonl" else [name.strip() for name in row]
            has_header = kind == "jsonl" or _has_header(table, names, is_pair)
            wanted = _columns(path, line, table, names, has_header, is_pair, needs_label)
            width = len(row)
            own = [names[column] for column in wanted if column is not None] if has_header else []
            if read is None:
                read = own
                for note in _of_columns(names, wanted, is_pair) if has_header else ():
                    tell(say, path, note)
            elif own != read:
                raise fail(path, f"line {line}", f"is read from {own}, the first line from {read}; expected the same")
            if has_header and kind != "jsonl":
                continue
        if kind != "jsonl" and len(row) != width:
            hint = ""
            if any('"' in field for field in row) or len(row) > width:
                hint = f" Quotation marks are {'delimiters' if _has_quotes(kind, table) else 'plain text'} here"
            raise fail(path, f"line {line}", f"{len(row)} columns; expected {width}, as in the first row.{hint}")
        is_gold = has_header and wanted[2] is not None and names[wanted[2]].lower() == _GOLD
        example = _example(path, line, row, wanted)
        if is_gold and example.label == _UNDECIDED:
            undecided += 1
            if needs_label:
                continue
            example = Example(example.text, example.pair, None, line)
        quoted += not _has_quotes(kind, table) and kind == "tsv" and _is_quoted(example)
        found.append(example)
    if undecided and needs_label:
        tell(say, path, f"{undecided:,} rows left out: their gold_label is '-', as annotators did not agree")
    if not found:
        reason = "no row has a gold label" if undecided else "has a header and no rows"
        raise fail(path, "", f"{reason}; expected labelled texts")
    if quoted:
        tell(say, path, f"{quoted:,} texts stand in quotation marks, which are kept as text; --quotes csv removes them")
    labels: dict[str, list[int]] = {}
    for example in found:
        if example.label is not None:
            labels.setdefault(example.label, []).append(example.line)
    for note in label_notes(labels):
        tell(say, path, note)
    for note in first_row_note(labels, found[0].line) if not has_header and table.header is None else ():
        tell(say, path, note)
    return found


def _is_quoted(example: Example) -> bool:
    """Whether a text is quoted as spreadsheets and pandas write it: with inner quotation marks doubled."""
    text = example.text
    return len(text) > 3 and text[0] == text[-1] == '"' and '""' in text[1:-1]


def _of_columns(names: list[str], wanted: tuple[Any, Any, Any], is_pair: bool) -> Iterator[str]:
    """Which of several columns that could be meant are read."""
    lower = [name.lower() for name in names]
    roles = (("text", _FIRST_NAMES if is_pair else _TEXT_NAMES, 0), ("label", _LABEL_NAMES, 2))
    for role, usual, place in roles:
        others = [names[lower.index(name)] for name in usual if name in lower and lower.index(name) not in wanted]
        if others and wanted[place] is not None:
            yield f"the {role} is read from {names[wanted[place]]!r}; not from {', '.join(map(repr, others))}"


def _has_quotes(kind: str, table: TableFormat) -> bool:
    return kind == "csv" if table.quoting is None else table.quoting


def _rows(path: Any, text: str, kind: str, quoting: bool | None) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of every row that is not blank; a quoted field may hold line ends."""
    delimiter = "\t" if kind == "tsv" else ","
    if not (kind == "csv" if quoting is None else quoting):
        # As the csv module with QUOTE_NONE, but for its other ideas of a line's end.
        for line, content in enumerate(text.split("\n"), 1):
            if content.strip():
                yield line, content.split(delimiter)
        return
    csv.field_size_limit(1 << 27)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "a quotation mark opens a field and none closes it" if "unexpected end" in str(error) else str(error)
            raise fail(
                path,
                f"line {line}",
                f"{hint}. Where quotation marks are plain text, switch quoting off (--quotes plain)",
            ) from error
        if any(field.strip() for field in row):
            yield line, row
        line = reader.line_num + 1


def _json_rows(path: Any, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        row = parse_json(path, line, content)
        if not isinstance(row, dict):
            raise fail(path, f"line {line}", f"is a {type(row).__name__}; expected a JSON object a line")
        yield line, row


def _has_header(table: TableFormat, names: list[str], is_pair: bool) -> bool:
    if table.header is not None:
        return table.header
    asked = [column for column in (table.text, table.pair, table.label) if isinstance(column, str)]
    if asked:
        return True
    usual = {*_LABEL_NAMES, *((*_FIRST_NAMES, *_SECOND_NAMES) if is_pair else _TEXT_NAMES)}
    return any(name.lower() in usual for name in names)


def _columns(
    path: Any, line: int, table: TableFormat, names: list[str], has_header: bool, is_pair: bool, needs_label: bool
) -> tuple[Any, Any, Any]:
    """Where text, pair and label stand: numbers, or keys of a JSON object; None for what there is not."""
    roles: list[tuple[str, Column | None, tuple[str, ...], int]] = [
        ("text", table.text, _FIRST_NAMES if is_pair else _TEXT_NAMES, 0)
    ]
    if is_pair:
        roles.append(("pair", table.pair, _SECOND_NAMES, 1))
    roles.append(("label", table.label, _LABEL_NAMES, len(names) - 1))
    lower = [name.lower() for name in names]
    found: dict[str, int | None] = {"pair": None}
    for role, asked, usual, place in roles:
        if isinstance(asked, int):
            column = asked if 0 <= asked < len(names) else None
        elif not has_header:
            column = place if asked is None and place < len(names) else None
        elif asked is not None:
            column = names.index(asked) if asked in names else None
        else:
            taken = set(found.values())
            places = [lower.index(name) for name in usual if name in lower]
            column = next((place for place in places if place not in taken), None)
        if column in found.values() and column is not None:
            column = None
        known = names if asked is not None else lower
        if column is not None and has_header and not isinstance(asked, int) and known.count(known[column]) > 1:
            raise fail(path, f"line {line}", f"has several columns {names[column]!r}; expected one, or its number")
        if column is None and (role != "label" or needs_label):
            what = f"column {asked!r}" if asked is not None else f"column for the {role}"
            hint = f"Name it (--{role}-column)"
            is_json = (table.format or _FORMATS.get(data_suffix(path))) == "jsonl"
            if has_header and table.header is None and not is_json:
                hint += "; if this row names no columns, say so (--no-header)"
            raise fail(path, f"line {line}", f"has no {what}; its columns are {many(list(map(shown, names)))}. {hint}")
        found[role] = column
    return found["text"], found["pair"], found["label"]


def _example(path: Any, line: int, row: Any, wanted: tuple[Any, Any, Any]) -> Example:
    values = list(row.values()) if isinstance(row, dict) else row
    texts: list[str | None] = []
    for column in wanted:
        value = None if column is None else values[column]
        if value is not None and not isinstance(value, str):
            if isinstance(value, (list, dict)):
                raise fail(path, f"line {line}", f"holds a {type(value).__name__}; expected a string")
            value = json.dumps(value)
        texts.append(value)
    text, pair, label = texts
    for name, value, column in (("text", text, wanted[0]), ("second text", pair, wanted[1])):
        if column is not None and (value is None or not value.strip()):
            raise fail(path, f"line {line}", f"the {name} is empty")
    label = None if label is None else label.strip()
    if wanted[2] is not None and not label:
        raise fail(path, f"line {line}", "the label is empty")
    assert text is not None  # its column is always there
    return Example(text, pair, label, line)
