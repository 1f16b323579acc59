# SPDX-License-Identifier: Apache-2.0
"""Text made into memory-mapped shards of pretraining sequences, a shard at a time, so that a killed run goes on.

A shard holds the sequences of some documents that follow one another in the text, in shuffled order, with or without
masks. Another document's sentences come from the same shard.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..._core.digests import fingerprint
from ..._core.files import clear_left, replacing, replacing_folder
from ...models.bert.tokenization import BertTokenizer, Encoding
from . import bert_instances, bert_pairs, knowledge_masking
from .bert_instances import Document, Instance, Pair, PairOptions, Vocabulary
from .knowledge_masking import KnowledgeMasking
from .knowledge_spans import FLAG_SHIFT, ID_MASK, SPEAKER, SpanSource, begins
from .prepared import read_note, save_array, stored
from .text import split_sentences, text_lines
from .workers import spread

_WHO = "ctxfast.training.BertCorpus"
_LOG = logging.getLogger(__name__)
_BATCH_LINES = 1024
SHARD_BYTES = 4 << 20  # of text


def vocabulary_of(tokenizer: BertTokenizer) -> Vocabulary:
    """What making instances needs to know of a tokenizer."""
    continues = frozenset(number for token, number in tokenizer.vocab.items() if token.startswith("##"))
    return Vocabulary(
        tokenizer.vocab_size, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id, continues
    )


def text_documents(files: Sequence[str | os.PathLike[str]], is_split: bool = False) -> Iterator[list[str]]:
    """Documents of text files (plain, .gz, .xz): lines, each a sentence or paragraph; a blank line ends a document.

    Args:
        files: text files, one after another; a file's end ends a document, too.
        is_split: lines are paragraphs, to be split into sentences (``split_sentences``).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line that is not UTF-8, by its number.
    """
    for file in files:
        lines: list[str] = []
        for line in text_lines(file):
            if line := line.strip():
                lines += split_sentences(line) if is_split else [line]
            elif lines:
                yield lines
                lines = []
        if lines:
            yield lines


@dataclass(frozen=True)
class Recipe:
    """How documents become sequences.

    Args:
        pairs: "next" (BERT's: the second segment follows or is another's), "order" (neighbours, swapped or not),
            "none" (one segment), "dialogue" (three turns, one of them replaced or not; lines are ``speaker<TAB>text``,
            or the speakers take turns).
        options: lengths, number of passes, share of masked tokens.
        knowledge: what is masked together; None for BERT's own masks.
        is_dynamic: masks are drawn when a sequence is read, others each epoch, and not stored.
        seed: of everything that is drawn.
        shard_bytes: text of a shard.
        is_split: lines of text are paragraphs, to be split into sentences.
    """

    pairs: str = "next"
    options: PairOptions = field(default_factory=PairOptions)
    knowledge: KnowledgeMasking | None = None
    is_dynamic: bool = False
    seed: int = 12345
    shard_bytes: int = SHARD_BYTES
    is_split: bool = False

    def __post_init__(self) -> None:
        if self.pairs not in bert_pairs.KINDS:
            raise ValueError(f"{_WHO}: pairs is {self.pairs!r}; expected one of {', '.join(bert_pairs.KINDS)}.")
        if self.pairs == "dialogue" and self.options.max_seq_length < 16:
            raise ValueError(f"{_WHO}: max_seq_length is {self.options.max_seq_length}; expected 16 for dialogues.")

    def mask(self, pair: Pair, vocabulary: Vocabulary, draw: random.Random) -> Instance:
        """A pair of coded ids with masks."""
        if self.knowledge is not None:
            return knowledge_masking.mask(pair, vocabulary, self.knowledge, draw)
        plain = Pair([code & ID_MASK for code in pair.ids], pair.first_length, pair.is_random_next, pair.types)
        return bert_instances.mask(plain, vocabulary, self.options, draw)

    def make(
        self, documents: Sequence[Document], vocabulary: Vocabulary, seed: int
    ) -> list[tuple[Pair, Instance | None]]:
        """All sequences of some documents, shuffled; with BERT's pairs and masks draw for draw as Google's."""
        draw = random.Random(seed)
        needs_others = self.pairs in ("next", "dialogue")
        corpus = [kept for document in documents if (kept := [sentence for sentence in document if sentence])]
        if len(corpus) < (2 if needs_others else 1):
            raise ValueError(
                f"{_WHO}: a shard has {len(corpus)} documents with text; expected at least 2, as what does not belong "
                "comes from another document. A blank line ends a document."
            )
        draw.shuffle(corpus)
        made = []
        for _ in range(self.options.dupe_factor):
            for index in range(len(corpus)):
                for pair in self._pairs(corpus, index, vocabulary, draw):
                    made.append((pair, None if self.is_dynamic else self.mask(pair, vocabulary, draw)))
        draw.shuffle(made)
        return made

    def _pairs(
        self, corpus: Sequence[Document], index: int, vocabulary: Vocabulary, draw: random.Random
    ) -> Iterator[Pair]:
        if self.pairs == "next":
            return bert_instances.pairs(corpus, index, vocabulary, self.options, draw)
        if self.pairs == "dialogue":
            return bert_pairs.dialogues(corpus, index, vocabulary, self.options, draw)
        make = bert_pairs.order_pairs if self.pairs == "order" else bert_pairs.segments
        return make(corpus[index], vocabulary, self.options, draw)


class _Shard:
    """Arrays of one shard, memory-mapped."""

    def __init__(self, path: Path) -> None:
        def load(name: str) -> np.ndarray:
            return _mapped(path / f"{name}.npy")

        self.codes, self.starts, self.firsts, self.others = map(load, ("codes", "starts", "firsts", "others"))
        self.types = load("types") if (path / "types.npy").is_file() else None
        self.is_masked = (path / "positions.npy").is_file()
        if self.is_masked:
            self.positions, self.replaced, self.mask_starts = map(load, ("positions", "replaced", "mask_starts"))

    @staticmethod
    def write(path: Path, made: list[tuple[Pair, Instance | None]]) -> None:
        def save(name: str, values: Any, dtype: Any) -> None:
            save_array(path / f"{name}.npy", np.asarray(values, dtype=dtype))

        def starts(lengths: list[int]) -> np.ndarray:
            return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

        save("codes", [code for pair, _ in made for code in pair.ids], np.int32)
        save("starts", starts([len(pair.ids) for pair, _ in made]), np.int64)
        save("firsts", [pair.first_length for pair, _ in made], np.int32)
        save("others", [pair.is_random_next for pair, _ in made], np.bool_)
        types = [pair.types for pair, _ in made if pair.types is not None]
        if types:
            save("types", [kind for own in types for kind in own], np.uint8)
        instances = [masked for _, masked in made if masked is not None]
        if instances:
            save("positions", [place for masked in instances for place in masked.positions], np.int32)
            save("replaced", [masked.ids[place] for masked in instances for place in masked.positions], np.int32)
            save("mask_starts", starts([len(masked.positions) for masked in instances]), np.int64)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def pair(self, index: int) -> Pair:
        """A stored sequence, its ids coded."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        types = None if self.types is None else self.types[part].tolist()
        return Pair(self.codes[part].tolist(), int(self.firsts[index]), bool(self.others[index]), types)

    def instance(self, index: int, pair: Pair) -> Instance:
        """The pair with its stored masks."""
        part = slice(int(self.mask_starts[index]), int(self.mask_starts[index + 1]))
        original = [code & ID_MASK for code in pair.ids]
        ids, positions = list(original), self.positions[part].tolist()
        for place, token in zip(positions, self.replaced[part].tolist()):
            ids[place] = token
        labels = [original[place] for place in positions]
        return Instance(ids, pair.first_length, pair.is_random_next, positions, labels, pair.types)


