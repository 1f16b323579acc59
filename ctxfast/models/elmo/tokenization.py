# SPDX-License-Identifier: Apache-2.0
"""Words to ELMo's character ids, as AllenNLP and bilm-tf make them.

A word is its UTF-8 bytes between a begin-of-word and an end-of-word mark, padded to a fixed number of characters.
Bytes have ids 1..256, then come five marks; 0 is kept for "no word", so a row of zeros is padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

MAX_CHARACTERS = 50
BEGIN_SENTENCE, END_SENTENCE = "<S>", "</S>"

# Every id is its symbol + 1.
BEGIN_SENTENCE_ID, END_SENTENCE_ID = 257, 258
BEGIN_WORD_ID, END_WORD_ID = 259, 260
PADDING_ID = 261
_MARKERS = {
    BEGIN_SENTENCE: BEGIN_SENTENCE_ID,
    END_SENTENCE: END_SENTENCE_ID,
    BEGIN_SENTENCE.encode(): BEGIN_SENTENCE_ID,
    END_SENTENCE.encode(): END_SENTENCE_ID,
}

Word = str | bytes


class ElmoCharacterMapper:
    """Words to rows of character ids.

    Args:
        tokens_to_add: word -> symbol 0..260; such a word becomes this one symbol between the word marks.
        max_characters: length of a row, marks included; bytes past ``max_characters - 2`` are cut, even inside a
            multi-byte character. 50 in every public model.

    Raises:
        ValueError: ``max_characters`` below 3, or a symbol outside 0..260.
    """

    def __init__(self, tokens_to_add: Mapping[str, int] | None = None, max_characters: int = MAX_CHARACTERS) -> None:
        if max_characters < 3:
            raise ValueError(
                f"ctxfast.ElmoCharacterMapper: max_characters is {max_characters!r}; expected 3 or more, a character "
                f"between the two marks of a word."
            )
        self.max_characters = max_characters
        self.tokens_to_add = dict(tokens_to_add or {})
        for word, symbol in self.tokens_to_add.items():
            if not 0 <= symbol < PADDING_ID:
                raise ValueError(
                    f"ctxfast.ElmoCharacterMapper: tokens_to_add[{word!r}] is {symbol!r}; expected a symbol in "
                    f"0..{PADDING_ID - 1}, a row of the file's character table."
                )
        self._single = {**_MARKERS, **{word: symbol + 1 for word, symbol in self.tokens_to_add.items()}}

    def convert_word_to_char_ids(self, word: Word) -> list[int]:
        """The ids of one word, ``max_characters`` of them."""
        return self.rows([word])[0].tolist()

    def rows(self, words: Sequence[Word]) -> np.ndarray:
        """(W, max_characters) int64, one row a word.

        Raises:
            TypeError: a word that is neither str nor bytes.
        """
        single = self._single
        codes: list[bytes] = []
        symbols: list[tuple[int, int]] = []
        for index, word in enumerate(words):
            if word in single:
                symbols.append((index, single[word]))
                codes.append(b"\0")
            elif isinstance(word, str):
                codes.append(word.encode("utf-8", "ignore")[: self.max_characters - 2])
            elif isinstance(word, bytes):
                codes.append(word[: self.max_characters - 2])
            else:
                raise TypeError(
                    f"ctxfast.batch_to_ids: token {word!r} is a {type(word).__name__}; expected str or bytes."
                )
        lengths = np.fromiter(map(len, codes), dtype=np.int64, count=len(codes))
        table = np.full((len(codes), self.max_characters), PADDING_ID, dtype=np.int64)
        table[:, 0] = BEGIN_WORD_ID
        flat = np.frombuffer(b"".join(codes), dtype=np.uint8)
        starts = np.cumsum(lengths) - lengths
        columns = np.arange(len(flat)) - np.repeat(starts, lengths) + 1
        table[np.repeat(np.arange(len(codes)), lengths), columns] = flat.astype(np.int64) + 1
        table[np.arange(len(codes)), lengths + 1] = END_WORD_ID
        for index, symbol in symbols:
            table[index, 1] = symbol
        return table


def _check_batch(batch: Sequence[Sequence[Word]]) -> None:
    if isinstance(batch, (str, bytes)):
        raise TypeError(
            f"ctxfast.batch_to_ids: batch is a {type(batch).__name__}; expected a list of sentences, each a list of "
            f"tokens."
        )
    for index, sentence in enumerate(batch):
        if isinstance(sentence, (str, bytes)):
            raise TypeError(
                f"ctxfast.batch_to_ids: sentence {index} is a {type(sentence).__name__}; expected a list of tokens. "
                f"Split it first, e.g. with .split()."
            )


def unique_words(batch: Sequence[Sequence[Word]]) -> tuple[list[Word], np.ndarray]:
    """Words of a batch without repetition, and where they stand.

    Args:
        batch: B sentences of tokens.

    Returns:
        The words in the order first seen, and (B, Tmax) int64: k + 1 where ``words[k]`` stands, 0 for padding.
    """
    _check_batch(batch)
    known: dict[Word, int] = {}
    ids = [known.setdefault(word, len(known) + 1) for sentence in batch for word in sentence]
    lengths = np.fromiter(map(len, batch), dtype=np.int64, count=len(batch))
    index = np.zeros((len(batch), int(lengths.max(initial=0))), dtype=np.int64)
    index[np.arange(index.shape[1]) < lengths[:, None]] = ids
    return list(known), index


def batch_to_ids(
    batch: Sequence[Sequence[Word]],
    *,
    tokens_to_add: Mapping[str, int] | None = None,
    max_characters: int = MAX_CHARACTERS,
    mapper: ElmoCharacterMapper | None = None,
) -> Tensor:
    """Sentences of tokens to padded character ids.

    Args:
        batch: B sentences, each a list of tokens (str, or bytes taken as they are). ``<S>`` and ``</S>`` are the
            sentence marks; the model adds its own, so they are not needed.
        tokens_to_add, max_characters: see ``ElmoCharacterMapper``.
        mapper: a mapper to use in place of these two.

    Returns:
        (B, Tmax, max_characters) int64 on the CPU, zeros past a sentence's end.

    Raises:
        TypeError: a sentence that is a string, a token that is neither str nor bytes.

    Reference: AllenNLP's batch_to_ids and ELMoCharacterMapper.
    """
    words, index = unique_words(batch)
    mapper = mapper or ElmoCharacterMapper(tokens_to_add, max_characters)
    padding = np.zeros((1, mapper.max_characters), dtype=np.int64)
    return torch.from_numpy(np.concatenate([padding, mapper.rows(words)])[index])


def lazy_batches(sentences: Iterable[Sequence[Word]], batch_size: int) -> Iterable[list]:
    """Lists of up to ``batch_size`` sentences, in order."""
    batch: list = []
    for sentence in sentences:
        batch.append(sentence)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch
