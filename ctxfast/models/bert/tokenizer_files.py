# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files (tokenizer.json, vocab.txt, vocab.json with merges.txt), opened as Hugging Face's classes do."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram, WordPiece

from .tokenizer_settings import ROLES, Settings

_WHO = "ctxfast.BertTokenizer"
# What the classes of a kind have for a vocabulary.
_MODELS = {"wordpiece": WordPiece, "mpnet": WordPiece, "bpe": BPE, "unigram": Unigram}
# What a role's token is called where no file says so: BERT's names, then RoBERTa's.
_USUAL = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
# What the classes of a kind call them.
_OF_ROBERTA = {"bos_token": "<s>", "eos_token": "</s>"} | {f"{role}_token": each[1] for role, each in _USUAL.items()}
_CLASS_NAMES = {
    "wordpiece": {f"{role}_token": names[0] for role, names in _USUAL.items()},
    "mpnet": _OF_ROBERTA | {"unk_token": "[UNK]"},
    "bpe": _OF_ROBERTA,
}


# Settings of a vocabulary's model that the classes of a kind take from no file. BPE's last ones they leave out: off.
_WORDPIECE = {"max_input_chars_per_word": 100, "continuing_subword_prefix": "##"}
_MODEL_SETTINGS = {
    "wordpiece": _WORDPIECE,
    "mpnet": _WORDPIECE,
    "bpe": {name: None for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")}
    | {name: False for name in ("fuse_unk", "byte_fallback", "ignore_merges")},
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
        tokenizer.encode("a", "b")  # what the file's parts name may be missing
        find_special_tokens(tokenizer, settings.names(*ROLES))
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
    names = {kind: ("vocab.txt",) for kind in ("wordpiece", "mpnet")}
    names |= {"bpe": ("vocab.json",), None: ("vocab.txt", "vocab.json")}
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
        kind = "mpnet" if settings.kind == "mpnet" else "wordpiece"
        tokenizer = Tokenizer(_word_pieces(path, settings, kind))
    elif path.name == "vocab.json":
        tokenizer, kind = Tokenizer(BPE.from_file(str(path), str(path.parent / "merges.txt"))), "bpe"
    else:
        return _open_json(path, settings)
    _build(tokenizer, kind, settings, path, lower=_lower_by_name(path.parent))
    return tokenizer


def _open_json(path: Path, settings: Settings) -> Tokenizer:
    """tokenizer.json as it stands, or its vocabulary with the parts that the model's class has."""
    found = Tokenizer.from_file(str(path))
    if found.post_processor is not None:
        _check_template(json.loads(found.post_processor.__getstate__()), path)
    if settings.truncation_side is None and found.truncation is not None:
        settings.truncation_side = found.truncation["direction"]
    if settings.padding_side is None and found.padding is not None:
        settings.padding_side = found.padding["direction"]
    found.no_truncation()
    found.no_padding()
    kind = settings.kind
    if kind is None or not isinstance(found.model, _MODELS.get(kind, ())):
        if kind in _MODELS:
            warnings.warn(
                f"{_WHO}: {path} holds a {type(found.model).__name__} and is followed as it stands; Hugging Face's "
                f"class for this model would take its vocabulary for that of a {_MODELS[kind].__name__}. Set "
                f"tokenizer_class in tokenizer_config.json to PreTrainedTokenizerFast",
                stacklevel=5,
            )
        if kind is None and isinstance(found.normalizer, normalizers.BertNormalizer):
            _set_normalizer(found, settings, found.normalizer)
        _add_tokens(found, None, settings)
        return found
    tokenizer = Tokenizer(_model(found, kind, path))
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(found, part) is not None:
            setattr(tokenizer, part, getattr(found, part))
    if not settings.has_decoder:
        settings.added.update(found.get_added_tokens_decoder())
    _build(tokenizer, kind, settings, path, lower=True)
    _warn_of_changes(found, tokenizer, settings, path)
    return tokenizer


def _model(found: Tokenizer, kind: str, path: Path) -> WordPiece | BPE | Unigram:
    """The model of tokenizer.json, with the settings that the class of this kind has for it; what differs is said."""
    own = _MODEL_SETTINGS.get(kind, {})
    changed = [name for name, value in own.items() if (getattr(found.model, name) or None) != (value or None)]
    if not changed:
        return found.model
    _warn_of_parts(path, changed, "")
    state = json.loads(found.to_str())["model"]
    if kind in ("wordpiece", "mpnet"):
        return WordPiece(state["vocab"], unk_token=state["unk_token"], **own)
    return BPE(state["vocab"], [tuple(pair) for pair in state["merges"]], unk_token=state["unk_token"])


def _build(tokenizer: Tokenizer, kind: str, settings: Settings, path: Path, *, lower: bool) -> None:
    """Everything around the vocabulary as Hugging Face's class has it; ``lower`` where no file says it."""
    if kind in ("wordpiece", "mpnet"):
        _make_wordpiece(tokenizer, settings, lower)
    elif kind == "bpe":
        _make_byte_level(tokenizer, settings)
    _add_tokens(tokenizer, kind, settings)
    _warn_of_ids(tokenizer, settings, path)
    if kind == "unigram":
        return
    ids = []
    for role in ("cls", "sep"):
        token = settings.name(f"{role}_token", _CLASS_NAMES[kind][f"{role}_token"])
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{_WHO}: {path} has no {token}, the {role} token")
        ids.append((token, tokenizer.token_to_id(token)))
    (cls, _), (sep, _) = ids
    if kind == "wordpiece":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[f"{cls}:0", "$A:0", f"{sep}:0"],
            pair=[f"{cls}:0", "$A:0", f"{sep}:0", "$B:1", f"{sep}:1"],
            special_tokens=ids,
        )
    else:
        own = kind == "bpe"  # MPNet's class has no such settings
        tokenizer.post_processor = processors.RobertaProcessing(
            ids[1],
            ids[0],
            trim_offsets=not own or bool(settings.flag("trim_offsets", True)),
            add_prefix_space=own and bool(settings.flag("add_prefix_space", False)),
        )


def _warn_of_changes(found: Tokenizer, tokenizer: Tokenizer, settings: Settings, path: Path) -> None:
    """Say what of tokenizer.json a class replaces by its defaults; what the settings ask for needs no word."""
    before, after = _portrait(found), _portrait(tokenizer)
    stated = {
        "normalizer": ("do_lower_case", "strip_accents", "tokenize_chinese_chars"),
        "pre_tokenizer": ("add_prefix_space",),
        "post_processor": ("cls_token", "sep_token", "add_prefix_space"),
    }
    changes = [
        name
        for name, keys in stated.items()
        if before[name] != after[name] and not any(k in settings.values for k in keys)
    ]
    if changes:
        _warn_of_parts(path, changes, "do_lower_case or add_prefix_space, or ")


def _warn_of_parts(path: Path, names: list[str], settings: str) -> None:
    warnings.warn(
        f"{_WHO}: {path} has its own {' and '.join(names)}, which Hugging Face's class for this model replaces by its "
        f"default, and so does this one. Set {settings}tokenizer_class in tokenizer_config.json to "
        f"PreTrainedTokenizerFast to keep the file's",
        stacklevel=7,
    )


def _warn_of_ids(tokenizer: Tokenizer, settings: Settings, path: Path) -> None:
    for number, token in settings.added.items():
        found = tokenizer.token_to_id(token.content)
        if found != number:
            warnings.warn(
                f"{_WHO}: the files of {path.parent} give the added token {token.content!r} the id {number}; it has "
                f"{found} here, as in Hugging Face, which numbers such tokens itself",
                stacklevel=6,
            )
            return


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


def _word_pieces(path: Path, settings: Settings, kind: str) -> WordPiece:
    """BERT's or MPNet's list of word pieces: the line number is the id."""
    try:
        # newline="\n": other line separators may stand inside a piece.
        with open(path, encoding="utf-8", newline="\n") as file:
            vocab = {line.strip(" \t\r\n"): number for number, line in enumerate(file)}
    except UnicodeDecodeError as error:
        raise ValueError(f"{_WHO}: {path} is not UTF-8 ({error})") from error
    for role in ("unk", "cls", "sep"):
        token = settings.name(f"{role}_token", _CLASS_NAMES[kind][f"{role}_token"])
        # A token that the settings name and the list lacks is added to it, but for the one that must be known.
        if token not in vocab and (role == "unk" or settings.special.get(f"{role}_token") is None):
            raise ValueError(f"{_WHO}: {path} has no {token}; expected one word piece a line")
    return WordPiece(vocab, unk_token=settings.name("unk_token", "[UNK]"), max_input_chars_per_word=100)


def _make_wordpiece(tokenizer: Tokenizer, settings: Settings, lower: bool) -> None:
    """Hugging Face's BertTokenizer; ``lower`` where no file says it."""
    unk = settings.name("unk_token", "[UNK]")
    if tokenizer.token_to_id(unk) is not None:
        tokenizer.model.unk_token = unk
    tokenizer.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=bool(settings.flag("tokenize_chinese_chars", True)),
        strip_accents=settings.flag("strip_accents", None),
        lowercase=bool(settings.flag("do_lower_case", lower)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")


def _set_normalizer(tokenizer: Tokenizer, settings: Settings, old: normalizers.BertNormalizer) -> None:
    """Where no file names a class: only what the settings say goes before tokenizer.json."""
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=old.clean_text,
        handle_chinese_chars=bool(settings.flag("tokenize_chinese_chars", old.handle_chinese_chars)),
        # Here null is a value of its own: strip accents when lower-casing.
        strip_accents=settings.flag("strip_accents", old.strip_accents),
        lowercase=bool(settings.flag("do_lower_case", old.lowercase)),
    )


def _make_byte_level(tokenizer: Tokenizer, settings: Settings) -> None:
    """Hugging Face's RobertaTokenizer."""
    add_prefix_space = bool(settings.flag("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()


def _add_tokens(tokenizer: Tokenizer, kind: str | None, settings: Settings) -> None:
    """Added and special tokens in Hugging Face's order: it gives new ones the ids after the vocabulary's last.

    Args:
        kind: of the class whose usual names count where the vocabulary has them; None for no class.
    """
    known = tokenizer.get_added_tokens_decoder().values()
    forms = {repr(token) for token in known}
    new = [token for _, token in sorted(settings.added.items()) if repr(token) not in forms]
    texts = {token.content for token in (*known, *new)}
    by_text = {token.content: token for token in settings.added.values()}
    roles = [f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    named = []
    for name in (*roles, *(name for name in settings.special if name not in roles)):
        token = settings.special.get(name)
        usual = _CLASS_NAMES.get(kind or "", {}).get(name)
        if name not in settings.special and usual is not None and tokenizer.token_to_id(usual) is not None:
            token = AddedToken(usual, special=True, lstrip=kind == "mpnet" and name == "mask_token")
        if token is not None:
            named.append(by_text.get(token.content, token) if name in roles else token)
    special = {token.content for token in named}
    for token in new:
        token.special = token.special or token.content in special
    # Tokens of one text and several forms are all added: the last form counts.
    for token in (*named, *settings.extra):
        if token.content not in texts and repr(token) not in {repr(other) for other in new}:
            new.append(token)
    tokenizer.add_tokens(new)
