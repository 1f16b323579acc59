# SPDX-License-Identifier: Apache-2.0
"""Lists of texts as callers hand them over, where what is none is named before anything is computed; texts as messages
show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any


def as_list(texts: Iterable[Any], who: str) -> list[Any]:
    """The texts of a call as a list.

    Raises:
        TypeError: one string, or what does not go through texts in an order: a table (it goes through the names of its
            columns), a mapping (its keys), a set.
    """
    kind = f"of type {type(texts).__name__}"
    if isinstance(texts, (str, bytes)):
        what = "one string" if isinstance(texts, str) else "bytes"
        raise TypeError(f"{who}: texts is {what}; expected a list of texts. Put it in brackets.")
    if hasattr(texts, "columns") or isinstance(texts, Mapping):
        table: Any = texts
        columns = list(table if isinstance(table, Mapping) else table.columns)
        way = (
            ", such as texts[{!r}]; it has {}".format(columns[0], ", ".join(map(repr, columns[:8]))) if columns else ""
        )
        raise TypeError(f"{who}: texts is {kind}, a table; expected a list of texts. Pass one column of it{way}.")
    if isinstance(texts, Set):
        raise TypeError(f"{who}: texts is {kind}, which has no order; expected a list of texts.")
    try:
        return list(texts)
    except TypeError as error:  # not iterable, an array without axes
        raise TypeError(f"{who}: texts is {kind}; expected a list of texts.") from error


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, or what pandas has for them."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and value != value


def wrong_text(who: str, index: int, texts: Sequence[Any], expected: str) -> TypeError:
    """The error for a text that is none; where it is a missing one, with how many are and what to do."""
    text = f"{who}: text {index} is {described(texts[index])}; expected {expected}."
    if not is_missing(texts[index]):
        return TypeError(text)
    count = sum(map(is_missing, texts))
    many = "It alone is missing" if count == 1 else f"{count} texts are missing"
    return TypeError(f"{text} {many}: leave such texts out (dropna() in pandas), or put '' in their place.")


def described(value: Any) -> str:
    """A value that is not a text, for an error message: the value itself where it is short, and its type."""
    text, kind = repr(value), type(value).__name__
    if value is None:
        return text
    return f"{text} ({kind})" if len(text) <= 40 and "\n" not in text else f"of type {kind}"


def some(names: Iterable[str]) -> str:
    """The first names of a list, for a message, and how many more there are."""
    names, most = list(names), 8
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
