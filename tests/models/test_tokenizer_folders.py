# SPDX-License-Identifier: Apache-2.0
"""Everything a folder says of its tokenizer, against Hugging Face's AutoTokenizer on the same folder."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ctxfast.models.bert.tokenization import BertTokenizer

transformers = pytest.importorskip("transformers", reason="needs transformers, the peer")

PIECES = "[PAD] [unused0] [unused1] [UNK] [CLS] [SEP] [MASK] <s> </s> the bank lend lends ##s money Money cafe café é"
PIECES = f"{PIECES} [ ] e1 / e un ##used ##used0 unused0 深 度 . , ! ##able 1 < > s [e1]".split()
TEXTS = [
    "the [e1] bank [/e1] lends [unused0] money",
    "The Bank lends MONEY, café Café! 深度",
    " [MASK] [mask]the[MASK]bank <mask>  the <s> [e2] new[e1]word NEWTOK newtok",
    "",
    "un\u0301used0 e1 . bank  ",
]
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
BERT = {"tokenizer_config.json": {"do_lower_case": True, "tokenizer_class": "BertTokenizer"}}
ADDED = {str(len(PIECES) + i): {"content": text, **PLAIN} for i, text in enumerate(("[e2]", "[/e1]"))}


def _config(**settings):
    return {"tokenizer_config.json": settings}


def _word_pieces_json() -> str:
    """A tokenizer.json with BERT's parts, as the library saves it."""
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", PIECES.index("[CLS]")), ("[SEP]", PIECES.index("[SEP]"))],
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer.to_str()


def _changed(**parts) -> dict[str, object]:
    return {**json.loads(_word_pieces_json()), **parts}


