# SPDX-License-Identifier: Apache-2.0
"""BertTokenizer against Hugging Face's own tokenizers and against stored reference ids."""

from __future__ import annotations

import json
import pickle
import shutil
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ctxfast.models.bert.tokenization import BertTokenizer

transformers = pytest.importorskip("transformers", reason="needs transformers, the peer")

TRICKY = [
    "",
    " ",
    "\n\t \r\n",
    "Hello, World!",
    "naïve café résumé Ångström İstanbul ẞ ﬁ",
    "e\u0301 combining \u0307 alone",
    "深度学习 and 東京, ひらがな カタカナ 한국어 \U00020000",
    "emoji 😀👩‍👩‍👧‍👦🇩🇪 end",
    "soft\u00adhyphen zero\u200bwidth joiner\u200d bom\ufeff nbsp\u00a0x narrow\u202fx ideo\u3000x",
    "control \x00\x01\x07\x7f\x85 chars \ufffd here",
    "line\u2028separator\u2029paragraph",
    "a" * 99 + " " + "b" * 100 + " " + "c" * 101 + " " + "d" * 300,
    "[MASK] in [CLS] text [SEP] and [mask], [PAD][UNK] [unused5]",
    "unaffable hyperparameterization 3.14159 @user #tag http://t.co/x?y=1&z=2",
    "don't can't I'm rock'n'roll - – — … “quoted” ‘single’ «guillemets» ¿qué? ¡sí!",
    "$100 + 5% = £7 ~ `code` ^caret |pipe| \\back\\ _under_ <tag/>",
    "ÀÉÎÕÜ ñ ç ø Ø æ ß Ł đ Ǆ ǆ Σίσυφος ΣΑΣ русский язык Ёлка й עברית العربية हिन्दी ไทย",
    "x" * 5000,
    "word " * 300,
]


@pytest.fixture(scope="module")
def minilm(request: pytest.FixtureRequest) -> tuple[Path, BertTokenizer]:
    folder = request.getfixturevalue("minilm_dir")
    return folder, BertTokenizer.from_pretrained(folder)


def peer(folder: Path, target: Path, **settings):
    """Hugging Face's BERT tokenizer made from the word list alone."""
    target.mkdir(exist_ok=True)
    shutil.copy(folder / "vocab.txt", target)
    (target / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, **settings}))
    return transformers.BertTokenizerFast.from_pretrained(target)


def test_reference_ids(minilm, shared_data: Path) -> None:
    _, tokenizer = minilm
    texts = json.loads((shared_data / "bert" / "minilm_l6_reference.json").read_text())
    expected = np.load(shared_data / "bert" / "minilm_l6_reference.npz")
    batch = tokenizer.batch(texts["texts"] + [tuple(pair) for pair in texts["pairs"]])
    width = batch["input_ids"].shape[1]
    assert width == int(expected["attention_mask"].sum(1).max())
    for name, tensor in batch.items():
        assert tensor.dtype == torch.int64
        np.testing.assert_array_equal(tensor.numpy(), expected[name][:, :width])


