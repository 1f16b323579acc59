# SPDX-License-Identifier: Apache-2.0
"""Questions on a text whose answers are spans of it: SQuAD 1.1 and 2.0."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from .lines import fail, read_text


@dataclass(frozen=True, slots=True)
class Answer:
    """A span of the context: its text and its first character."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Question:
    """A question, the text to look in, and the answers, () for none: then ``is_impossible`` or not labelled."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    is_impossible: bool


def read_squad(
    path: str | os.PathLike[str], *, needs_answers: bool = True, misaligned: str = "error"
) -> tuple[list[Question], list[str]]:
    """Read SQuAD's JSON.

    Args:
        path: the JSON of SQuAD 1.1 or 2.0, also .gz and .xz.
        needs_answers: False reads questions without answers, too.
        misaligned: what to do with an answer that does not stand where its answer_start says: "error", or "skip" (the
            question is left out and reported).

    Returns:
        The questions, and a sentence for each one left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON (with its line), another structure, an answer that does not stand in its text; the place in
            the file and the question's id are named.
    """
    if misaligned not in ("error", "skip"):
        raise ValueError(f"ctxfast.readers: misaligned is {misaligned!r}; expected 'error' or 'skip'.")
    text = read_text(path)
    try:
        root = json.loads(text)
    except json.JSONDecodeError as error:
        raise fail(path, f"line {error.lineno}", f"is no JSON ({error.msg} at column {error.colno})") from error
    articles = _field(path, "the file", root, "data", list)
    found: list[Question] = []
    notes: list[str] = []
    seen: set[str] = set()
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(_field(path, f"data[{a}]", article, "paragraphs", list)):
            where = f"data[{a}].paragraphs[{p}]"
            context = _field(path, where, paragraph, "context", str)
            if not context.strip():
                raise fail(path, where, "the context is empty")
            for q, entry in enumerate(_field(path, where, paragraph, "qas", list)):
                place = f"{where}.qas[{q}]"
                id = str(_field(path, place, entry, "id", (str, int)))
                place = f"{place} (id {id}, line {_line(text, id)})"
                if id in seen:
                    raise fail(path, place, "the id came before; expected a different one for every question")
                seen.add(id)
                try:
                    found.append(_question(path, place, id, entry, context, needs_answers))
                except _Misaligned as error:
                    if misaligned == "error":
                        hint = ". Correct it, or leave such questions out (misaligned='skip', --skip-misaligned)"
                        raise fail(path, place, f"{error}{hint}") from None
                    notes.append(f"{os.fspath(path)}, {place}: left out: {error}")
    if not found:
        raise fail(path, "", "holds no questions")
    return found, notes


class _Misaligned(Exception):
    pass


def _question(path: Any, place: str, id: str, entry: dict, context: str, needs_answers: bool) -> Question:
    question = _field(path, place, entry, "question", str)
    if not question.strip():
        raise fail(path, place, "the question is empty")
    is_impossible = bool(entry.get("is_impossible", False))
    answers = []
    for k, answer in enumerate(_field(path, place, entry, "answers", list) if "answers" in entry else []):
        where = f"{place}.answers[{k}]"
        text, start = _field(path, where, answer, "text", str), _field(path, where, answer, "answer_start", int)
        if not text.strip():
            raise _Misaligned(f"answer {k} is empty")
        if not 0 <= start <= len(context) or context[start : start + len(text)] != text:
            there = context[max(start, 0) : max(start, 0) + len(text)]
            raise _Misaligned(f"answer {k} is {text!r}, but the text at answer_start {start} is {there!r}")
        answers.append(Answer(text, start))
    if is_impossible:
        answers = []
    elif not answers and needs_answers:
        raise fail(path, place, "has no answer and is not marked is_impossible")
    return Question(id, question, context, tuple(answers), is_impossible)


def _line(text: str, id: str) -> int:
    """The line an id stands on: files are often a single one, but those written by hand are not."""
    place = text.find(json.dumps(id))
    return text.count("\n", 0, max(place, 0)) + 1


def _field(path: Any, where: str, holder: Any, name: str, kind: Any) -> Any:
    if not isinstance(holder, dict) or name not in holder:
        raise fail(path, where, f"has no {name!r}; expected SQuAD's data, paragraphs, context, qas, answers")
    value = holder[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = kind.__name__ if isinstance(kind, type) else "str or int"
        raise fail(path, where, f"{name!r} is of type {type(value).__name__}; expected {wanted}")
    return value
