# SPDX-License-Identifier: Apache-2.0
"""What stands beside a vocabulary: tokenizer_config.json, special_tokens_map.json and added_tokens.json, checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from .config import read_json

_WHO = "ctxfast.BertTokenizer"
ROLES = ("pad", "unk", "cls", "sep", "mask")
# Hugging Face's tokenizer classes, without "Fast", by what they build. The last kind is tokenizer.json as it stands.
_KINDS = {
    "wordpiece": (
        *("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer", "LayoutLMTokenizer"),
        *("ConvBertTokenizer", "SqueezeBertTokenizer", "DPRQuestionEncoderTokenizer", "DPRContextEncoderTokenizer"),
    ),
    "mpnet": ("MPNetTokenizer",),
    "bpe": ("RobertaTokenizer", "LongformerTokenizer", "BartTokenizer", "LEDTokenizer"),
    "unigram": ("XLMRobertaTokenizer", "CamembertTokenizer"),
    "file": ("PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "PythonBackend"),
}
_KIND_OF_MODEL = {
    **{"bert": "wordpiece", "ernie": "wordpiece", "distilbert": "wordpiece", "electra": "wordpiece"},
    **{"roberta": "bpe", "data2vec-text": "bpe", "xlm-roberta": "unigram", "camembert": "unigram", "mpnet": "mpnet"},
}
# model_max_length is 1e30 in files that mean "no limit".
_NO_LIMIT = 1_000_000
_FLAGS = ("do_lower_case", "tokenize_chinese_chars", "strip_accents", "add_prefix_space", "trim_offsets")
_FLAGS += ("split_special_tokens",)
_SURROGATE = re.compile("[\ud800-\udfff]")
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass
class Settings:
    """What the files beside a vocabulary say.

    Attributes:
        values: tokenizer_config.json, and special_tokens_map.json over it; to be saved again.
        kind: what is built: "wordpiece", "mpnet" (word pieces under RoBERTa's special tokens), "bpe", "unigram", "file"
            for tokenizer.json as it stands; None where no file names a class or a type of model.
        added: tokens that were added to the vocabulary, by the ids that the files give them.
        has_decoder: whether they come from added_tokens_decoder, which goes before tokenizer.json, too.
        special: tokens with a name such as "cls_token"; None for a name that is null.
        extra: special tokens without a name.
        max_length: `model_max_length`; None for no limit.
        truncation_side, padding_side: "right" or "left"; None where no file says it.
        source: the file that held the vocabulary, once it is opened.
    """

    values: dict[str, Any] = field(default_factory=dict)
    kind: str | None = None
    added: dict[int, AddedToken] = field(default_factory=dict)
    has_decoder: bool = False
    special: dict[str, AddedToken | None] = field(default_factory=dict)
    extra: list[AddedToken] = field(default_factory=list)
    max_length: int | None = None
    truncation_side: str | None = None
    padding_side: str | None = None
    source: Path | None = None

    def flag(self, name: str, default: bool | None) -> bool | None:
        """A setting that is true or false; where null is a value of its own (strip_accents) it is kept."""
        value = self.values.get(name, default)
        return default if value is None and name != "strip_accents" else value

    def names(self, *roles: str) -> dict[str, str]:
        """Texts of the tokens of roles such as "pad", as far as the files name them."""
        named = {role: self.special.get(f"{role}_token") for role in roles}
        return {role: token.content for role, token in named.items() if token is not None}

    def name(self, role: str, default: str) -> str:
        """Text of a special token such as "unk_token"."""
        token = self.special.get(role)
        return default if token is None else token.content


def read_settings(folder: Path) -> Settings:
    """Reads the files beside a vocabulary as Hugging Face's AutoTokenizer does.

    Raises:
        ValueError: a damaged file, a value of a wrong type, or a tokenizer class that is not followed here.
    """
    path, old = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config = _read(path)
    _check(config, path)
    # added_tokens_decoder is the newer form: with it the older files are not looked at.
    has_decoder = "added_tokens_decoder" in config
    named = {} if has_decoder else _read(old)
    _check(named, old)
    settings = Settings(values={**config, **named}, has_decoder=has_decoder)
    for name, value in settings.values.items():
        if name.endswith("_token") and (value is None or isinstance(value, (str, dict))):
            settings.special[name] = None if value is None else _token(value, name, path, special=True)
    late = _read_extra(settings, config, path, named, old)
    if has_decoder:
        settings.added = _decoder(config["added_tokens_decoder"], path)
    else:
        settings.added = _added_tokens(folder / "added_tokens.json", settings)
    settings.extra = settings.extra if late is None else late
    settings.kind = _kind(folder, config)
    limit = settings.values.get("model_max_length", settings.values.get("max_len"))
    if limit is not None:
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 1:
            raise _wrong("model_max_length", limit, "a positive number", path)
        settings.max_length = int(limit) if limit < _NO_LIMIT else None
    for name in ("truncation_side", "padding_side"):
        side = settings.values.get(name)
        if side not in (None, "left", "right"):
            raise _wrong(name, side, "'left' or 'right'", path)
        setattr(settings, name, side)
    return settings


def _wrong(name: str, got: object, expected: str, path: Path) -> ValueError:
    return ValueError(f"{_WHO}: {name} in {path} is {got!r:.80}; expected {expected}")


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json(path, _WHO)
    except (OSError, ValueError, RecursionError) as error:
        if str(error).startswith(_WHO):
            raise
        raise ValueError(f"{_WHO}: {path} is damaged ({type(error).__name__}: {error})") from error


def _check(values: dict[str, Any], path: Path) -> None:
    for name in _FLAGS:
        if values.get(name) is not None and not isinstance(values[name], bool):
            raise _wrong(name, values[name], "true or false", path)
    for role in (*ROLES, "bos", "eos"):
        value = values.get(f"{role}_token")
        if value is not None:
            _token(value, f"{role}_token", path)
    if "fast_tokenizer_files" in values:
        raise _wrong("fast_tokenizer_files", values["fast_tokenizer_files"], "one tokenizer.json", path)


def _token(value: object, name: str, path: Path, **flags: bool) -> AddedToken:
    """A token that a file gives plain or as an object."""
    if isinstance(value, str) and _is_text(value):
        return AddedToken(value, **flags)
    if isinstance(value, dict) and _is_text(value.get("content")):
        known = {key: value[key] for key in _TOKEN_FLAGS if key in value}
        if all(isinstance(flag, bool) for flag in known.values()):
            return AddedToken(value["content"], **{**known, **flags})
    raise _wrong(name, value, "a token's text, or an object with its 'content'", path)


def _is_text(value: object) -> bool:
    """Whether it is a string, not empty, that can be written down (no half of a surrogate pair)."""
    return isinstance(value, str) and bool(value) and not _SURROGATE.search(value)


def _decoder(value: object, path: Path) -> dict[int, AddedToken]:
    if not isinstance(value, dict):
        raise _wrong("added_tokens_decoder", value, "an object of ids and tokens", path)
    tokens = {}
    for number, token in value.items():
        if not number.isascii() or not number.isdigit() or len(number) > 9 or not isinstance(token, dict):
            raise _wrong("added_tokens_decoder", {number: token}, "an object of ids and tokens", path)
        tokens[int(number)] = _token(token, f"added_tokens_decoder[{number}]", path)
    return tokens


def _added_tokens(path: Path, settings: Settings) -> dict[int, AddedToken]:
    special = {*settings.names(*ROLES, "bos", "eos").values(), *(token.content for token in settings.extra)}
    tokens = {}
    for text, number in _read(path).items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 1 << 31 or not _is_text(text):
            raise _wrong(repr(text), number, "an id", path)
        is_special = text in special
        tokens[number] = AddedToken(text, normalized=not is_special, special=is_special)
    return tokens


def _read_extra(
    settings: Settings, config: dict[str, Any], path: Path, named: dict[str, Any], old: Path
) -> list[AddedToken] | None:
    """Special tokens beside those with a role: additional_special_tokens, since version 5 extra_special_tokens.

    Either is a list; the newer may be an object of names and tokens. The older name in tokenizer_config.json stands for
    the newer where that is not there. Otherwise it counts only where no list has the newer name in the end, and
    added_tokens.json is read as if it were not there: it is returned.
    """

    def tokens(values: dict[str, Any], kind: str, file: Path) -> list[AddedToken] | None:
        name = f"{kind}_special_tokens"
        value = values.get(name)
        if isinstance(value, dict) and kind == "extra":
            for role, token in value.items():
                settings.special[role] = _token(token, f"{name}.{role}", file, special=True)
            return None
        if value is not None and not isinstance(value, list):
            raise _wrong(name, value, "a list of tokens", file)
        return None if value is None else [_token(token, name, file, special=True) for token in value]

    extra, older = tokens(config, "extra", path), tokens(config, "additional", path)
    if not config.get("extra_special_tokens"):
        extra, older = older, None
    more, latest = tokens(named, "extra", old), tokens(named, "additional", old)
    if isinstance(named.get("extra_special_tokens"), dict):
        extra = None  # its names take the place of the list
    elif more is not None:
        texts = {token.content for token in extra or ()}
        extra = [*(extra or ()), *(token for token in more if token.content not in texts)]
    settings.extra = extra or []
    late = older if latest is None else latest
    return late if extra is None else None


def _kind(folder: Path, config: dict[str, Any]) -> str | None:
    """What is built, by the class that the files name, else by the model's type."""
    path = folder / "tokenizer_config.json"
    auto_map = config.get("auto_map")
    if auto_map is not None and (not isinstance(auto_map, dict) or auto_map.get("AutoTokenizer") is not None):
        raise ValueError(
            f"{_WHO}: {path} names code of its own for the tokenizer (auto_map); no code of a folder is run here. Save "
            f"the tokenizer as tokenizer.json, and remove auto_map"
        )
    model = _read(folder / "config.json")
    name = config.get("tokenizer_class")
    if name is None:
        name, path = model.get("tokenizer_class"), folder / "config.json"
    if name is None:
        return _KIND_OF_MODEL.get(model["model_type"]) if isinstance(model.get("model_type"), str) else None
    plain = name.removesuffix("Fast") if isinstance(name, str) else name
    for kind, names in _KINDS.items():
        if plain in names or name in names:
            return kind
    raise ValueError(
        f"{_WHO}: tokenizer_class in {path} is {name!r:.80}; expected one of "
        f"{', '.join(name for names in _KINDS.values() for name in names)}. If tokenizer.json beside it is all that "
        f"this class does, name PreTrainedTokenizerFast there"
    )