def _mapped(path: Path) -> np.ndarray:
    """A .npy file, memory-mapped. Not by numpy, whose maps each keep a file open: there may be thousands of shards."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    size = path.stat().st_size
    return (
        torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        .numpy()[start:]
        .view(dtype)
        .reshape(shape)
    )


class BertCorpus:
    """Prepared sequences.

    Args:
        directory: made by ``prepare``.
        vocabulary: of the tokenizer it was made with.
        recipe: it was made by.

    Attributes:
        lengths: (N,) tokens of every sequence.
    """

    def __init__(self, directory: str | os.PathLike[str], vocabulary: Vocabulary, recipe: Recipe) -> None:
        self.directory, self.vocabulary, self.recipe = Path(directory), vocabulary, recipe
        with stored(self.directory, _WHO):
            self._shards = [_Shard(path) for path in sorted(self.directory.glob("shard-*"))]
            self._ends = np.cumsum([len(shard) for shard in self._shards])
            self.lengths = np.concatenate([np.diff(shard.starts) for shard in self._shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.lengths.sum())

    @property
    def wrong_share(self) -> float:
        """Share of sequences whose segments do not belong together."""
        return sum(int(np.count_nonzero(shard.others)) for shard in self._shards) / len(self)

    def pair(self, index: int) -> Pair:
        """A sequence before masking, its ids coded."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._shards[shard].pair(index - (int(self._ends[shard - 1]) if shard else 0))

    def instance(self, index: int, epoch: int = 0) -> Instance:
        """A sequence with its masks: the stored ones, or those that seed, epoch and index draw."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        own = index - (int(self._ends[shard - 1]) if shard else 0)
        pair = self._shards[shard].pair(own)
        if self._shards[shard].is_masked:
            return self._shards[shard].instance(own, pair)
        draw = random.Random(f"{self.recipe.seed} {epoch} {index}")
        return self.recipe.mask(pair, self.vocabulary, draw)

    @classmethod
    def prepare(
        cls,
        directory: str | os.PathLike[str],
        files: Sequence[str | os.PathLike[str]],
        tokenizer: BertTokenizer,
        recipe: Recipe,
        *,
        sources: Sequence[SpanSource] = (),
        sources_name: Any = None,
        say: Callable[[str], None] | None = None,
        workers: int = 1,
    ) -> BertCorpus:
        """Read text into shards; shards that the same arguments made before are kept.

        Args:
            directory: of the shards.
            files: text files, read in this order.
            tokenizer: of the model.
            recipe: see there.
            sources: find spans of words, phrases and entities; see ``spans``.
            sources_name: plain values that tell one set of sources from another.
            say: called with a line a shard; None: the logger of this module, as information.
            workers: processes that make shards at the same time; what is in them does not depend on it. With more than
                1 the calling program must be guarded by ``if __name__ == "__main__"``, as Python starts them anew.

        Memory of each process: that of one shard's sequences as lists of numbers. With ten passes over the text and
        stored masks that is some 165 bytes for a byte of text: 700 MB for shards of 4 MB (2026-11-23).

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: no text, fewer documents than the recipe needs, whole words of a vocabulary that has none.
        """
        path = Path(directory)
        kind = type(tokenizer.backend.model).__name__
        if recipe.options.do_whole_word_mask and recipe.knowledge is None and kind != "WordPiece":
            raise ValueError(
                f"{_WHO}: do_whole_word_mask with a {kind} vocabulary; expected WordPiece, whose ## marks the pieces "
                "that go on with a word. Mask tokens, or words that a source finds (--masking word --segmented)."
            )
        vocabulary = vocabulary_of(tokenizer)
        meta = {
            "format": 2,
            "files": [[os.fspath(file), fingerprint(file)] for file in files if Path(file).is_file()],
            "tokenizer": hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest(),
            "recipe": asdict(recipe),
            "sources": sources_name,
        }
        meta = json.loads(json.dumps(meta))
        file = path / "meta.json"
        if read_note(path, file.name) != meta:
            path.parent.mkdir(parents=True, exist_ok=True)
            # With the note that tells they are ours: a kill must not leave shards without it.
            with replacing_folder(path) as temporary:
                (temporary / file.name).write_text(json.dumps(meta) + "\n", encoding="utf-8")
        clear_left(path)
        done = path / "complete.json"
        if not done.is_file():
            names = ", ".join(os.fspath(file) for file in files)
            make = _ShardMaker(path, names, tokenizer, vocabulary, recipe, tuple(sources))
            count = cls._write_shards(make, text_documents(files, recipe.is_split), workers, say)
            with replacing(done) as temporary:
                temporary.write_text(json.dumps({"shards": count}) + "\n", encoding="utf-8")
        return cls(path, vocabulary, recipe)

    @classmethod
    def _write_shards(
        cls, make: _ShardMaker, documents: Iterator[list[str]], workers: int, say: Callable[[str], None] | None
    ) -> int:
        count = 0

        def missing() -> Iterator[tuple[int, list[list[str]]]]:
            nonlocal count
            for count, group in enumerate(_groups(documents, make.recipe.shard_bytes), 1):
                if not make.target(count).exists():
                    yield count, group

        for line in spread(make, missing(), workers):
            (say or _LOG.info)(line)
        if count == 0:
            raise ValueError(f"{_WHO}: {make.names}: no text; expected lines of it.")
        pairs = make.recipe.pairs
        if not any(len(_Shard(shard)) for shard in make.path.glob("shard-*")):
            wanted = "three turns of two speakers or more" if pairs == "dialogue" else "two tokens or more"
            raise ValueError(
                f"{_WHO}: {make.names}: not one sequence of pairs {pairs!r}; expected documents of {wanted}."
            )
        return count


@dataclass(frozen=True)
class _ShardMaker:
    """Makes a shard of some documents; can be sent to another process."""

    path: Path
    names: str
    tokenizer: BertTokenizer
    vocabulary: Vocabulary
    recipe: Recipe
    sources: tuple[SpanSource, ...]

    def target(self, number: int) -> Path:
        """The folder of a shard, counted from 1."""
        return self.path / f"shard-{number - 1:05d}"

    def __call__(self, task: tuple[int, list[list[str]]]) -> str:
        """Writes the shard of this number and documents; what there is to say of it."""
        number, documents = task
        recipe = self.recipe
        read = _dialogues if recipe.pairs == "dialogue" else _tokenized
        # Words and what lies beyond them are units of flags; without sources they are the tokenizer's.
        coded = read(documents, self.tokenizer, self.sources, bool(self.sources) or recipe.knowledge is not None)
        try:
            made = recipe.make(coded, self.vocabulary, recipe.seed + number - 1)
        except ValueError as error:
            raise ValueError(f"{error} This is shard {number} of {self.names}.") from None
        with replacing_folder(self.target(number)) as temporary:
            _Shard.write(temporary, made)
        tokens = sum(len(pair.ids) for pair, _ in made)
        return f"shard {number}: {len(documents):,} documents, {len(made):,} sequences, {tokens:,} tokens"


def _groups(documents: Iterator[list[str]], size: int) -> Iterator[list[list[str]]]:
    """Documents together until they hold ``size`` bytes of text; what is left at the end joins the last group."""
    group: list[list[str]] = []
    before: list[list[str]] | None = None
    held = 0
    for document in documents:
        group.append(document)
        held += sum(len(line.encode()) for line in document)
        if held >= size and len(group) > 1:
            if before is not None:
                yield before
            before, group, held = group, [], 0
    if before is not None and (held < size // 2 or len(group) < 2):
        yield before + group
        return
    if before is not None:
        yield before
    if group:
        yield group


def _dialogues(
    documents: list[list[str]], tokenizer: BertTokenizer, sources: Sequence[SpanSource], has_flags: bool
) -> list[Document]:
    """Coded ids of every turn, the second speaker's marked."""
    said, is_second = zip(*map(bert_pairs.speakers, documents))
    coded = _tokenized(list(said), tokenizer, sources, has_flags)
    for turns, marks in zip(coded, is_second):
        for turn, mark in zip(turns, marks):
            if turn and mark:
                turn[0] |= SPEAKER << FLAG_SHIFT
    return coded


def _tokenized(
    documents: list[list[str]], tokenizer: BertTokenizer, sources: Sequence[SpanSource], has_flags: bool
) -> list[Document]:
    """Coded ids of every line, with flags of units or without."""
    lines = [line for document in documents for line in document]
    coded: list[list[int]] = []
    backend = tokenizer.backend
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True  # "[SEP]" in a text is punctuation and a word, as in Google's data
    try:
        for start in range(0, len(lines), _BATCH_LINES):
            part = lines[start : start + _BATCH_LINES]
            for line, found in zip(part, backend.encode_batch(part, add_special_tokens=False)):
                if not has_flags:
                    coded.append(found.ids)
                    continue
                flags = begins(Encoding(found, False), [span for source in sources for span in source.spans(line)])
                coded.append([token | flag << FLAG_SHIFT for token, flag in zip(found.ids, flags)])
    finally:
        backend.encode_special_tokens = before
    result, at = [], 0
    for document in documents:
        result.append(coded[at : at + len(document)])
        at += len(document)
    return result