@pytest.mark.parametrize("lower", [True, False])
def test_same_as_hugging_face_on_tricky_text(minilm, lower: bool, tmp_path: Path) -> None:
    folder, _ = minilm
    theirs = peer(folder, tmp_path / "peer", do_lower_case=lower)
    ours = BertTokenizer.from_pretrained(folder, do_lower_case=lower, max_length=512)
    ours.max_length = None
    for text, encoding in zip(TRICKY, ours.encode_batch(TRICKY), strict=True):
        expected = theirs(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        assert encoding.ids == expected["input_ids"], text
        assert encoding.offsets == expected["offset_mapping"], text
        assert encoding.word_ids == expected.word_ids(), text
        assert encoding.special_tokens_mask == expected["special_tokens_mask"], text
        assert encoding.tokens == theirs.convert_ids_to_tokens(expected["input_ids"]), text
        assert ours.encode(text).ids == encoding.ids
        assert ours.tokenize(text) == theirs.tokenize(text)
    pairs = [(a, b) for a in TRICKY[:6] for b in TRICKY[6:12]]
    for (a, b), encoding in zip(pairs, ours.encode_batch(pairs), strict=True):
        expected = theirs(a, b)
        assert encoding.ids == expected["input_ids"]
        assert encoding.type_ids == expected["token_type_ids"]
        assert encoding.sequence_ids == expected.sequence_ids()
        assert ours.encode(a, b).ids == encoding.ids


def test_vocab_alone_equals_tokenizer_json(minilm, tmp_path: Path) -> None:
    folder, full = minilm
    shutil.copy(folder / "vocab.txt", tmp_path / "vocab.txt")
    for path in (tmp_path, tmp_path / "vocab.txt", folder / "vocab.txt"):
        alone = BertTokenizer.from_pretrained(path)
        assert json.loads(alone.backend.to_str()) == json.loads(full.backend.to_str())
        assert alone.special_tokens == full.special_tokens
    assert BertTokenizer.from_pretrained(tmp_path).max_length is None
    (tmp_path / "crlf").mkdir()
    lines = (folder / "vocab.txt").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "crlf" / "vocab.txt").write_bytes(lines)
    assert BertTokenizer.from_pretrained(tmp_path / "crlf").vocab == full.vocab


@pytest.mark.parametrize(
    ("folder_name", "settings", "given", "expected"),
    [
        ("uncased_L-12_H-768_A-12", None, None, True),
        ("cased_L-12_H-768_A-12", None, None, False),
        ("multi_cased_L-12", None, None, False),
        ("chinese_L-12", None, None, True),
        ("cased_L-12", None, True, True),
        ("cased_L-12", {"do_lower_case": True}, None, True),
        ("uncased", {"do_lower_case": False}, None, False),
        ("uncased", {"do_lower_case": None}, None, True),
    ],
)
def test_lower_case(minilm, tmp_path: Path, folder_name, settings, given, expected) -> None:
    folder = tmp_path / folder_name
    folder.mkdir()
    shutil.copy(minilm[0] / "vocab.txt", folder)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = BertTokenizer.from_pretrained(folder, do_lower_case=given)
    assert tokenizer.tokenize("Café") == (["cafe"] if expected else ["[UNK]"])


