# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files (tokenizer.json, vocab.txt, vocab.json with merges.txt), opened as Hugging Face's classes do."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece

from .tokenizer_settings import ROLES, Settings

_WHO = "ctxfast.BertTokenizer"
# What a role's token is called where no file says so: BERT's names, then RoBERTa's.
_USUAL = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}


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


def open_tokenizer(
    folder: Path,
    settings: Settings,
    named: str | None = None,
    *,
    do_lower_case: bool | None = None,
    max_word_chars: int | None = None,
) -> Tokenizer:
    """The tokenizer of a folder; arguments as `BertTokenizer.from_pretrained`.

    `settings` come from `read_settings`, and receive `do_lower_case` so that they can be saved.
    `named` is the one file to take. Whatever goes wrong inside the library becomes a ValueError that names the file.
    """
    if do_lower_case is not None:
        settings.values["do_lower_case"] = do_lower_case
    path = _find(folder, settings, named)
    try:
        tokenizer = _open(path, settings)
        if settings.truncation_side is None and tokenizer.truncation is not None:
            settings.truncation_side = tokenizer.truncation["direction"]
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _add_tokens(tokenizer, settings, path)
        tokenizer.encode("a", "b")  # what the file's parts name may be missing
        find_special_tokens(tokenizer, settings.names())
    except BaseException as error:  # the library raises plain Exception, and panics that are not even that
        text = str(error)
        if isinstance(error, (KeyboardInterrupt, SystemExit)) or (text.startswith("ctxfast.") and str(path) in text):
            raise
        reason = text.removeprefix(f"{_WHO}: ")[:300]
        raise ValueError(f"{_WHO}: {path} is damaged or no tokenizer file ({reason})") from error
    settings.source = path
    if do_lower_case is not None and not isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        raise ValueError(f"{_WHO}: do_lower_case is {do_lower_case}; this tokenizer has no such setting, expected None")
    if max_word_chars is not None:
        if not isinstance(tokenizer.model, WordPiece):
            raise ValueError(
                f"{_WHO}: max_word_chars is {max_word_chars}; a {type(tokenizer.model).__name__} "
                "tokenizer has no such setting, expected None"
            )
        tokenizer.model.max_input_chars_per_word = max_word_chars
    return tokenizer


def _find(folder: Path, settings: Settings, named: str | None) -> Path:
    """The file that holds the vocabulary."""
    if named is not None:
        return folder / named
    names = {"wordpiece": ("vocab.txt",), "bpe": ("vocab.json",), None: ("vocab.txt", "vocab.json")}
    wanted = ("tokenizer.json", *names.get(settings.kind, ()))
    for name in wanted:
        if (folder / name).is_file() and (name != "vocab.json" or (folder / "merges.txt").is_file()):
            return folder / name
    if settings.kind is None:
        wanted_text = "no tokenizer.json, no vocab.txt and no vocab.json with merges.txt"
    else:
        wanted_text = "no " + " and no ".join(wanted).replace("vocab.json", "vocab.json with merges.txt")
        wanted_text += f", as its tokenizer class or model type asks ({settings.kind})"
    raise FileNotFoundError(
        f"{_WHO}: {folder} has {wanted_text}. A SentencePiece model or a vocabulary of another kind is not read: save "
        "it as tokenizer.json with Hugging Face's tokenizers first"
    )


def _open(path: Path, settings: Settings) -> Tokenizer:
    if path.suffix == ".txt":
        tokenizer = Tokenizer(_word_pieces(path, settings))
        _make_wordpiece(tokenizer, settings, _lower_by_name(path.parent))
        return tokenizer
    if path.name == "vocab.json":
        tokenizer = Tokenizer(BPE.from_file(str(path), str(path.parent / "merges.txt")))
        _make_byte_level(tokenizer, settings, path)
        return tokenizer
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.post_processor is not None:
        _check_template(json.loads(tokenizer.post_processor.__getstate__()), path)
    before = _portrait(tokenizer)
    if settings.kind == "wordpiece" and isinstance(tokenizer.model, WordPiece):
        _make_wordpiece(tokenizer, settings, True)
    elif settings.kind == "bpe" and isinstance(tokenizer.model, BPE):
        _make_byte_level(tokenizer, settings, path)
    elif settings.kind is None and isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        _set_normalizer(tokenizer, settings, tokenizer.normalizer)
    changes = [name for name, value in _portrait(tokenizer).items() if value != before[name]]
    # What the settings say goes before the file; where they are silent the class's own defaults do, which is odd.
    stated = {"normalizer": ("do_lower_case", "strip_accents", "tokenize_chinese_chars")}
    stated.update(pre_tokenizer=("add_prefix_space",), post_processor=("cls_token", "sep_token", "add_prefix_space"))
    changes = [name for name in changes if not any(key in settings.values for key in stated.get(name, ()))]
    if changes:
        warnings.warn(
            f"{_WHO}: {path} has its own {' and '.join(changes)}, which Hugging Face's class for this model replaces "
            f"by its default, and so does this one. Set do_lower_case or add_prefix_space in tokenizer_config.json, or "
            f"tokenizer_class to PreTrainedTokenizerFast to keep the file's",
            stacklevel=4,
        )
    return tokenizer


def _check_template(state: dict[str, Any], path: Path) -> None:
    """Raise ValueError for a template with tokens that it does not define: the library panics over them, loudly."""
    for part in state.get("processors", ()):
        _check_template(part, path)
    for piece in (*state.get("single", ()), *state.get("pair", ())):
        token = piece.get("SpecialToken", {}).get("id") if isinstance(piece, dict) else None
        if token is not None and token not in state.get("special_tokens", ()):
            raise ValueError(f"{_WHO}: {path} is damaged: its post_processor uses {token!r} without defining it")


