# SPDX-License-Identifier: Apache-2.0
"""Text to token ids for BERT-family models, by the `tokenizers` library."""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from ..._core import transfer
from ..._core.files import replacing
from ..._core.texts import as_list, wrong_text
from .config import BertConfig, write_json
from .encoding import Encoding, TokenIds
from .tokenizer_files import ROLES, find_special_tokens, open_tokenizer
from .tokenizer_settings import read_settings
from .weights import find_config, resolve_model

_WHO = "ctxfast.BertTokenizer"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

Text = str | tuple[str, str]


class BertTokenizer:
    """Splits text into a model's tokens exactly as Hugging Face's fast tokenizers do.

    Use `from_pretrained`. Padding and truncation settings saved in a tokenizer.json are
    switched off: a text is cut only when a call says `truncation=True`.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; it is changed (padding and truncation off).
        special_tokens: token of each role "pad", "unk", "cls", "sep", "mask"; by default the
            usual names that the vocabulary has.
        max_length: longest sequence in tokens that the model takes; None for no limit.
        single_type: report every token as type 0 (models with one token type).
        special_in_text: whether "[MASK]" written in a text is the mask token, as Hugging Face
            has it, or plain characters, as in Google's code.
        truncation_side: "right" or "left": where a text that is too long is cut.

    Raises:
        ValueError: no padding token, or a special token that the vocabulary does not have.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        max_length: int | None = None,
        single_type: bool = False,
        special_in_text: bool = True,
        truncation_side: str = "right",
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = not special_in_text
        self.backend = tokenizer
        self.max_length = max_length
        self.single_type = single_type
        self.special_tokens = find_special_tokens(tokenizer, special_tokens or {})
        self._settings: dict[str, Any] = {}
        self._cut_side = truncation_side
        self.source: Path | None = None
        """The file with the vocabulary, where `from_pretrained` read one."""
        self._cutters: dict[tuple[bool, int], Tokenizer] = {}
        self._words_backend: Tokenizer | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike[str],
        *,
        do_lower_case: bool | None = None,
        max_length: int | None = None,
        max_word_chars: int | None = None,
        special_in_text: bool | None = None,
        download: bool = False,
    ) -> BertTokenizer:
        """Opens the tokenizer of a model.

        Takes the first of tokenizer.json, vocab.txt (WordPiece), vocab.json with merges.txt (byte-level BPE). Settings
        in tokenizer_config.json go before those in tokenizer.json, as in Hugging Face.

        Args:
            path_or_name, download: as `resolve_model`; the path of a tokenizer.json or vocab.txt also does.
            do_lower_case: lower-case and strip accents (WordPiece only). By default what the files say; for a lone
                vocab.txt False if the folder's name has "cased" but not "uncased" in it, else True.
            max_length: longest sequence; by default the smaller of `model_max_length` in
                tokenizer_config.json and the number of positions in the model's config.
            max_word_chars: words longer than this become the unknown token (WordPiece only);
                by default what the file says, else 100 as in Hugging Face. Google's code has 200.
            special_in_text: see the class; by default True unless the files say `split_special_tokens`.

        Raises:
            FileNotFoundError: no model, or no tokenizer file in it.
            ValueError: a damaged file, or an option that this kind of tokenizer does not have.

        Warns:
            UserWarning: the vocabulary has more entries than the model's word table; a setting of tokenizer.json that
                Hugging Face's class replaces; padding on the left, where it would move positions.
        """
        path = resolve_model(path_or_name, download=download)
        folder = path if path.is_dir() else path.parent
        named = path.name if path.is_file() and path.suffix in (".json", ".txt") else None
        settings = read_settings(folder)
        tokenizer = open_tokenizer(folder, settings, named, do_lower_case=do_lower_case, max_word_chars=max_word_chars)
        config = None
        if any((folder / name).is_file() for name in ("config.json", "bert_config.json")):
            config = BertConfig.from_json_file(find_config(folder))
        least = tokenizer.num_special_tokens_to_add(True) + 1
        if settings.max_length is not None and settings.max_length < least:
            raise ValueError(
                f"{_WHO}: model_max_length in {folder / 'tokenizer_config.json'} is {settings.max_length}; expected at "
                f"least {least}, special tokens included"
            )
        if max_length is None:
            known = [limit for limit in (settings.max_length, config and config.max_length) if limit is not None]
            max_length = min(known, default=None)
        if special_in_text is None:
            special_in_text = not settings.flag("split_special_tokens", False)
        result = cls(
            tokenizer,
            special_tokens=settings.names(*ROLES),
            max_length=max_length,
            single_type=config is not None and config.type_vocab_size == 1,
            special_in_text=special_in_text,
            truncation_side=settings.truncation_side or "right",
        )
        result._settings = settings.values
        result.source = settings.source
        if settings.padding_side == "left" and not (config is not None and config.is_roberta):
            warnings.warn(
                f"{_WHO}: the files of {folder} set padding_side to 'left', which is not followed: it would move the "
                f"positions of a text by what else is in its batch. Vectors are those of the text without padding; "
                f"Hugging Face's of a padded batch differ",
                stacklevel=2,
            )
        if config is not None and result.vocab_size > config.vocab_size:
            warnings.warn(
                f"{_WHO}: {folder} has token ids up to {result.vocab_size - 1}, but the model's "
                f"vocab_size is {config.vocab_size}; tokens beyond it cannot be embedded",
                stacklevel=2,
            )
        return result

    def __getstate__(self) -> dict[str, Any]:
        # The cut and word variants are made anew where they are needed.
        return {**self.__dict__, "_cutters": {}, "_words_backend": None}

    def __repr__(self) -> str:
        kind = type(self.backend.model).__name__
        return f"BertTokenizer({kind}, vocab_size={self.vocab_size}, max_length={self.max_length})"

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one: the rows a word table needs."""
        return max(self.backend.get_vocab().values(), default=-1) + 1

    @property
    def vocab(self) -> dict[str, int]:
        """A new dict of every token and its id."""
        return self.backend.get_vocab()

    @property
    def pad_token_id(self) -> int:
        """Id of the padding token."""
        return self._special_id("pad")

    @property
    def unk_token_id(self) -> int:
        """Id of the unknown token."""
        return self._special_id("unk")

    @property
    def cls_token_id(self) -> int:
        """Id of the token before a text ([CLS] or <s>)."""
        return self._special_id("cls")

    @property
    def sep_token_id(self) -> int:
        """Id of the token after a text ([SEP] or </s>)."""
        return self._special_id("sep")

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token."""
        return self._special_id("mask")

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        return frozenset(self._special_id(role) for role in self.special_tokens)

    def _special_id(self, role: str) -> int:
        if role not in self.special_tokens:
            raise ValueError(f"{_WHO}: the vocabulary has no {role} token")
        number = self.backend.token_to_id(self.special_tokens[role])
        assert number is not None  # looked up when the tokenizer was made
        return number

    def token_to_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary spells it; None if it is not there."""
        return self.backend.token_to_id(token)

    def tokens(self, ids: Sequence[int] | torch.Tensor) -> list[str | None]:
        """Tokens of a row of ids; None for an id the vocabulary does not have."""
        return [self.backend.id_to_token(int(i)) for i in ids]

    def decode(self, ids: Sequence[int] | torch.Tensor, *, skip_special: bool = True) -> str:
        """Text of a row of ids, as far as the vocabulary kept it."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def add_lower_case(self) -> None:
        """Lower-cases every text first, whatever the tokenizer's own files say (sentence-transformers' setting)."""
        old = self.backend.normalizer
        self.backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([] if old is None else [old])])
        self._cutters, self._words_backend = {}, None

    def tokenize(self, text: str) -> list[str]:
        """Tokens of a text without special ones and without a limit on length."""
        _checked([text], words=False)
        return Encoding(_run(self.backend.encode, text, add_special_tokens=False), False, 0, self.backend).tokens

    def encode(
        self, text: str, pair: str | None = None, *, max_length: int | None = None, truncation: bool = False
    ) -> Encoding:
        """Encodes one text, or two as a pair.

        Args:
            text: any string; lone surrogates count as U+FFFD.
            pair: the second text.
            max_length: limit in tokens, special ones included; by default the model's.
            truncation: cut what is beyond the limit, from the longer text of a pair first;
                the result's `truncated` counts the tokens lost.

        Raises:
            ValueError: longer than the limit without `truncation`, or a limit above the model's.
            TypeError: not a string.
        """
        return self._encode([text if pair is None else (text, pair)], max_length, truncation)[0]

    def encode_batch(
        self, texts: Sequence[Text], *, max_length: int | None = None, truncation: bool = False
    ) -> list[Encoding]:
        """Encodes many texts, or pairs given as tuples, on all cores; otherwise as `encode`."""
        return self._encode(texts, max_length, truncation)

    def encode_words(
        self, words: Sequence[str], *, max_length: int | None = None, truncation: bool = False
    ) -> Encoding:
        """Encodes a text that is split into words already; `word_ids` index into `words`."""
        return self._encode([words], max_length, truncation, words=True)[0]

    def encode_words_batch(
        self, texts: Sequence[Sequence[str]], *, max_length: int | None = None, truncation: bool = False
    ) -> list[Encoding]:
        """Encodes many texts that are split into words already."""
        return self._encode(texts, max_length, truncation, words=True)

    def batch(
        self,
        texts: Sequence[Text] | Sequence[Encoding | TokenIds],
        *,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int = 1,
        device: torch.device | str | None = None,
    ) -> dict[str, Any]:
        """Encodes texts, pairs, or takes encodings, and pads them on the right for a model's call.

        Args:
            device: where the model is. For a GPU tensors go through pinned memory, and nobody waits for anything: in
                place of a mask the batch has the texts' "lengths".

        Returns:
            "input_ids", "token_type_ids" and "attention_mask" (1 for tokens, 0 for padding), each
            (B, T) int64 with T the longest length rounded up to `pad_to_multiple_of`. With a `device` "lengths", a
            tuple of B ints, in place of "attention_mask".

        Raises:
            As `encode`.
        """
        if pad_to_multiple_of < 1:
            raise ValueError(f"{_WHO}: pad_to_multiple_of is {pad_to_multiple_of}; expected at least 1")
        given = list(texts)
        encodings = [text for text in given if isinstance(text, (Encoding, TokenIds))]
        if not given or len(encodings) < len(given):
            encodings = self._encode(given, max_length, truncation, offsets=False)
        lengths = np.fromiter((len(e) for e in encodings), np.int64, len(encodings))
        longest = int(lengths.max(initial=0))
        width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
        mask = np.arange(width) < lengths[:, None]
        result = {}
        for name, fill, rows in (
            ("input_ids", self.pad_token_id, (e.ids for e in encodings)),
            ("token_type_ids", 0, (e.type_ids for e in encodings)),
        ):
            array = np.full(mask.shape, fill, np.int64)
            flat = itertools.chain.from_iterable(rows)
            array[mask] = np.fromiter(flat, np.int64, int(lengths.sum()))
            result[name] = torch.from_numpy(array)
        if device is None:
            result["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
            return result
        place = torch.device(device)
        return {
            **{name: transfer.to_device(tensor, place) for name, tensor in result.items()},
            "lengths": tuple(lengths.tolist()),
        }

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Writes tokenizer.json and tokenizer_config.json and returns their paths."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "tokenizer.json"
        with replacing(path) as temporary:
            self.backend.save(str(temporary))
        # Added tokens lie in tokenizer.json, with all that is said of them.
        lists = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
        settings = {name: value for name, value in self._settings.items() if name not in lists}
        settings.update((f"{role}_token", token) for role, token in self.special_tokens.items())
        if self.max_length is not None:
            settings["model_max_length"] = self.max_length
        if self._cut_side != "right":
            settings["truncation_side"] = self._cut_side
        if isinstance(self.backend.model, WordPiece) and self.backend.model.max_input_chars_per_word != 100:
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # BERT's own takes no other limit from a file
        normalizer = self.backend.normalizer
        if isinstance(normalizer, normalizers.BertNormalizer):
            # Hugging Face has defaults of its own for what stands in tokenizer.json alone: it would lower-case.
            settings["do_lower_case"] = normalizer.lowercase
            settings["strip_accents"] = normalizer.strip_accents
            settings["tokenize_chinese_chars"] = normalizer.handle_chinese_chars
        write_json(directory / "tokenizer_config.json", settings)
        return [path, directory / "tokenizer_config.json"]

    def _encode(
        self,
        texts: Sequence[Any],
        max_length: int | None,
        truncation: bool,
        *,
        words: bool = False,
        offsets: bool = True,
    ) -> list[Encoding]:
        texts = _checked(texts, words)
        limit = self._limit(max_length)
        backend = self._backend_for_words() if words else self.backend
        call = backend.encode_batch if offsets else backend.encode_batch_fast
        rows = [list(text) for text in texts] if words else texts
        result = [Encoding(rust, self.single_type, 0, backend) for rust in _run(call, rows, is_pretokenized=words)]
        if limit is None:
            return result
        too_long = [i for i, encoding in enumerate(result) if len(encoding) > limit]
        if too_long and not truncation:
            i = too_long[0]
            raise ValueError(
                f"{_WHO}: text {i} has {len(result[i])} tokens; expected at most {limit}. "
                "Pass truncation=True to cut it, or split the text"
            )
        if too_long:
            cutter = self._cutter(backend, words, limit)
            cut = _run(cutter.encode_batch, [rows[i] for i in too_long], is_pretokenized=words)
            for i, rust in zip(too_long, cut, strict=True):
                result[i] = Encoding(rust, self.single_type, len(result[i]) - len(rust), backend)
        return result

    def _limit(self, max_length: int | None) -> int | None:
        if max_length is None:
            return self.max_length
        least = self.backend.num_special_tokens_to_add(True) + 1
        if max_length < least:
            raise ValueError(f"{_WHO}: max_length is {max_length}; expected at least {least}")
        if self.max_length is not None and max_length > self.max_length:
            raise ValueError(f"{_WHO}: max_length is {max_length}; the model takes at most {self.max_length} tokens")
        return max_length

    def _cutter(self, backend: Tokenizer, words: bool, limit: int) -> Tokenizer:
        """A copy with truncation on: the setting belongs to a tokenizer, not to a call."""
        key = (words, limit)
        if key not in self._cutters:
            cutter = _copy(backend)
            cutter.enable_truncation(limit, strategy="longest_first", direction=self._cut_side)
            self._cutters[key] = cutter
        return self._cutters[key]

    def _backend_for_words(self) -> Tokenizer:
        """The tokenizer for split text: byte-level BPE then needs a space before every word."""
        if self._words_backend is None:
            backend = self.backend
            stage = backend.pre_tokenizer
            if isinstance(stage, pre_tokenizers.ByteLevel) and not stage.add_prefix_space:
                backend = _copy(backend)
                backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=stage.use_regex)
            self._words_backend = backend
        return self._words_backend


def _copy(tokenizer: Tokenizer) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = tokenizer.encode_special_tokens
    return copy


def _checked(texts: Sequence[Any], words: bool) -> list[Any]:
    """The texts as a list, each of which is one."""
    if isinstance(texts, str):
        raise TypeError(f"{_WHO}: got one string; expected a list of texts. Use encode() for one")
    texts = as_list(texts, _WHO)
    if not words and all(type(text) is str for text in texts):
        return texts
    for i, text in enumerate(texts):
        if words:
            fits = isinstance(text, Sequence) and not isinstance(text, str)
            fits = fits and all(isinstance(word, str) for word in text)
            expected = "a list of words"
        else:
            fits = isinstance(text, str) or (
                isinstance(text, tuple) and len(text) == 2 and all(isinstance(t, str) for t in text)
            )
            expected = "a string or a tuple of two strings"
        if not fits:
            raise wrong_text(_WHO, i, texts, expected)
    return texts


def _run(call: Any, texts: Any, **options: Any) -> Any:
    """Calls the library; strings that are not valid Unicode (lone surrogates) are repaired first."""
    try:
        return call(texts, **options)
    except (TypeError, UnicodeEncodeError):
        # Only here, so that sound text is not scanned. One character for one keeps the offsets.
        return call(_mend(texts), **options)
    except Exception as error:  # the library raises plain Exception: a vocabulary without its unknown token, say
        raise ValueError(f"{_WHO}: the tokenizer fails on a text ({error})") from error


def _mend(texts: Any) -> Any:
    if isinstance(texts, str):
        return _LONE_SURROGATE.sub("\ufffd", texts)
    return type(texts)(_mend(text) for text in texts)
