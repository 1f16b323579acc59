# SPDX-License-Identifier: Apache-2.0
"""Corpora in files of their own kind: Stanford's sentiment trees, TREC's questions, the STS Benchmark."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..._core.checks import shown
from .files import fail, read_text
from .notes import Say, tell
from .tables import Example

# Names of --format, and whether texts come in pairs.
CORPORA = {"sst": False, "sst2": False, "trec": False, "trec-fine": False, "stsb": True}
_SIGNS = re.compile(r"[()]|[^\s()]+")
_BINARY = {"0": "negative", "1": "negative", "3": "positive", "4": "positive"}
_STSB_COLUMNS = 7  # genre, file, year, number, score, sentence 1, sentence 2; some rows have sources, too
_SCORES = (0.0, 5.0)


def read_sst(
    path: str | os.PathLike[str], *, is_binary: bool = False, has_phrases: bool = False, say: Say | None = None
) -> list[Example]:
    """Read the Stanford Sentiment Treebank: a tree a line, ``(3 (2 It) (4 (2 's) (4 good)))``.

    Args:
        path: train.txt, dev.txt or test.txt, also .gz and .xz.
        is_binary: whether labels are "negative" (0 and 1) and "positive" (3 and 4), and neutral texts are left out, as
            is customary; else they are "0" to "4".
        has_phrases: whether every phrase of a tree is an example, single words included, or whole sentences alone.
        say: called with a sentence for what was left out; None: warnings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no tree; file, line and reason are named.

    Reference: Socher et al. 2013.
    """
    found: list[Example] = []
    neutral = 0
    for line, content in enumerate(read_text(path).split("\n"), 1):
        if not content.strip():
            continue
        phrases = _tree(path, line, content)
        for label, words in phrases if has_phrases else phrases[-1:]:
            if is_binary and label not in _BINARY:
                neutral += 1
                continue
            found.append(Example(" ".join(words), None, _BINARY[label] if is_binary else label, line))
    if neutral:
        tell(say, path, f"{neutral:,} neutral {'phrases' if has_phrases else 'sentences'} left out (label 2)")
    if not found:
        raise fail(path, "", "every sentence is neutral; expected some that are not")
    return found


def _tree(path: str | os.PathLike[str], line: int, content: str) -> list[tuple[str, list[str]]]:
    """Labels and words of all phrases of a tree, a phrase behind its parts."""
    open_nodes: list[tuple[str, list[str]]] = []
    phrases: list[tuple[str, list[str]]] = []
    signs = [(match.group(), match.start() + 1) for match in _SIGNS.finditer(content)]
    place = 0
    while place < len(signs):
        sign, column = signs[place]
        is_over = bool(phrases) and not open_nodes
        if sign == "(" and not is_over:
            label = signs[place + 1][0] if place + 1 < len(signs) else ""
            if label not in ("0", "1", "2", "3", "4"):
                raise fail(path, f"line {line}", f"{shown(label)} is a label at column {column + 1}; expected 0 to 4")
            open_nodes.append((label, []))
            place += 2
            continue
        if sign == ")" and open_nodes and open_nodes[-1][1]:
            phrases.append(open_nodes.pop())
            if open_nodes:
                open_nodes[-1][1].extend(phrases[-1][1])
        elif sign not in "()" and open_nodes and not open_nodes[-1][1]:
            open_nodes[-1][1].append(sign)
        else:
            expected = "one tree, (label word) or (label tree tree)"
            raise fail(path, f"line {line}", f"{shown(sign)} at column {column} does not fit; expected {expected}")
        place += 1
    if open_nodes or not phrases:
        raise fail(path, f"line {line}", "ends within a tree; expected as many ) as (")
    return phrases


def read_trec(path: str | os.PathLike[str], *, is_fine: bool = False, say: Say | None = None) -> list[Example]:
    """Read TREC's questions: ``LOC:city What is the capital of Yugoslavia ?``.

    Args:
        path: train_5500.label, TREC_10.label, also .gz and .xz; not in UTF-8, Latin-1 is read, as in the release.
        is_fine: whether labels are the 50 fine ones ("LOC:city") or the 6 coarse ones ("LOC").
        say: called with a sentence for what looks odd; None: warnings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line without label or question; file, line and reason are named.

    Reference: Li & Roth 2002.
    """
    found: list[Example] = []
    for line, content in _lines(path, say):
        label, _, text = content.strip().partition(" ")
        coarse, colon, fine = label.partition(":")
        if not (coarse and colon and fine):
            raise fail(path, f"line {line}", f"begins with {shown(label)}; expected COARSE:fine, then the question")
        if not text.strip():
            raise fail(path, f"line {line}", "has a label and no question")
        found.append(Example(text.strip(), None, label if is_fine else coarse, line))
    return found


def _lines(path: str | os.PathLike[str], say: Say | None) -> Iterator[tuple[int, str]]:
    try:
        text = read_text(path)
    except ValueError as error:
        if "is not UTF-8" not in str(error) or Path(path).suffix in (".gz", ".xz"):
            raise
        text = Path(path).read_text(encoding="latin-1")
        tell(say, path, "is read as Latin-1, as it is not UTF-8")
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            yield line, content


def read_stsb(path: str | os.PathLike[str]) -> list[Example]:
    """Read the STS Benchmark as released: sts-train.csv, sts-dev.csv, sts-test.csv, also .gz and .xz; columns genre,
    file, year, number, score, sentence 1, sentence 2, separated by tabs, quotation marks are text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row with fewer columns, an empty sentence, a score outside 0 to 5; file, line and reason are
            named.

    Reference: Cer et al. 2017.
    """
    found: list[Example] = []
    for line, content in enumerate(read_text(path).split("\n"), 1):
        if not content.strip():
            continue
        fields = content.split("\t")
        if len(fields) < _STSB_COLUMNS:
            expected = f"{_STSB_COLUMNS} or more: genre, file, year, number, score, two sentences"
            raise fail(path, f"line {line}", f"{len(fields)} columns, separated by tabs; expected {expected}")
        score, one, other = (field.strip() for field in fields[4:7])
        try:
            is_score = _SCORES[0] <= float(score) <= _SCORES[1]
        except ValueError:
            is_score = False
        if not is_score:
            raise fail(path, f"line {line}", f"the score is {shown(score)}; expected a number from 0 to 5")
        if not one or not other:
            raise fail(path, f"line {line}", f"sentence {2 if one else 1} is empty")
        found.append(Example(one, other, score, line))
    return found


def read_corpus(
    path: str | os.PathLike[str], name: str, *, has_phrases: bool = False, say: Say | None = None
) -> list[Example]:
    """The examples of a file by its corpus, a name of ``CORPORA``.

    Raises:
        FileNotFoundError, ValueError: as the corpus' reader.
    """
    if name == "stsb":
        return read_stsb(path)
    if name.startswith("sst"):
        return read_sst(path, is_binary=name == "sst2", has_phrases=has_phrases, say=say)
    return read_trec(path, is_fine=name == "trec-fine", say=say)