def test_settings_go_before_tokenizer_json(minilm, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(minilm[0] / name, tmp_path)
    settings = {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = BertTokenizer.from_pretrained(tmp_path)
    assert ours.encode("Hello world").ids == theirs("Hello world")["input_ids"]
    assert ours.tokenize("Hello world")[0] == "[UNK]"


def test_saved_padding_and_truncation_do_not_leak(minilm) -> None:
    folder, tokenizer = minilm
    saved = json.loads((folder / "tokenizer.json").read_text())
    assert saved["padding"]["strategy"] == {"Fixed": 128}  # the trap this test is about
    assert saved["truncation"]["max_length"] == 128
    assert len(tokenizer.encode("a")) == 3
    assert len(tokenizer.encode("a " * 300)) == 302


def test_length_limit_and_truncation(minilm, tmp_path: Path) -> None:
    folder, tokenizer = minilm
    assert tokenizer.max_length == 512
    assert len(tokenizer.encode("a " * 510)) == 512
    with pytest.raises(ValueError, match=r"text 1 has 513 tokens; expected at most 512\. Pass"):
        tokenizer.encode_batch(["a", "a " * 511])
    with pytest.raises(ValueError, match="has 513 tokens"):
        tokenizer.batch(["a " * 511])
    with pytest.raises(ValueError, match="max_length is 513; the model takes at most 512"):
        tokenizer.encode("a", max_length=513)
    with pytest.raises(ValueError, match="max_length is 3; expected at least 4"):
        tokenizer.encode("a", max_length=3)
    theirs = peer(folder, tmp_path / "peer")
    for limit in (512, 64, 7):
        texts = [
            "a " * 600,
            "b",
            ("c " * 700, "d e f"),
            ("g h", "i " * 600),
            ("j " * 400, "k " * 500),
        ]
        got = tokenizer.encode_batch(texts, max_length=limit, truncation=True)
        for text, encoding in zip(texts, got, strict=True):
            args = (text,) if isinstance(text, str) else text
            expected = theirs(*args, truncation="longest_first", max_length=limit)["input_ids"]
            assert encoding.ids == expected
            assert encoding.truncated == len(theirs(*args)["input_ids"]) - len(expected)
        batch = tokenizer.batch(texts, max_length=limit, truncation=True)
        assert batch["attention_mask"].sum(1).tolist() == [len(encoding) for encoding in got]
    assert "truncated=88" in repr(tokenizer.encode("a " * 598, truncation=True))
    words = tokenizer.encode_words(["a"] * 600, truncation=True)
    assert (len(words), words.truncated, words.word_ids[-2]) == (512, 90, 509)
    # Cutting in one call leaves the next one whole.
    assert tokenizer.encode("a " * 100).truncated == 0
    assert len(tokenizer.encode("a " * 100)) == 102


def test_words(minilm, tmp_path: Path) -> None:
    folder, tokenizer = minilm
    theirs = peer(folder, tmp_path / "peer")
    words = ["un", "\u00ad", "affable", "New York", "", "don't", "[MASK]", "深度", "x" * 101]
    encoding = tokenizer.encode_words(words)
    expected = theirs(words, is_split_into_words=True)
    assert encoding.ids == expected["input_ids"]
    assert encoding.word_ids == expected.word_ids()
    assert encoding.word_ids == [None, 0, 2, 2, 2, 3, 3, 5, 5, 5, 6, 7, 7, 8, None]
    assert tokenizer.encode_words([]).ids == tokenizer.encode("").ids
    several = tokenizer.encode_words_batch([words, ["one"], []])
    assert [e.ids for e in several][0] == encoding.ids
    assert [len(e) for e in several[1:]] == [3, 2]


def test_lone_surrogates_are_replaced(minilm) -> None:
    _, tokenizer = minilm
    clean = tokenizer.encode("a \ufffd b")
    broken = tokenizer.encode("a \ud800 b")
    assert (broken.ids, broken.offsets) == (clean.ids, clean.offsets)
    assert tokenizer.encode_batch(["ok", "a \udc00 b"])[1].ids == clean.ids
    assert tokenizer.encode_batch([("ok", "a \udc00 b")])[0].ids == tokenizer.encode("ok", "a b").ids
    assert tokenizer.encode_words(["a", "\udfff", "b"]).word_ids == [None, 0, 2, None]
    assert tokenizer.tokenize("\ud83d x") == ["x"]


def test_wrong_arguments(minilm) -> None:
    folder, tokenizer = minilm
    for texts, message in (
        ("one text", "got one string; expected a list of texts"),
        ([b"b"], r"text 0 is b.b. \(bytes\); expected a string or a tuple of two strings"),
        (["fine", None], "text 1 is None"),
        ([["a", "b"]], r"text 0 is .* \(list\)"),
        ({"a": "b"}, "texts is of type dict"),
        ([("a", "b", "c")], r"text 0 is .* \(tuple\)"),
        ([("a", 1)], r"text 0 is .* \(tuple\)"),
    ):
        with pytest.raises(TypeError, match=message):
            tokenizer.encode_batch(texts)
    with pytest.raises(TypeError, match=r"text 0 is .not words. \(str\); expected a list of words"):
        tokenizer.encode_words_batch(["not words"])
    with pytest.raises(TypeError, match="text 0 is None; expected a string"):
        tokenizer.tokenize(None)
    assert [e.ids for e in tokenizer.encode_batch(text for text in ("a", "b"))] == [[101, 1037, 102], [101, 1038, 102]]
    with pytest.raises(ValueError, match="pad_to_multiple_of is 0"):
        tokenizer.batch(["a"], pad_to_multiple_of=0)


def test_batch(minilm) -> None:
    _, tokenizer = minilm
    batch = tokenizer.batch(["a b", ("c", "d e f")], pad_to_multiple_of=8)
    assert batch["input_ids"].tolist() == [
        [101, 1037, 1038, 102, 0, 0, 0, 0],
        [101, 1039, 102, 1040, 1041, 1042, 102, 0],
    ]
    assert batch["token_type_ids"].tolist() == [[0] * 8, [0, 0, 0, 1, 1, 1, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 7 + [0]]
    encodings = tokenizer.encode_batch(["a b", ("c", "d e f")])
    for name, tensor in tokenizer.batch(encodings).items():
        assert torch.equal(tensor, batch[name][:, :7])
    assert {k: tuple(v.shape) for k, v in tokenizer.batch([]).items()} == dict.fromkeys(batch, (0, 0))


def test_special_tokens_and_ids(minilm) -> None:
    _, tokenizer = minilm
    ids = ("pad", "unk", "cls", "sep", "mask")
    assert [getattr(tokenizer, f"{role}_token_id") for role in ids] == [0, 100, 101, 102, 103]
    assert tokenizer.special_ids == {0, 100, 101, 102, 103}
    assert tokenizer.vocab_size == len(tokenizer.vocab) == 30522
    assert tokenizer.tokens([101, 7592, 40000]) == ["[CLS]", "hello", None]
    assert tokenizer.token_to_id("hello") == 7592
    assert tokenizer.token_to_id("no such piece") is None
    encoding = tokenizer.encode("Unaffable words!")
    assert tokenizer.decode(encoding.ids) == "unaffable words!"
    assert tokenizer.decode(torch.tensor(encoding.ids), skip_special=False).startswith("[CLS] una")


def test_special_tokens_written_in_text(minilm, tmp_path: Path) -> None:
    folder, tokenizer = minilm
    assert tokenizer.tokenize("a [MASK] b") == ["a", "[MASK]", "b"]
    plain = BertTokenizer.from_pretrained(folder, special_in_text=False)
    assert plain.tokenize("a [MASK] b") == ["a", "[", "mask", "]", "b"]
    long = plain.encode("[MASK] " * 300, truncation=True)
    assert plain.mask_token_id not in long.ids
    assert long.truncated == 300 * 3 + 2 - 512


def test_word_length_option(minilm) -> None:
    folder, tokenizer = minilm
    google = BertTokenizer.from_pretrained(folder, max_word_chars=200)
    assert tokenizer.tokenize("a" * 101) == ["[UNK]"]
    assert "[UNK]" not in google.tokenize("a" * 200)
    assert google.tokenize("a" * 201) == ["[UNK]"]


def test_pickle_and_save(minilm, tmp_path: Path) -> None:
    _, tokenizer = minilm
    tokenizer.encode("a " * 600, truncation=True)
    again = pickle.loads(pickle.dumps(tokenizer))
    tokenizer.save(tmp_path / "saved")
    saved = BertTokenizer.from_pretrained(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.max_length == again.max_length == theirs.model_max_length == 512
    for text in TRICKY[:-2]:
        expected = tokenizer.encode(text).ids
        assert again.encode(text).ids == expected
        assert saved.encode(text).ids == expected
        assert theirs(text)["input_ids"] == expected
    assert not list((tmp_path / "saved").glob(".*"))


# --- other tokenizers, trained here on a few lines

CORPUS = ["the quick brown fox jumps over the lazy dog", "Café naïve 東京 the dogs jumped"] * 20


@pytest.fixture
def roberta_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "roberta"
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.model.save(str(folder))
    # Without tokenizer.json so far: made by Hugging Face from vocab.json and merges.txt.
    theirs = transformers.RobertaTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    theirs.save_pretrained(folder)
    config = transformers.RobertaConfig(vocab_size=330, max_position_embeddings=40, type_vocab_size=1, hidden_size=16)
    config.num_attention_heads = 2
    config.save_pretrained(folder)
    return folder


def test_byte_level_bpe(roberta_folder: Path, tmp_path: Path) -> None:
    theirs = transformers.RobertaTokenizerFast.from_pretrained(roberta_folder)
    prefixed = transformers.RobertaTokenizerFast.from_pretrained(roberta_folder, add_prefix_space=True)
    old = tmp_path / "old"
    old.mkdir()
    for name in ("vocab.json", "merges.txt", "config.json"):
        shutil.copy(roberta_folder / name, old)
    for folder in (roberta_folder, old):
        ours = BertTokenizer.from_pretrained(folder)
        assert ours.max_length == 38
        assert ours.single_type
        assert (ours.cls_token_id, ours.pad_token_id, ours.sep_token_id) == (0, 1, 2)
        assert ours.mask_token_id == theirs.mask_token_id
        for text in ("the dogs jumped", " Café 東京<mask>!", "", "x\ny  z", "a<mask> b <s>"):
            expected = theirs(text, return_offsets_mapping=True)
            assert ours.encode(text).ids == expected["input_ids"], text
            assert ours.encode(text).offsets == expected["offset_mapping"], text
            assert ours.encode(text, "the fox").ids == theirs(text, "the fox")["input_ids"]
        assert set(ours.encode("the", "fox").type_ids) == {0}
        assert ours.batch([("the", "fox")])["token_type_ids"].sum() == 0
        words = ["the", "quick", "Café", "東京", "dog"]
        expected = prefixed(words, is_split_into_words=True)
        assert ours.encode_words(words).ids == expected["input_ids"]
        assert ours.encode_words(words).word_ids == expected.word_ids()
        # Only split text gets the space before its first word.
        assert ours.encode("the").ids == theirs("the")["input_ids"]
        assert ours.decode(ours.encode("the dogs").ids) == "the dogs"
    with pytest.raises(ValueError, match="do_lower_case is True; this tokenizer has no such"):
        BertTokenizer.from_pretrained(roberta_folder, do_lower_case=True)
    with pytest.raises(ValueError, match="a BPE tokenizer has no such setting"):
        BertTokenizer.from_pretrained(roberta_folder, max_word_chars=5)


def test_unigram_as_in_xlm_roberta(tmp_path: Path) -> None:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in ("the", "quick", "dog", "fo")]
    pieces += [(c, -6.0) for c in string.ascii_letters + "▁"] + [("<mask>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = BertTokenizer.from_pretrained(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert ours.tokenize("the fox") == ["▁the", "▁fo", "x"]
    assert (ours.pad_token_id, ours.mask_token_id) == (1, len(pieces) - 1)
    for text in ("the quick fox", "é dog", "<mask> dog"):
        assert ours.encode(text).ids == theirs(text, padding=False)["input_ids"]
    encoding = ours.encode_words(["the", "fox", "é", "dog"])
    assert encoding.word_ids[:4] == [None, 0, 1, 1]
    assert encoding.word_ids[-2:] == [3, None]
    assert ours.batch(["the", "the fox"])["input_ids"][0].tolist() == [0, 4, 2, 1, 1]


def test_damaged_and_missing_files(minilm, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json, no vocab\.txt"):
        BertTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\n[CLS]\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"vocab\.txt is not UTF-8"):
        BertTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\nthe\n")
    with pytest.raises(ValueError, match=r"vocab\.txt has no \[SEP\]"):
        BertTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n")
    with pytest.raises(ValueError, match="no padding token"):
        BertTokenizer.from_pretrained(tmp_path)
    whole = (minilm[0] / "tokenizer.json").read_bytes()
    for size in (0, 10, len(whole) // 2):
        (tmp_path / "tokenizer.json").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"tokenizer\.json is damaged or no tokenizer file"):
            BertTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the vocabulary has no mask token"):
        _ = tokenizer.mask_token_id
    with pytest.raises(ValueError, match=r"the vocabulary has no mask token '\[MASK\]'"):
        BertTokenizer(tokenizer.backend, special_tokens={"mask": "[MASK]"})


def test_more_tokens_than_embeddings_is_said(shared_data: Path, minilm, tmp_path: Path) -> None:
    dummy = shared_data / "bert" / "xsmall_dummy"
    tokenizer = BertTokenizer.from_pretrained(dummy)
    assert tokenizer.vocab_size <= 250
    assert tokenizer.encode("!").ids[1] == 5
    shutil.copy(dummy / "config.json", tmp_path)
    shutil.copy(minilm[0] / "vocab.txt", tmp_path)
    with pytest.warns(UserWarning, match=r"ids up to 30521, but the model's vocab_size is 250"):
        BertTokenizer.from_pretrained(tmp_path)
