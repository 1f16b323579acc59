# SPDX-License-Identifier: Apache-2.0
"""Questions on a text whose answers are spans of it: SQuAD 1.1 and 2.0."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any

from ..._core.checks import shown
from .files import fail, parse_json, read_text


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
        The questions, and a sentence for each one, and for all answers, left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON (with its line), another structure, an answer that does not stand in its text; the place in
            the file and the question's id are named.
    """
    if misaligned not in ("error", "skip"):
        raise ValueError(f"ctxfast.readers: misaligned is {misaligned!r}; expected 'error' or 'skip'.")
    text = read_text(path, has_lines=False)
    root = parse_json(path, 1, text)
    articles = _field(path, "the file", root, "data", list)
    found: list[Question] = []
    notes: list[str] = []
    overruled = 0
    seen: set[str] = set()

    def at(place: str, id: str) -> str:
        # Only where something is wrong: looking for the line reads the file from its beginning.
        return f"{place} (id {id}, line {_line(text, id, id in seen)})"

    for a, article in enumerate(articles):
        for p, paragraph in enumerate(_field(path, f"data[{a}]", article, "paragraphs", list)):
            where = f"data[{a}].paragraphs[{p}]"
            context = _field(path, where, paragraph, "context", str)
            if not context.strip():
                raise fail(path, where, "the context is empty")
            for q, entry in enumerate(_field(path, where, paragraph, "qas", list)):
                place = f"{where}.qas[{q}]"
                id = str(_field(path, place, entry, "id", (str, int)))
                if id in seen:
                    reason = "the id came before; expected a different one for every question"
                    raise fail(path, at(place, id), reason)
                try:
                    found.append(_question(id, entry, context, needs_answers))
                except _Misaligned as error:
                    if misaligned == "error":
                        hint = ". Correct it, or leave such questions out (misaligned='skip', --skip-misaligned)"
                        raise fail(path, at(place, id), f"{error}{hint}") from None
                    notes.append(f"{os.fspath(path)}, {at(place, id)}: left out: {error}")
                except _Wrong as error:
                    raise fail(path, at(place, id) + error.where, error.reason) from None
                else:
                    overruled += found[-1].is_impossible and bool(entry.get("answers"))
                seen.add(id)
    if not found:
        raise fail(path, "", f"holds no questions{' whose answers stand where they say' if notes else ''}")
    if overruled:
        notes.append(
            f"{os.fspath(path)}: {overruled:,} questions are is_impossible and have answers, which are left out"
        )
    return found, notes


class _Misaligned(Exception):
    pass


class _Wrong(Exception):
    """What is wrong in a question, and where in it."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(reason)
        self.where, self.reason = where, reason


def _question(id: str, entry: dict, context: str, needs_answers: bool) -> Question:
    question = _part("", entry, "question", str)
    if not question.strip():
        raise _Wrong("", "the question is empty")
    is_impossible = _part("", entry, "is_impossible", bool) if "is_impossible" in entry else False
    answers = []
    for k, answer in enumerate(_part("", entry, "answers", list) if "answers" in entry else []):
        where = f".answers[{k}]"
        text, start = _part(where, answer, "text", str), _part(where, answer, "answer_start", int)
        if not text.strip():
            raise _Misaligned(f"answer {k} is empty")
        if not 0 <= start <= len(context) or context[start : start + len(text)] != text:
            there = context[max(start, 0) : max(start, 0) + len(text)]
            raise _Misaligned(f"answer {k} is {shown(text)}, but the text at answer_start {start} is {shown(there)}")
        answers.append(Answer(text, start))
    if is_impossible:
        answers = []
    elif not answers and needs_answers:
        raise _Wrong("", "has no answer and is not marked is_impossible")
    return Question(id, question, context, tuple(answers), is_impossible)


def _line(text: str, id: str, is_second: bool) -> int:
    """The line an id stands on, or that of its second place: files are often a single line, those written by hand are
    not."""
    # As text or as a number, with letters beyond ASCII as they are or escaped.
    spellings = "|".join(re.escape(form) for form in {json.dumps(id), json.dumps(id, ensure_ascii=False), id})
    places = [match.start() for match in re.finditer(rf'"id"\s*:\s*(?:{spellings})(?=\s*[,}}])', text)]
    place = places[min(int(is_second), len(places) - 1)] if places else 0
    return text.count("\n", 0, place) + 1


def _part(where: str, holder: Any, name: str, kind: Any) -> Any:
    if not isinstance(holder, dict) or name not in holder:
        raise _Wrong(where, f"has no {name!r}; expected SQuAD's data, paragraphs, context, qas, answers")
    value = holder[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = kind.__name__ if isinstance(kind, type) else "str or int"
        raise _Wrong(where, f"{name!r} is of type {type(value).__name__}; expected {wanted}")
    return value


def _field(path: Any, where: str, holder: Any, name: str, kind: Any) -> Any:
    try:
        return _part("", holder, name, kind)
    except _Wrong as error:
        raise fail(path, where, error.reason) from None
