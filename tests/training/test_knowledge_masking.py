# SPDX-License-Identifier: Apache-2.0
"""Spans, their way to word pieces, and masking of whole units."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers

from ctxfast.models.bert.tokenization import BertTokenizer
from ctxfast.training.pretraining.bert_instances import Pair, Vocabulary
from ctxfast.training.pretraining.knowledge_masking import KnowledgeMasking, mask, units
from ctxfast.training.pretraining.knowledge_spans import (
    ENTITY,
    FLAG_SHIFT,
    PHRASE,
    WORD,
    ChineseWords,
    Gazetteer,
    SegmentedText,
    Span,
    begins,
)

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "new", "york", "city", "the", "mayor", "of", "##s", "visit", "##ed",
    "a", "hot", "dog", "stand", ".", "哈", "尔", "滨", "是", "黑", "龙", "江", "的", "省", "会",
]  # fmt: skip
VOCABULARY = Vocabulary(len(WORDS), 2, 3, 4, frozenset(i for i, word in enumerate(WORDS) if word.startswith("##")))


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return BertTokenizer(tokenizers.BertWordPieceTokenizer({w: i for i, w in enumerate(WORDS)})._tokenizer)


def _flags(tokenizer: BertTokenizer, text: str, spans: list[Span]) -> dict[str, str]:
    """Units at each level, as text."""
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    found = begins(_Plain(encoding), spans)
    shown = {}
    for name, flag in (("word", WORD), ("phrase", PHRASE), ("entity", ENTITY)):
        shown[name] = "".join(
            ("|" if flags & flag else "") + token for flags, token in zip(found, encoding.tokens)
        ).lstrip("|")
    return shown


class _Plain:
    """What ``begins`` reads of an encoding."""

    def __init__(self, rust: tokenizers.Encoding) -> None:
        self.offsets, self.word_ids = rust.offsets, rust.word_ids


def test_units_at_each_level(tokenizer: BertTokenizer) -> None:
    text = "The mayors of New York visited a hot dog stand."
    at = text.index("New York")
    spans = [Span(at, at + 8, "entity"), Span(text.index("hot dog"), text.index(" stand"), "phrase")]
    assert _flags(tokenizer, text, spans) == {
        "word": "the|mayor##s|of|new|york|visit##ed|a|hot|dog|stand|.",
        "phrase": "the|mayor##s|of|new|york|visit##ed|a|hotdog|stand|.",
        "entity": "the|mayor##s|of|newyork|visit##ed|a|hot|dog|stand|.",
    }


def test_spans_take_whole_pieces_and_the_longer_one(tokenizer: BertTokenizer) -> None:
    text = "new york city of a dog"
    spans = [Span(0, 8, "entity"), Span(4, 13, "entity"), Span(2, 5, "phrase"), Span(100, 120, "phrase")]
    assert _flags(tokenizer, text, spans) == {
        "word": "new|york|city|of|a|dog",
        "phrase": "newyork|city|of|a|dog",
        "entity": "new|yorkcity|of|a|dog",
    }


def test_gazetteer_matches_words_not_their_parts(tmp_path: Path) -> None:
    file = tmp_path / "names.tsv"
    file.write_text("LOC\tYork\nLOC\tNew  York\n\nLOC\t哈尔滨\nORG\tİstanbul\n", encoding="utf-8")
    found = Gazetteer.from_file(file, column=1)
    assert found.size == 4
    text = "new york, Yorkshire; 在哈尔滨的York. İstanbul"
    assert {text[s.start : s.end] for s in found.spans(text)} == {"new york", "york", "哈尔滨", "York", "İstanbul"}
    exact = Gazetteer(["York"], "phrase", ignore_case=False)
    assert [text[s.start : s.end] for s in exact.spans(text)] == ["York"] and exact.kind == "phrase"
    with pytest.raises(ValueError, match="line 1 has 2 columns; expected more than column=2"):
        Gazetteer.from_file(file, column=2)
    with pytest.raises(ValueError, match="entries has no text"):
        Gazetteer(["", "  "])
    with pytest.raises(ValueError, match="kind is 'name'; expected one of word, phrase, entity"):
        Gazetteer(["a"], "name")


def test_words_of_chinese_and_of_segmented_text(tokenizer: BertTokenizer) -> None:
    text = "哈尔滨是黑龙江的省会"
    spans = ChineseWords().spans(text)
    assert [text[s.start : s.end] for s in spans] == ["哈尔滨", "是", "黑龙江", "的", "省会"]
    assert _flags(tokenizer, text, spans)["word"] == "哈尔滨|是|黑龙江|的|省会"
    assert _flags(tokenizer, text, [])["word"] == "哈|尔|滨|是|黑|龙|江|的|省|会"
    spaced = " 哈尔滨  是 黑龙江"
    assert [spaced[s.start : s.end] for s in SegmentedText().spans(spaced)] == ["哈尔滨", "是", "黑龙江"]


def _pair() -> Pair:
    """20 units of 1 to 4 pieces at the phrase level."""
    codes, flags = [2], PHRASE | WORD
    for unit in range(20):
        for piece in range(1 + unit % 4):
            codes.append(5 + unit | (0 if piece else flags) << FLAG_SHIFT)
    return Pair([*codes, 3, 5 | flags << FLAG_SHIFT, 3], len(codes) + 1, False)


@pytest.mark.parametrize("count", ["tokens", "spans", "each"])
@pytest.mark.parametrize("together", [False, True])
def test_whole_units_are_masked(count: str, together: bool) -> None:
    pair, draw = _pair(), random.Random(0)
    options = KnowledgeMasking({"phrase": 1.0}, 0.3, count, together)
    groups = units(pair.ids, VOCABULARY, "phrase")
    assert [len(group) for group in groups] == [1 + unit % 4 for unit in range(20)] + [1]
    masked, rates = 0, []
    for _ in range(400):
        made = mask(pair, VOCABULARY, options, draw)
        chosen = set(made.positions)
        touched = [group for group in groups if chosen & set(group)]
        assert all(chosen >= set(group) for group in touched)
        assert made.positions == sorted(chosen) and made.ids[0] == 2 and made.ids[pair.first_length - 1] == 3
        assert all(
            a == b for i, (a, b) in enumerate(zip(made.ids, [c & 0xFFFFFF for c in pair.ids])) if i not in chosen
        )
        masked += sum(made.ids[i] == 4 for i in chosen) / max(len(chosen), 1)
        rates.append(len(touched) / len(groups) if count != "tokens" else len(chosen) / len(pair.ids))
        if count == "spans":
            assert len(touched) == int(0.3 * len(groups))
    assert abs(masked / 400 - 0.8) < 0.05
    assert abs(sum(rates) / 400 - 0.3) < 0.05


def test_together_shares_one_draw() -> None:
    codes = [2, *(5 + i | (WORD if i == 0 else 0) << FLAG_SHIFT for i in range(6)), 3]
    pair, draw, kinds = Pair(codes, 8, False), random.Random(1), []
    for _ in range(300):
        made = mask(pair, VOCABULARY, KnowledgeMasking({"word": 1.0}, 1.0, together=True), draw)
        inside = made.ids[1:7]
        kinds.append("mask" if inside == [4] * 6 else "kept" if inside == list(range(5, 11)) else "random")
        assert made.labels == list(range(5, 11))
    assert 0.7 < kinds.count("mask") / 300 < 0.9 and 0.04 < kinds.count("kept") / 300 < 0.17


def test_levels_mix_and_limits_hold() -> None:
    pair, draw = _pair(), random.Random(2)
    options = KnowledgeMasking({"token": 1.0, "phrase": 3.0}, 0.5, max_predictions_per_seq=7)
    levels = [options.level(draw) for _ in range(2000)]
    assert abs(levels.count("phrase") / 2000 - 0.75) < 0.04
    assert max(len(mask(pair, VOCABULARY, options, draw).positions) for _ in range(200)) == 7
    assert units([2, 5, 3, 6, 3], VOCABULARY, "word") == [[1], [3]]  # no unit reaches across [SEP]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(levels={"sentence": 1.0}), r"levels has \['sentence'\]; expected some of token, word, phrase, entity"),
        (dict(levels={"word": 0.0}), "not all 0"),
        (dict(rate=0.0), "rate is 0.0; expected above 0"),
        (dict(count="words"), "count is 'words'; expected one of tokens, spans, each"),
        (dict(max_predictions_per_seq=0), "max_predictions_per_seq is 0; expected 1 or more"),
    ],
)
def test_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KnowledgeMasking(**arguments)