def _portrait(tokenizer: Tokenizer) -> dict[str, object]:
    """What a class may replace, in a form that can be compared."""
    pair = tokenizer.encode("a", "b") if tokenizer.post_processor is not None else None
    parts = {"normalizer": tokenizer.normalizer, "pre_tokenizer": tokenizer.pre_tokenizer}
    states = {name: None if part is None else part.__getstate__() for name, part in parts.items()}
    return {**states, "post_processor": pair and (pair.ids, pair.special_tokens_mask)}


def _lower_by_name(folder: Path) -> bool:
    """Google's released folders say in their names whether they keep case."""
    name = folder.resolve().name.lower()
    return "uncased" in name or "cased" not in name


def _word_pieces(path: Path, settings: Settings) -> WordPiece:
    """BERT's list of word pieces: the line number is the id."""
    try:
        # newline="\n": other line separators may stand inside a piece.
        with open(path, encoding="utf-8", newline="\n") as file:
            vocab = {line.strip(" \t\r\n"): number for number, line in enumerate(file)}
    except UnicodeDecodeError as error:
        raise ValueError(f"{_WHO}: {path} is not UTF-8 ({error})") from error
    for role in ("unk", "cls", "sep"):
        token = settings.name(f"{role}_token", _USUAL[role][0])
        if token not in vocab:
            raise ValueError(f"{_WHO}: {path} has no {token}; expected one word piece a line")
    return WordPiece(vocab, unk_token=settings.name("unk_token", "[UNK]"), max_input_chars_per_word=100)


def _make_wordpiece(tokenizer: Tokenizer, settings: Settings, lower: bool) -> None:
    """Everything around the vocabulary as Hugging Face's BertTokenizer has it; ``lower`` where no file says it."""
    unk = settings.name("unk_token", "[UNK]")
    if tokenizer.token_to_id(unk) is not None:
        tokenizer.model.unk_token = unk
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=settings.flag("tokenize_chinese_chars", True),
        strip_accents=settings.flag("strip_accents", None),
        lowercase=settings.flag("do_lower_case", lower),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    cls, sep = settings.name("cls_token", "[CLS]"), settings.name("sep_token", "[SEP]")
    ids = [(token, tokenizer.token_to_id(token)) for token in (cls, sep)]
    if all(number is not None for _, number in ids):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[f"{cls}:0", "$A:0", f"{sep}:0"],
            pair=[f"{cls}:0", "$A:0", f"{sep}:0", "$B:1", f"{sep}:1"],
            special_tokens=ids,
        )


def _set_normalizer(tokenizer: Tokenizer, settings: Settings, old: normalizers.BertNormalizer) -> None:
    """Where no file names a class: only what the settings say goes before tokenizer.json."""
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=old.clean_text,
        handle_chinese_chars=settings.flag("tokenize_chinese_chars", old.handle_chinese_chars),
        # Here null is a value of its own: strip accents when lower-casing.
        strip_accents=settings.flag("strip_accents", old.strip_accents),
        lowercase=settings.flag("do_lower_case", old.lowercase),
    )


def _make_byte_level(tokenizer: Tokenizer, settings: Settings, path: Path) -> None:
    """Everything around the vocabulary as Hugging Face's RobertaTokenizer has it."""
    cls, sep = settings.name("cls_token", "<s>"), settings.name("sep_token", "</s>")
    for token in (cls, sep, settings.name("pad_token", "<pad>"), settings.name("unk_token", "<unk>")):
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{_WHO}: {path} has no {token}")
    add_prefix_space = bool(settings.flag("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (sep, tokenizer.token_to_id(sep)),
        (cls, tokenizer.token_to_id(cls)),
        trim_offsets=bool(settings.flag("trim_offsets", True)),
        add_prefix_space=add_prefix_space,
    )


def _add_tokens(tokenizer: Tokenizer, settings: Settings, path: Path) -> None:
    """Added and special tokens, in Hugging Face's order: it gives new ones the ids after the vocabulary's last."""
    known = tokenizer.get_added_tokens_decoder().values()
    texts, forms = {token.content for token in known}, {repr(token) for token in known}
    new = [token for token in settings.added.values() if repr(token) not in forms]
    texts.update(token.content for token in new)
    named = {token.content for token in settings.special.values() if token is not None}
    for token in new:
        token.special = token.special or token.content in named
    kind = settings.kind or {"vocab.txt": "wordpiece", "vocab.json": "bpe"}.get(path.name)
    defaults = []
    if kind in ("wordpiece", "bpe"):  # a class's own names count where the vocabulary has them
        usual = {role: _USUAL[role][kind == "bpe"] for role in ROLES if f"{role}_token" not in settings.special}
        defaults = [
            AddedToken(text, special=True) for text in usual.values() if tokenizer.token_to_id(text) is not None
        ]
    roles = [f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    names = [*(name for name in roles if name in settings.special), *(n for n in settings.special if n not in roles)]
    for token in (*(settings.special[name] for name in names), *defaults, *settings.extra):
        if token is not None and token.content not in texts:
            texts.add(token.content)
            new.append(token)
    tokenizer.add_tokens(new)
    moved = {
        token.content: number
        for number, token in settings.added.items()
        if tokenizer.token_to_id(token.content) != number
    }
    if moved:
        text, number = next(iter(moved.items()))
        warnings.warn(
            f"{_WHO}: the files of {path.parent} give the added token {text!r} the id {number}; it has "
            f"{tokenizer.token_to_id(text)} here, as in Hugging Face, which numbers such tokens itself",
            stacklevel=4,
        )
