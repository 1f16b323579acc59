# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files (tokenizer.json, vocab.txt, vocab.json with merges.txt), opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece

from .config import read_json

_WHO = "ctxfast.BertTokenizer"
ROLES = ("pad", "unk", "cls", "sep", "mask")
# What a role's token is called where no file says so: BERT's names, then RoBERTa's.
_USUAL = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


def token_text(token: str | dict[str, Any]) -> str:
    """A special token's text, which files give plain or as an object."""
    return token if isinstance(token, str) else str(token["content"])


def find_special_tokens(tokenizer: Tokenizer, given: dict[str, str]) -> dict[str, str]:
    """Token of each role: the one given, else the usual one the vocabulary has."""
    found = {}
    for role in ROLES:
        if role in given:
            if tokenizer.token_to_id(given[role]) is None:
                raise ValueError(f"{_WHO}: the vocabulary has no {role} token {given[role]!r}")
            found[role] = given[role]
            continue
        usual = (token for token in _USUAL[role] if tokenizer.token_to_id(token) is not None)
        token = next(usual, None)
        if token is not None:
            found[role] = token
    if "pad" not in found:
        raise ValueError(f"{_WHO}: the vocabulary has no padding token; name it in special_tokens")
    return found


def read_settings(folder: Path) -> dict[str, Any]:
    """special_tokens_map.json under tokenizer_config.json."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings.update(read_json(folder / name, _WHO))
    return settings


def open_tokenizer(
    folder: Path,
    settings: dict[str, Any],
    named: str | None = None,
    *,
    do_lower_case: bool | None = None,
    max_word_chars: int | None = None,
) -> Tokenizer:
    """The tokenizer of a folder; arguments as `BertTokenizer.from_pretrained`.

    `settings` come from `read_settings`, and receive `do_lower_case` so that they can be saved.
    `named` is the one file to take.
    """
    if do_lower_case is not None:
        settings["do_lower_case"] = do_lower_case
    tokenizer = _open_file(folder, settings, named)
    _apply_wordpiece_settings(tokenizer, settings, do_lower_case, max_word_chars)
    return tokenizer


def _open_file(folder: Path, settings: dict[str, Any], named: str | None) -> Tokenizer:
    path = folder / (named if named and named.endswith(".json") else "tokenizer.json")
    if path.is_file() and (named is None or named == path.name):
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{_WHO}: {path} is damaged or no tokenizer file ({error})") from error
    path = folder / (named or "vocab.txt")
    if path.is_file():
        lower = settings.get("do_lower_case")
        if lower is None:
            name = folder.resolve().name.lower()
            lower = "uncased" in name or "cased" not in name
        return _wordpiece(path, bool(lower))
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if vocab.is_file() and merges.is_file():
        return _byte_level_bpe(vocab, merges, settings)
    raise FileNotFoundError(
        f"{_WHO}: {folder} has no tokenizer.json, no vocab.txt and no vocab.json with merges.txt. "
        "A SentencePiece model alone is not read: save it as tokenizer.json with Hugging Face's "
        "tokenizers first"
    )


def _wordpiece(path: Path, lower: bool) -> Tokenizer:
    """BERT's tokenizer from a list of word pieces: the line number is the id."""
    try:
        # newline="\n": other line separators may stand inside a piece.
        with open(path, encoding="utf-8", newline="\n") as file:
            vocab = {line.strip(" \t\r\n"): number for number, line in enumerate(file)}
    except UnicodeDecodeError as error:
        raise ValueError(f"{_WHO}: {path} is not UTF-8 ({error})") from error
    for token in ("[UNK]", "[CLS]", "[SEP]"):
        if token not in vocab:
            raise ValueError(f"{_WHO}: {path} has no {token}; expected one word piece a line")
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
            if token in vocab
        ]
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _byte_level_bpe(vocab: Path, merges: Path, settings: dict[str, Any]) -> Tokenizer:
    """RoBERTa's tokenizer from its two old files."""
    try:
        tokenizer = Tokenizer(BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{_WHO}: {vocab} or {merges} is damaged ({error})") from error
    for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>"):
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{_WHO}: {vocab} has no {token}")
        # <mask> takes the space before it, as in fairseq.
        tokenizer.add_special_tokens([AddedToken(token, lstrip=token == "<mask>", normalized=False, special=True)])
    add_prefix_space = bool(settings.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", tokenizer.token_to_id("</s>")),
        ("<s>", tokenizer.token_to_id("<s>")),
        trim_offsets=True,
        add_prefix_space=add_prefix_space,
    )
    return tokenizer


def _apply_wordpiece_settings(
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    do_lower_case: bool | None,
    max_word_chars: int | None,
) -> None:
    """Brings normaliser and word limit in line with tokenizer_config.json and the caller."""
    old = tokenizer.normalizer
    if isinstance(old, normalizers.BertNormalizer):
        lower, chinese = settings.get("do_lower_case"), settings.get("tokenize_chinese_chars")
        tokenizer.normalizer = normalizers.BertNormalizer(
            clean_text=old.clean_text,
            handle_chinese_chars=old.handle_chinese_chars if chinese is None else chinese,
            # Here null is a value of its own: strip accents when lower-casing.
            strip_accents=settings.get("strip_accents", old.strip_accents),
            lowercase=old.lowercase if lower is None else lower,
        )
    elif do_lower_case is not None:
        raise ValueError(f"{_WHO}: do_lower_case is {do_lower_case}; this tokenizer has no such setting, expected None")
    if max_word_chars is not None:
        if not isinstance(tokenizer.model, WordPiece):
            raise ValueError(
                f"{_WHO}: max_word_chars is {max_word_chars}; a {type(tokenizer.model).__name__} "
                "tokenizer has no such setting, expected None"
            )
        tokenizer.model.max_input_chars_per_word = max_word_chars