VOCAB_TXT = {
    "vocab.txt alone": {},
    "no lower case": _config(do_lower_case=False),
    "accents kept": _config(do_lower_case=True, strip_accents=False),
    "accents stripped, case kept": _config(do_lower_case=False, strip_accents=True),
    "Chinese characters together": _config(tokenize_chinese_chars=False),
    "basic tokenization off": _config(do_basic_tokenize=False, never_split=["[e1]", "lends"]),
    "added_tokens.json, special by the map": {
        "added_tokens.json": {"[e2]": len(PIECES), "[/e1]": len(PIECES) + 1},
        "special_tokens_map.json": {"additional_special_tokens": ["[e2]", "[/e1]"]},
    },
    "added_tokens.json, not special": {"added_tokens.json": {"newtok": len(PIECES), "[/e1]": len(PIECES) + 1}},
    "added_tokens.json in another order": {"added_tokens.json": {"[/e1]": len(PIECES) + 1, "newtok": len(PIECES)}},
    "added_tokens_decoder": _config(do_lower_case=True, added_tokens_decoder=ADDED),
    "added_tokens_decoder that strips": _config(
        added_tokens_decoder={str(len(PIECES)): {"content": "newtok", **PLAIN, "lstrip": True, "rstrip": True}}
    ),
    "added_tokens_decoder, whole words": _config(
        added_tokens_decoder={str(len(PIECES)): {"content": "[e2]", **PLAIN, "single_word": True}}
    ),
    "the decoder goes before older files": {
        **_config(added_tokens_decoder=ADDED),
        "added_tokens.json": {"newtok": len(PIECES)},
        "special_tokens_map.json": {"additional_special_tokens": ["[unused0]"]},
    },
    "special tokens of the vocabulary": {
        "special_tokens_map.json": {"additional_special_tokens": ["[unused0]", "[e1]"]},
        **BERT,
    },
    "additional_special_tokens of the config": _config(additional_special_tokens=["[unused0]", "[e2]"]),
    "added tokens special by the config": {
        **_config(additional_special_tokens=["NEWTOK"]),
        "added_tokens.json": {"NEWTOK": len(PIECES)},
    },
    "added tokens that the map names too late": {
        "special_tokens_map.json": {"additional_special_tokens": ["NEWTOK"]},
        "added_tokens.json": {"NEWTOK": len(PIECES)},
    },
    "lists of both files": {
        **_config(additional_special_tokens=["[unused0]", "[e2]"]),
        "special_tokens_map.json": {"extra_special_tokens": ["[e2]", "NEWTOK"]},
    },
    "names in place of a list": {
        **_config(extra_special_tokens=["[unused0]"]),
        "special_tokens_map.json": {"extra_special_tokens": {"entity_token": "[e2]"}},
    },
    "one token, two forms": {
        "special_tokens_map.json": {"bos_token": "[e2]", "eos_token": {"content": "[e2]", **PLAIN, "lstrip": True}}
    },
    "roles that the vocabulary lacks": _config(cls_token="[NEW]", sep_token="[OLD]"),
    "extra_special_tokens, a list": _config(extra_special_tokens=["[unused0]", "[/e1]"]),
    "extra_special_tokens, names": _config(extra_special_tokens={"entity_token": "[e2]", "end_token": "[/e1]"}),
    "a token with a name of its own": _config(entity_token="[e2]"),
    "other names of roles": {
        "special_tokens_map.json": {"cls_token": "<s>", "sep_token": "</s>"},
        **_config(do_lower_case=True),
    },
    "the map goes before the config": {
        "special_tokens_map.json": {"cls_token": "<s>"},
        **_config(cls_token="[CLS]"),
    },
    "a mask that strips": {"special_tokens_map.json": {"mask_token": {"content": "[MASK]", **PLAIN, "lstrip": True}}},
    "a mask of another name": _config(mask_token="[unused1]"),
    "split special tokens": _config(split_special_tokens=True),
    "cut on the left": _config(truncation_side="left", model_max_length=6),
    "a short limit": _config(model_max_length=7),
    "no limit": _config(model_max_length=int(1e30)),
    "DistilBERT's class": _config(tokenizer_class="DistilBertTokenizer"),
    "ELECTRA's fast class": _config(tokenizer_class="ElectraTokenizerFast", do_lower_case=False),
    "class of the model's config": {"config.json": {"tokenizer_class": "BertTokenizerFast"}},
}
TOKENIZER_JSON = {
    "tokenizer.json alone": {},
    "case by the config": _config(do_lower_case=False),
    "chinese by the config": _config(tokenize_chinese_chars=False, strip_accents=False),
    "tokens the file lacks": _config(added_tokens_decoder=ADDED),
    "tokens the file lacks, older files": {
        "added_tokens.json": {"[e2]": len(PIECES)},
        "special_tokens_map.json": {"additional_special_tokens": ["[e2]", "[unused0]"]},
    },
    "names": _config(entity_token="[e2]", additional_special_tokens=["[unused1]"]),
    "plain class": _config(tokenizer_class="PreTrainedTokenizerFast", do_lower_case=False, model_max_length=9),
    "plain class, added": _config(tokenizer_class="TokenizersBackend", extra_special_tokens=["[e2]", "[unused0]"]),
    "roles by the config": _config(cls_token="<s>", sep_token="</s>"),
    "split special tokens": _config(split_special_tokens=True),
}
# Settings inside tokenizer.json that a class replaces; it is said.
REPLACED = {
    "case kept": _changed(normalizer={**json.loads(_word_pieces_json())["normalizer"], "lowercase": False}),
    "another normalizer": _changed(normalizer={"type": "Lowercase"}),
    "another pre-tokenizer": _changed(pre_tokenizer={"type": "WhitespaceSplit"}),
    "no special tokens": _changed(post_processor=None),
    "short words": _changed(model={**json.loads(_word_pieces_json())["model"], "max_input_chars_per_word": 4}),
    "another prefix": _changed(model={**json.loads(_word_pieces_json())["model"], "continuing_subword_prefix": "@@"}),
    "both": _changed(
        pre_tokenizer={"type": "WhitespaceSplit"},
        model={**json.loads(_word_pieces_json())["model"], "max_input_chars_per_word": 4},
    ),
}


