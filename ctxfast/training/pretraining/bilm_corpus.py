# SPDX-License-Identifier: Apache-2.0
"""Text for a bidirectional language model: sentences of words in memory-mapped arrays, and what each step reads.

A sentence of n words makes n + 1 predictions in each direction: forwards ``<S> w1 .. wn`` predict ``w1 .. wn </S>``,
backwards ``</S> wn .. w1`` predict ``wn .. w1 <S>``. Sentences follow one another in the order of the text. A document
begins where a file does and after a blank line.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..._core.checks import shown
from ..._core.digests import fingerprint
from ..._core.files import replacing_folder
from ...models.elmo.tokenization import BEGIN_SENTENCE, END_SENTENCE, END_WORD_ID, ElmoCharacterMapper
from .prepared import read_note, save_array, stored
from .text import split_sentences, text_lines

UNKNOWN = "<UNK>"
MARKS = (BEGIN_SENTENCE, END_SENTENCE, UNKNOWN)
BEGIN, END, UNKNOWN_ID = 0, 1, 2
# A vocabulary of the One Billion Word Benchmark holds this, which is not a word.
_NO_WORD = "!!!MAXTERMID"
_WHO = "ctxfast.training.BiLmCorpus"
_LOG = logging.getLogger(__name__)
_BLOCK_TOKENS = 1 << 20
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def tokenized(line: str) -> Iterator[list[str]]:
    """Sentences of words of a line of running text, by simple rules.

    Sentences as ``split_sentences`` finds them; words are runs of letters, digits and inner apostrophes; every other
    character is a word of its own.
    """
    for sentence in split_sentences(line):
        if words := _WORD.findall(sentence):
            yield words


def sentences(path: str | os.PathLike[str], tokenize: bool = False) -> Iterator[list[str]]:
    """Sentences of a text file (plain, .gz, .xz): a line each, words between white space; blank lines are left out.

    Args:
        path: the file, UTF-8.
        tokenize: lines are running text, see ``tokenized``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not UTF-8, or that holds ``<S>`` or ``</S>``, by its number.
    """
    for words, _ in _in_documents(path, tokenize):
        yield words


def _in_documents(path: str | os.PathLike[str], tokenize: bool) -> Iterator[tuple[list[str], bool]]:
    """``sentences``, each with whether it begins a document: the file's first, and whatever follows a blank line."""
    begins = True
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            begins = True
            continue
        for words in tokenized(line) if tokenize else (line.split(),):
            if not tokenize and (BEGIN_SENTENCE in words or END_SENTENCE in words):
                raise ValueError(
                    f"ctxfast.training: line {number} of {path} holds a sentence mark; expected words only, the marks "
                    "are added."
                )
            yield words, begins
            begins = False


def count_words(files: Sequence[str | os.PathLike[str]], tokenize: bool = False) -> Counter[str]:
    """How often each word stands in the files."""
    counts: Counter[str] = Counter()
    for file in files:
        for words in sentences(file, tokenize):
            counts.update(words)
    return counts


def make_vocabulary(counts: Counter[str], size: int | None = None, min_count: int = 1) -> list[str]:
    """The marks, then words from the most to the least frequent: the order that sampling relies on.

    Args:
        counts: see ``count_words``.
        size: words at most, marks included.
        min_count: words seen less often are left out.
    """
    words = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
    words = [*MARKS, *(word for word in words if word not in MARKS and word != _NO_WORD)]
    return words if size is None else words[: max(size, len(MARKS))]


def read_vocabulary(path: str | os.PathLike[str]) -> list[str]:
    """A vocabulary file (plain, .gz, .xz), a word a line, ``<S>``, ``</S>``, ``<UNK>`` first, frequent words before
    rare ones.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other words at the start, a word that stands there twice or a line that is not UTF-8, by line
            number.
    """
    words: list[str] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text_lines(path), 1):
        word = line.strip()
        if word == _NO_WORD:
            continue
        if number <= len(MARKS) and word != MARKS[number - 1]:
            raise ValueError(
                f"{_WHO}: line {number} of {path} is {shown(word)}; expected {MARKS[number - 1]!r}: a vocabulary "
                f"begins with {', '.join(MARKS)}."
            )
        if not word or word in seen:
            what = f"the same as line {seen[word]}" if word else "empty"
            raise ValueError(f"{_WHO}: line {number} of {path} is {what}; expected a word of its own.")
        seen[word] = number
        words.append(word)
    if len(words) <= len(MARKS):
        raise ValueError(f"{_WHO}: {path} has {len(words)} words; expected {', '.join(MARKS)} and more.")
    return words


