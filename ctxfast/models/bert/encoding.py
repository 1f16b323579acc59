# SPDX-License-Identifier: Apache-2.0
"""A text as a tokenizer leaves it."""

from __future__ import annotations

from dataclasses import dataclass

import tokenizers


@dataclass(slots=True)
class TokenIds:
    """What a model is given of a text: ids and types of its tokens, special ones included."""

    ids: list[int]
    type_ids: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class Encoding:
    """Tokens of one text, of a pair, or of a list of words.

    Every property makes a new list when it is read; keep it if it is needed twice.
    """

    __slots__ = ("_backend", "_rust", "_single_type", "truncated")

    def __init__(
        self,
        rust: tokenizers.Encoding,
        single_type: bool,
        truncated: int = 0,
        backend: tokenizers.Tokenizer | None = None,
    ) -> None:
        self._rust = rust
        self._backend = backend
        self._single_type = single_type
        self.truncated = truncated
        """Number of tokens that were cut off to keep within `max_length`."""

    def __len__(self) -> int:
        return len(self._rust)

    def __repr__(self) -> str:
        cut = f", truncated={self.truncated}" if self.truncated else ""
        return f"Encoding({len(self)} tokens{cut}: {' '.join(self.tokens[:12])})"

    @property
    def ids(self) -> list[int]:
        """Vocabulary ids, special tokens included."""
        return self._rust.ids

    @property
    def type_ids(self) -> list[int]:
        """0 for the first text and 1 for the second; all 0 where the model has a single type."""
        return [0] * len(self) if self._single_type else self._rust.type_ids

    @property
    def tokens(self) -> list[str]:
        """The tokens as the vocabulary spells them."""
        # The library's own list has a token that takes the space beside it (<mask>) with that space.
        if self._backend is None:
            return self._rust.tokens
        return [self._backend.id_to_token(number) or "" for number in self._rust.ids]

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Start and end of each token in characters of its own text; (0, 0) for special ones."""
        return self._rust.offsets

    @property
    def word_ids(self) -> list[int | None]:
        """Number of the word each token comes from, None for special tokens.

        With `encode_words` it is the index in the list; a word that leaves no token (an empty
        one, a control character) does not occur. Each text of a pair counts from 0.
        """
        return self._rust.word_ids

    @property
    def sequence_ids(self) -> list[int | None]:
        """0 or 1 for the text a token comes from, None for special tokens."""
        return self._rust.sequence_ids

    @property
    def special_tokens_mask(self) -> list[int]:
        """1 where the tokenizer put in a special token, 0 elsewhere."""
        return self._rust.special_tokens_mask