def _write(folder: Path, files: dict[str, object], vocabulary: dict[str, str], model_type: str = "bert") -> Path:
    config = {"model_type": model_type, "vocab_size": 400, "max_position_embeddings": 514, "type_vocab_size": 2}
    config["hidden_size"], config["num_attention_heads"], config["pad_token_id"] = 8, 2, 1
    for name, text in vocabulary.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, value in {"config.json": {}, **files}.items():
        value = {**config, **value} if name == "config.json" else value
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def _compare(folder: Path, ours: BertTokenizer) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        expected = theirs(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        got = ours.encode(text)
        assert got.tokens == theirs.convert_ids_to_tokens(expected["input_ids"]), text
        assert got.ids == expected["input_ids"], text
        assert got.offsets == expected["offset_mapping"], text
        assert got.word_ids == expected.word_ids(), text
        assert got.special_tokens_mask == expected["special_tokens_mask"], text
        pair = theirs(text, TEXTS[0])
        assert ours.encode(text, TEXTS[0]).ids == pair["input_ids"]


@pytest.mark.parametrize("name", VOCAB_TXT)
def test_vocab_txt(name: str, tmp_path: Path) -> None:
    _check(_write(tmp_path, VOCAB_TXT[name], {"vocab.txt": "\n".join(PIECES) + "\n"}))


@pytest.mark.parametrize("name", TOKENIZER_JSON)
def test_tokenizer_json(name: str, tmp_path: Path) -> None:
    _check(_write(tmp_path, TOKENIZER_JSON[name], {"tokenizer.json": _word_pieces_json()}))


def _check(folder: Path) -> None:
    """The limit on length is Hugging Face's, and so is every token without one; saved, it is the same tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = BertTokenizer.from_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    limit = ours.max_length
    roberta = json.loads((folder / "config.json").read_text())["model_type"] != "bert"
    assert limit == min(theirs.model_max_length, 512 if roberta else 514)
    long = " ".join(TEXTS) * 30
    assert ours.encode(long, truncation=True).ids == theirs(long, truncation=True, max_length=limit)["input_ids"]
    with pytest.raises(ValueError, match=f"expected at most {limit}"):
        ours.encode(long)
    ours.max_length = None
    _compare(folder, ours)
    ours.save(folder / "saved")
    again = BertTokenizer.from_pretrained(folder / "saved")
    again.max_length = None
    assert [again.encode(text).ids for text in TEXTS] == [ours.encode(text).ids for text in TEXTS]
    assert again.encode(long, max_length=9, truncation=True).ids == ours.encode(long, max_length=9, truncation=True).ids


@pytest.mark.parametrize("name", REPLACED)
def test_what_a_class_replaces_is_said(name: str, tmp_path: Path) -> None:
    folder = _write(tmp_path, {}, {"tokenizer.json": json.dumps(REPLACED[name])})
    with pytest.warns(UserWarning, match=r"tokenizer\.json has its own .*Hugging Face's class"):
        ours = BertTokenizer.from_pretrained(folder)
    _compare(folder, ours)
    # The way out that the warning names.
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compare(folder, BertTokenizer.from_pretrained(folder))


def test_a_longer_limit_of_words_is_kept_where_it_is_saved(tmp_path: Path) -> None:
    """Google's 200 characters, which Hugging Face's class has no setting for."""
    folder = _write(tmp_path, BERT, {"vocab.txt": "\n".join(PIECES) + "\n"})
    ours, usual = (BertTokenizer.from_pretrained(folder, max_word_chars=limit) for limit in (200, None))
    word = "lends" * 30
    assert ours.tokenize("lends" + "s" * 120) != usual.tokenize("lends" + "s" * 120) == ["[UNK]"]
    (folder / "saved").mkdir()
    ours.save(folder / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = BertTokenizer.from_pretrained(folder / "saved")
    assert again.tokenize(word) == ours.tokenize(word)
    _compare(folder / "saved", again)


def test_a_vocabulary_of_another_kind_than_the_class_is_said(tmp_path: Path) -> None:
    folder = _write(tmp_path, _config(tokenizer_class="RobertaTokenizer"), {"tokenizer.json": _word_pieces_json()})
    with pytest.warns(UserWarning, match="holds a WordPiece and is followed as it stands; .* for that of a BPE"):
        ours = BertTokenizer.from_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    _compare(folder, ours)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "tokenizer.json"])
def test_padding_on_the_left_is_said(where: str, tmp_path: Path) -> None:
    files = {"tokenizer.json": _word_pieces_json()}
    if where == "tokenizer.json":
        tokenizer = Tokenizer.from_str(files[where])
        tokenizer.enable_padding(direction="left")
        files[where] = tokenizer.to_str()
    _write(tmp_path, {} if where == "tokenizer.json" else _config(padding_side="left"), files)
    with pytest.warns(UserWarning, match="set padding_side to 'left', which is not followed"):
        BertTokenizer.from_pretrained(tmp_path)


def test_padding_on_the_left_moves_no_position_of_roberta(bpe_files: dict[str, str], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BertTokenizer.from_pretrained(_write(tmp_path, _config(padding_side="left"), bpe_files, "roberta"))


def test_ids_that_cannot_be_kept_are_said(tmp_path: Path) -> None:
    folder = _write(tmp_path, {"added_tokens.json": {"[e2]": 399}}, {"vocab.txt": "\n".join(PIECES) + "\n"})
    with pytest.warns(UserWarning, match=rf"the added token '\[e2\]' the id 399; it has {len(PIECES)} here"):
        ours = BertTokenizer.from_pretrained(folder)
    _compare(folder, ours)


# Byte-level BPE


@pytest.fixture(scope="module")
def bpe_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    tokenizer.model.save(str(folder))
    return {name: (folder / name).read_text(encoding="utf-8") for name in ("vocab.json", "merges.txt")}


MASK = {"mask_token": {"content": "<mask>", **PLAIN, "lstrip": True}}
BPE = {
    "vocab.json with merges.txt": {},
    "a space in front": _config(add_prefix_space=True),
    "offsets with the space": _config(trim_offsets=False),
    "a mask that strips, by the map": {"special_tokens_map.json": MASK},
    "a mask that strips, by the config": _config(mask_token={**MASK["mask_token"], "__type": "AddedToken"}),
    "a mask that does not": {"special_tokens_map.json": {"mask_token": {"content": "<mask>", **PLAIN}}},
    "added tokens": {
        "added_tokens.json": {"[e2]": 300, "newtok": 301},
        "special_tokens_map.json": {"additional_special_tokens": ["[e2]"]},
    },
    "added_tokens_decoder": _config(added_tokens_decoder={"300": ADDED[str(len(PIECES))]}, add_prefix_space=True),
    "extra special tokens": _config(extra_special_tokens=["[e2]"], bos_token="<s>", eos_token="</s>"),
    "other roles": _config(cls_token="</s>", sep_token="<s>"),
    "BART's class": _config(tokenizer_class="BartTokenizerFast"),
    "cut on the left": _config(truncation_side="left", model_max_length=20),
}


@pytest.mark.parametrize("name", BPE)
@pytest.mark.parametrize("has_json", [False, True])
def test_byte_level_bpe(name: str, has_json: bool, bpe_files: dict[str, str], tmp_path: Path) -> None:
    files = dict(bpe_files)
    if has_json:
        made = tmp_path / "made"
        made.mkdir()
        transformers.AutoTokenizer.from_pretrained(_write(made, {}, bpe_files, "roberta")).save_pretrained(made)
        files = {"tokenizer.json": (made / "tokenizer.json").read_text(encoding="utf-8")}
    _check(_write(tmp_path, BPE[name], files, "roberta"))


@pytest.mark.parametrize("setting", [{"ignore_merges": True}, {"fuse_unk": True}, {"byte_fallback": True}])
def test_byte_level_settings_that_the_class_replaces(setting: dict, bpe_files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    folder = _write(tmp_path / "made", {}, bpe_files, "roberta")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    state["model"].update(setting)
    folder = _write(tmp_path, {}, {"tokenizer.json": json.dumps(state)}, "roberta")
    with pytest.warns(UserWarning, match=f"has its own {next(iter(setting))}, which Hugging Face's class"):
        ours = BertTokenizer.from_pretrained(folder)
    _compare(folder, ours)


@pytest.mark.parametrize("stated", [{}, _config(extra_special_tokens=["[e2]"], model_max_length=20)])
def test_xlm_roberta(stated: dict[str, object], tmp_path: Path) -> None:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", -2.0) for word in ("the", "bank", "lend", "money")]
    pieces += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz[]/<>1\u2581"] + [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    # Saved settings that would cut and pad in silence.
    tokenizer.enable_truncation(4, direction="left")
    tokenizer.enable_padding(length=9, pad_id=1, pad_token="<pad>")
    _check(_write(tmp_path, stated, {"tokenizer.json": tokenizer.to_str()}, "xlm-roberta"))


# What is refused, and by which name


def test_a_token_beyond_the_word_table(tmp_path: Path) -> None:
    from ctxfast import Embedder

    config = transformers.BertConfig(
        vocab_size=len(PIECES), hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[e2]": len(PIECES)}))
    with pytest.warns(UserWarning, match="tokens beyond it cannot be embedded"):
        embedder = Embedder(tmp_path, device="cpu")
    assert embedder(["the bank"])[0].shape == (2, 8)
    with pytest.raises(ValueError, match=rf"text 1 has the token '\[e2\]' of id {len(PIECES)}; expected ids below"):
        embedder(["the bank", "the [e2] bank"])


@pytest.mark.parametrize(
    "files, message",
    [
        (_config(tokenizer_class="BertJapaneseTokenizer"), "tokenizer_class in .*tokenizer_config.json is 'BertJap"),
        ({"config.json": {"tokenizer_class": "BertweetTokenizer"}}, "tokenizer_class in .*config.json is 'Bertweet"),
        (_config(auto_map={"AutoTokenizer": ["tok.Mine", None]}), "names code of its own for the tokenizer"),
        (_config(tokenizer_class="RobertaTokenizer"), "no tokenizer.json and no vocab.json with merges.txt"),
        (_config(tokenizer_class="PreTrainedTokenizerFast"), "has no tokenizer.json, as"),
        (_config(fast_tokenizer_files=["tokenizer.4.json"]), "fast_tokenizer_files in .*expected one"),
        (_config(do_lower_case="no"), "do_lower_case in .*tokenizer_config.json is 'no'; expected true or false"),
        (_config(cls_token=3), "cls_token in .* is 3; expected a token's text"),
        (_config(cls_token={"x": 1}), "cls_token in .*expected a token's text"),
        (_config(unk_token="[NO]"), r"vocab.txt has no \[NO\]"),
        (_config(model_max_length="long"), "model_max_length in .*expected a positive number"),
        (_config(truncation_side="up"), "truncation_side in .* is 'up'"),
        (_config(padding_side="up"), "padding_side in .* is 'up'"),
        (_config(added_tokens_decoder=[1]), "added_tokens_decoder in .*expected an object"),
        (_config(added_tokens_decoder={"x": {}}), "added_tokens_decoder in .*expected an object"),
        (_config(extra_special_tokens=3), "extra_special_tokens in .* is 3"),
        ({"added_tokens.json": {"a": "b"}}, "'a' in .*added_tokens.json is 'b'; expected an id"),
        ({"special_tokens_map.json": []}, "special_tokens_map.json holds a JSON list"),
    ],
)
def test_refused_by_name(files: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = _write(tmp_path, files, {"vocab.txt": "\n".join(PIECES) + "\n"})
    with pytest.raises((ValueError, FileNotFoundError), match=f"^ctxfast.BertTokenizer: .*{message}"):
        BertTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "name, text",
    [
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"a": ' + "9" * 5000 + "}"),
        ("tokenizer.json", json.dumps(_changed(model={"type": "WordPiece", "vocab": {}}))),
        ("tokenizer.json", json.dumps({**_changed(), "post_processor": {"type": "TemplateProcessing", "single": []}})),
        ("vocab.json", '{"<s>": 0'),
        ("merges.txt", "a b c d e"),
    ],
)
def test_damaged_files_are_named(name: str, text: str, bpe_files: dict[str, str], tmp_path: Path) -> None:
    files = bpe_files if name in bpe_files else {"vocab.txt": "\n".join(PIECES)}
    _write(tmp_path, {}, files, "roberta" if name in bpe_files else "bert")
    (tmp_path / name).write_text(text)
    named = "vocab.json" if name == "merges.txt" else name
    with pytest.raises(ValueError, match=rf"^ctxfast\.BertTokenizer: .*{re.escape(named)}"):
        BertTokenizer.from_pretrained(tmp_path)