@dataclass(frozen=True)
class Window:
    """What lanes read next: distinct words as numbers, inputs and targets of both directions.

    Attributes:
        inputs: (2, lanes, steps) int64, distinct words (rows of ``BiLmCorpus.characters``), backward reversed in time.
        targets: (2, lanes, steps) int64, ids of the vocabulary; -100 past the end.
    """

    inputs: np.ndarray
    targets: np.ndarray


class BiLmCorpus:
    """A prepared text.

    Args:
        directory: made by ``prepare``.

    Attributes:
        vocabulary: words of the output layer.
        characters: (D, C) int16, character ids of every distinct word of the text, the vocabulary's first.
        positions: predictions in each direction.
        num_sentences: sentences.
        starts: (sentences + 1,) int64, the position at which each sentence starts, and the end of the last.
        documents: (N,) int64, positions at which documents begin.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        path = Path(directory)
        with stored(path, _WHO):
            self.vocabulary = read_vocabulary(path / "vocabulary.txt")
            self.characters = np.load(path / "characters.npy", mmap_mode="r")
            self._tokens = np.load(path / "tokens.npy", mmap_mode="r")
            self.starts = np.load(path / "starts.npy", mmap_mode="r")
            self.documents = np.load(path / "documents.npy", mmap_mode="r")
            self.num_sentences = len(self.starts) - 1
            self.positions = int(self.starts[-1])

    @property
    def unknown_share(self) -> float:
        """Share of words of the text that the vocabulary lacks."""
        return float(np.mean(self._tokens >= len(self.vocabulary)))

    @classmethod
    def prepare(
        cls,
        directory: str | os.PathLike[str],
        files: Sequence[str | os.PathLike[str]],
        vocabulary: Sequence[str] | None = None,
        *,
        vocabulary_size: int | None = None,
        min_count: int = 1,
        tokenize: bool = False,
        max_characters: int = 50,
        say: Callable[[str], None] | None = None,
    ) -> BiLmCorpus:
        """Read text into arrays, unless ``directory`` holds what the same arguments gave before.

        Args:
            directory: appears when it is whole.
            files: text files, read in this order.
            vocabulary: the words of the output layer; None: made of the text's, see ``make_vocabulary``.
            vocabulary_size, min_count: for a vocabulary that is made.
            tokenize: see ``sentences``.
            max_characters: of a word, marks included.
            say: called with a line about what is being done; None: the logger of this module, as information.

        Memory: a dictionary of the text's distinct words. The files are read twice.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: no text in the files, or text that is not UTF-8.
        """
        path = Path(directory)
        given = None if vocabulary is None else hashlib.sha256("\n".join(vocabulary).encode()).hexdigest()
        meta: dict[str, Any] = {
            "format": 2,
            "files": [[os.fspath(file), fingerprint(file)] for file in files if Path(file).is_file()],
            "vocabulary": [vocabulary_size, min_count] if given is None else given,
            "tokenize": tokenize,
            "max_characters": max_characters,
        }
        if read_note(path, "meta.json") == json.loads(json.dumps(meta)):
            return cls(path)
        say = say or _LOG.info
        say(f"counting words of {', '.join(Path(file).name for file in files)}")
        counts = count_words(files, tokenize)
        if not counts:
            names = ", ".join(os.fspath(file) for file in files)
            raise ValueError(f"{_WHO}: {names}: no words; expected a text, a sentence a line.")
        words = make_vocabulary(counts, vocabulary_size, min_count) if vocabulary is None else list(vocabulary)
        say(f"{sum(counts.values()):,} words, {len(counts):,} distinct, vocabulary of {len(words):,}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(path) as temporary:
            _write(temporary, files, counts, words, tokenize, max_characters)
            (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        return cls(path)

    def window(self, starts: Sequence[int], steps: int, ends: Sequence[int] | None = None) -> Window:
        """What each lane reads from its position on, around the end of the text.

        Args:
            starts: a position a lane.
            steps: predictions to read.
            ends: positions at which lanes end; what lies past them has no target. None: no end.
        """
        inputs = np.full((2, len(starts), steps), END, dtype=np.int64)
        targets = np.full((2, len(starts), steps), -100, dtype=np.int64)
        for lane, start in enumerate(starts):
            left = steps if ends is None else max(0, min(steps, ends[lane] - start))
            start %= self.positions
            number = int(np.searchsorted(self.starts, start, side="right")) - 1
            filled = 0
            while filled < left:
                first, last = int(self.starts[number]), int(self.starts[number + 1])
                words = self._tokens[first - number : last - number - 1]
                sentence = np.concatenate([[BEGIN], words, [END]])
                offset = start - first
                size = min(last - start, left - filled)
                for direction, line in enumerate((sentence, sentence[::-1])):
                    inputs[direction, lane, filled : filled + size] = line[offset : offset + size]
                    targets[direction, lane, filled : filled + size] = line[offset + 1 : offset + 1 + size]
                filled += size
                number = (number + 1) % self.num_sentences
                start = int(self.starts[number])
        targets[targets >= len(self.vocabulary)] = UNKNOWN_ID
        return Window(inputs, targets)

    def sentence_starts(self, positions: np.ndarray) -> np.ndarray:
        """Where the sentences of positions (any shape, int64) start; a position past the end counts from the start."""
        return self.starts[np.searchsorted(self.starts, positions % self.positions, side="right") - 1]

    def words(self, sentence: int) -> list[bytes]:
        """Words of a sentence by its number, UTF-8, as far as their characters are read."""
        first, last = int(self.starts[sentence]), int(self.starts[sentence + 1])
        rows = self.characters[self._tokens[first - sentence : last - sentence - 1]]
        # The row of a word: its begin mark, its bytes, each + 1, its end mark.
        return [bytes((row[1 : int(np.argmax(row == END_WORD_ID))] - 1).astype(np.uint8)) for row in rows]


def _write(
    path: Path,
    files: Sequence[str | os.PathLike[str]],
    counts: Counter[str],
    vocabulary: list[str],
    tokenize: bool,
    max_characters: int,
) -> None:
    known = set(vocabulary)
    others = sorted((word for word in counts if word not in known), key=lambda word: (-counts[word], word))
    distinct = [*vocabulary, *others]
    number = {word: index for index, word in enumerate(distinct)}
    (path / "vocabulary.txt").write_text("".join(f"{word}\n" for word in vocabulary), encoding="utf-8")
    mapper = ElmoCharacterMapper(max_characters=max_characters)
    characters = np.empty((len(distinct), max_characters), dtype=np.int16)
    for start in range(0, len(distinct), 1 << 16):
        part = distinct[start : start + (1 << 16)]
        characters[start : start + len(part)] = mapper.rows(part)
    save_array(path / "characters.npy", characters)
    starts, documents, position = array("q", [0]), array("q"), 0
    block: list[int] = []
    total = sum(counts.values())
    # Written, not mapped: a process that writes into a map of a file on a full disk is killed.
    with open(path / "tokens.npy", "wb") as out:
        header = {"descr": np.dtype(np.int32).str, "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(out, header)
        for file in files:
            for words, begins in _in_documents(file, tokenize):
                try:
                    block += [number[word] for word in words]
                except KeyError:  # it was not there when words were counted
                    raise ValueError(f"{_WHO}: text {file} changed while it was read. Run again.") from None
                if begins:
                    documents.append(position)
                position += len(words) + 1
                starts.append(position)
                if len(block) >= _BLOCK_TOKENS:
                    out.write(np.asarray(block, dtype=np.int32).tobytes())
                    block = []
        out.write(np.asarray(block, dtype=np.int32).tobytes())
    save_array(path / "starts.npy", np.frombuffer(starts, dtype=np.int64))
    save_array(path / "documents.npy", np.frombuffer(documents, dtype=np.int64))
