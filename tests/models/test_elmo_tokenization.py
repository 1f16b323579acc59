# SPDX-License-Identifier: Apache-2.0
"""ELMo's character ids: literal expectations, and the fast path against one word at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles.elmo_numpy import char_ids

import ctxfast
from ctxfast.models.elmo.tokenization import ElmoCharacterMapper, batch_to_ids, unique_words


def row(*symbols: int, width: int = 50) -> list[int]:
    """Literal ids with in-word padding after them."""
    return [*symbols, *[261] * (width - len(symbols))]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("cat", row(259, 100, 98, 117, 260)),
        ("", row(259, 260)),
        ("<S>", row(259, 257, 260)),
        ("</S>", row(259, 258, 260)),
        ("<s>", row(259, 61, 116, 63, 260)),
        ("é", row(259, 196, 170, 260)),
        ("中", row(259, 229, 185, 174, 260)),
        ("🙂", row(259, 241, 160, 154, 131, 260)),
        ("a\ud800b", row(259, 98, 99, 260)),  # half a surrogate pair has no bytes
        ("x" * 47, row(259, *[121] * 47, 260)),
        ("x" * 48, row(259, *[121] * 48, 260)),
        ("x" * 49, row(259, *[121] * 48, 260)),
        ("x" * 500, row(259, *[121] * 48, 260)),
        ("x" * 47 + "é", row(259, *[121] * 47, 196, 260)),  # cut inside the character
        (b"\xff\x00", row(259, 256, 1, 260)),
        (b"<S>", row(259, 257, 260)),
    ],
)
def test_ids_of_a_word(word: str | bytes, expected: list[int]) -> None:
    assert ElmoCharacterMapper().convert_word_to_char_ids(word) == expected
    assert char_ids(word, 50) == expected
    assert batch_to_ids([[word]])[0, 0].tolist() == expected


def test_added_tokens_go_before_everything_else() -> None:
    mapper = ElmoCharacterMapper(tokens_to_add={"[MASK]": 0, "<S>": 260})
    assert mapper.convert_word_to_char_ids("[MASK]") == row(259, 1, 260)
    assert mapper.convert_word_to_char_ids("<S>") == row(259, 261, 260)
    assert mapper.convert_word_to_char_ids("a") == row(259, 98, 260)


def test_other_word_lengths() -> None:
    assert ElmoCharacterMapper(max_characters=5).convert_word_to_char_ids("abcdef") == [259, 98, 99, 100, 260]
    assert ElmoCharacterMapper(max_characters=3).convert_word_to_char_ids("</S>") == [259, 258, 260]


def test_batch_is_padded_with_zero_rows() -> None:
    ids = ctxfast.batch_to_ids([["a", "bc", "a"], [], ["a"]])
    assert ids.shape == (3, 3, 50) and ids.dtype == torch.int64
    assert (ids > 0).any(-1).tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert ids[0, 0].equal(ids[0, 2]) and ids[0, 0].equal(ids[2, 0])
    assert ids[0, 1].tolist() == row(259, 99, 100, 260)


@pytest.mark.parametrize(("batch", "shape"), [([], (0, 0, 50)), ([[]], (1, 0, 50)), ([[], []], (2, 0, 50))])
def test_empty_batches(batch: list, shape: tuple[int, ...]) -> None:
    assert tuple(batch_to_ids(batch).shape) == shape


def test_a_large_batch_equals_one_word_at_a_time() -> None:
    random = np.random.default_rng(0)
    words = ["".join(chr(c) for c in random.integers(32, 1500, random.integers(0, 70))) for _ in range(60)]
    batch = [[words[i] for i in random.integers(0, 60, n)] for n in (5, 0, 31, 1, 12)]
    ids = batch_to_ids(batch, max_characters=33)
    for b, sentence in enumerate(batch):
        for t, word in enumerate(sentence):
            assert ids[b, t].tolist() == char_ids(word, 33)
        assert not ids[b, len(sentence) :].any()


def test_unique_words() -> None:
    words, index = unique_words([["b", "a", "b"], [], ["a", "c"]])
    assert words == ["b", "a", "c"]
    assert index.tolist() == [[1, 2, 1], [0, 0, 0], [2, 3, 0]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: batch_to_ids("a b"),
            TypeError,
            "ctxfast.batch_to_ids: batch is a str; expected a list of sentences, each a list of tokens.",
        ),
        (
            lambda: batch_to_ids([["a"], "a b"]),
            TypeError,
            "ctxfast.batch_to_ids: sentence 1 is a str; expected a list of tokens. Split it first, e.g. with .split().",
        ),
        (
            lambda: batch_to_ids([["a", 3]]),
            TypeError,
            "ctxfast.batch_to_ids: token 3 is a int; expected str or bytes.",
        ),
        (
            lambda: ElmoCharacterMapper(max_characters=2),
            ValueError,
            "ctxfast.ElmoCharacterMapper: max_characters is 2; expected 3 or more, a character between the two marks "
            "of a word.",
        ),
        (
            lambda: ElmoCharacterMapper({"x": 261}),
            ValueError,
            "ctxfast.ElmoCharacterMapper: tokens_to_add['x'] is 261; expected a symbol in 0..260, a row of the file's "
            "character table.",
        ),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
