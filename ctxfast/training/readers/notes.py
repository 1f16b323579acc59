# SPDX-License-Identifier: Apache-2.0
"""Warnings about data that can be read but looks wrong. Nothing is refused here, and nothing goes unsaid."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

Say = Callable[[str], None]
# What programs write where there is nothing.
_MISSING = frozenset({"nan", "none", "null", "n/a", "<na>", "-"})
_MOST_NAMED = 3
# So many rows tell whether a label comes again.
_FEW_ROWS = 5
_MANY_LABELS = 50


def tell(say: Say | None, path: str | os.PathLike[str], text: str) -> None:
    """Say something of a file: to ``say``, or as a warning."""
    text = f"{os.fspath(path)}: {text}"
    if say is None:
        warnings.warn(f"ctxfast.readers: {text}", stacklevel=4)
    else:
        say(text)


def many(items: Sequence[str]) -> str:
    """The first few of some words, and how many more there are."""
    shown = ", ".join(items[:_MOST_NAMED])
    return shown if len(items) <= _MOST_NAMED else f"{shown} and {len(items) - _MOST_NAMED} more"


def label_notes(labels: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """What is odd about the labels of a file.

    Args:
        labels: each label and the lines it stands on.
    """
    for label, lines in labels.items():
        if label.lower() in _MISSING:
            yield f"label {label!r} stands on {_times(lines)}; it is a label like any other here, no missing one"
    yield from _alike({label: lines for label, lines in labels.items() if not _is_number(label)}, "case or punctuation")


def class_notes(labels: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """What is odd about labels that are to be classes."""
    numbers = {label: lines for label, lines in labels.items() if _is_number(label)}
    yield from _alike(numbers, "how a number is written")
    if "-1" in labels and set(labels) == {"-1", *map(str, range(len(labels) - 1))}:
        yield f"label '-1' stands on {_times(labels['-1'])}; Hugging Face's datasets write it where there is no label"
    fractions = sum(not float(label).is_integer() for label in numbers)
    count, rows = len(labels), sum(map(len, labels.values()))
    if fractions and len(numbers) == count:
        yield f"all labels are numbers, {fractions} with fractions; each is a class of its own without --regression"
    elif count > max(_MANY_LABELS, rows // 2):
        yield f"{count} different labels on {rows} rows; is the right column read?"


def _alike(labels: Mapping[str, Sequence[int]], what: str) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(_plain(label), []).append(label)
    for group in groups.values():
        if len(group) > 1:
            places = " and ".join(f"{label!r} (line {labels[label][0]})" for label in group[:_MOST_NAMED])
            yield f"labels {places} differ in {what} alone; they are {len(group)} labels"


def first_row_note(labels: Mapping[str, Sequence[int]], first: int) -> Iterator[str]:
    """Whether a first row that was taken for data names columns, most likely."""
    others = sum(map(len, labels.values())) - 1
    label = next((label for label, lines in labels.items() if lines == [first]), None)
    if label is not None and others >= _FEW_ROWS and len(labels) - 1 <= others // 2:
        yield (
            f"line {first} is read as data, and its label {label!r} stands nowhere else; if it names columns, say so "
            "(--header, --text-column, --label-column)"
        )


def _times(lines: Sequence[int]) -> str:
    return f"line {lines[0]}" if len(lines) == 1 else f"{len(lines)} lines, the first of them {lines[0]}"


def _plain(label: str) -> str:
    """A label without what people do not mean by writing it."""
    text = " ".join(label.split()).casefold()
    return f"{float(text):g}" if _is_number(text) else text.replace(" ", "").replace("_", "").replace("-", "")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return not text.strip().lower().lstrip("+-").startswith(("nan", "inf"))
