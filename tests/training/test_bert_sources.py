# SPDX-License-Identifier: Apache-2.0
"""What pretraining of BERT reads: sentences of paragraphs, dialogues, spans of every source, shards through kills."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import tokenizers
import torch
from support import stopping

from ctxfast import cli
from ctxfast.models.bert.config import BertConfig
from ctxfast.models.bert.tokenization import BertTokenizer
from ctxfast.training.pretraining import bert_pairs
from ctxfast.training.pretraining.bert_corpus import BertCorpus, Recipe, text_documents, vocabulary_of
from ctxfast.training.pretraining.bert_instances import PairOptions, Vocabulary
from ctxfast.training.pretraining.bert_task import BertPretraining, entities_masked
from ctxfast.training.pretraining.knowledge_masking import KnowledgeMasking
from ctxfast.training.pretraining.knowledge_spans import FLAG_SHIFT, ID_MASK, SPEAKER, Gazetteer, SegmentedText
from ctxfast.training.pretraining.text import split_sentences
from ctxfast.training.pretraining.vocabulary import train_wordpiece

CHINESE = ["哈尔滨是黑龙江的省会", "黑龙江的省会是哈尔滨", "我们学习自然语言处理", "自然语言处理是科学"]


@pytest.mark.parametrize(
    ("line", "sentences"),
    [
        ("One. Two! 3 of them? Yes.", ["One.", "Two!", "3 of them?", "Yes."]),
        ('He said "Go." Then (he left.) "No!"', ['He said "Go."', "Then (he left.)", '"No!"']),
        ("At 5 p.m. exactly, e.g. now... Élan", ["At 5 p.m. exactly, e.g. now...", "Élan"]),
        ("省会。“是吗？”他说。", ["省会。", "“是吗？”", "他说。"]),
        ("no end", ["no end"]),
        ("  ", []),
    ],
)
def test_sentences_of_a_paragraph(line: str, sentences: list[str]) -> None:
    assert list(split_sentences(line)) == sentences


def test_a_long_row_of_dots_is_looked_at_once() -> None:
    start = time.process_time()
    assert list(split_sentences("Contents " + "." * 20_000 + "7")) == ["Contents " + "." * 20_000 + "7"]
    assert time.process_time() - start < 2  # 10 s where every dot begins a search of its own


def test_paragraphs_become_documents_of_sentences(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("One. Two.\nThree.\n\n\n \nFour\r\n")
    (tmp_path / "b").write_text("Five. Six.")
    files = [tmp_path / "a", tmp_path / "b"]
    assert list(text_documents(files, True)) == [["One.", "Two.", "Three."], ["Four"], ["Five.", "Six."]]
    assert list(text_documents(files)) == [["One. Two.", "Three."], ["Four"], ["Five. Six."]]


def test_paragraphs_without_pairs_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line that fills a sequence alone has no second segment of its own."""
    paragraph = " ".join(f"Word number {i} is here." for i in range(20))
    (tmp_path / "text").write_text("\n".join([paragraph, paragraph, ""] * 8))
    base = ["pretrain", "bert", str(tmp_path / "text"), "--train-vocab", "90", "--size", "tiny", "--steps", "1"]
    base += ["--max-seq-length", "32", "--batch-size", "2", "--dupe-factor", "2", "--device", "cpu"]
    assert cli.main([*base, "-o", str(tmp_path / "paragraphs")]) == 0
    assert "note: 100 % of second segments come from elsewhere" in capsys.readouterr().err
    assert cli.main([*base, "-o", str(tmp_path / "sentences"), "--split-sentences"]) == 0
    assert "note:" not in capsys.readouterr().err


# Dialogues


def _tokenizer(tmp_path: Path, lines: list[str], size: int = 200) -> BertTokenizer:
    (tmp_path / "words").write_text("\n".join(lines * 3), encoding="utf-8")
    return train_wordpiece(tmp_path / "tokenizer", [tmp_path / "words"], size)


def _corpus(tmp_path: Path, lines: list[str], recipe: Recipe, **options: object) -> BertCorpus:
    (tmp_path / "text").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = _tokenizer(tmp_path, lines)
    return BertCorpus.prepare(tmp_path / "data", [tmp_path / "text"], tokenizer, recipe, **options)


def test_forms_of_dialogues(tmp_path: Path) -> None:
    """Token types tell who speaks: the forms of ERNIE, QRQ, QRR and QQR."""
    lines = ["ann\tbig", "bob\tcat", "ann\tdog", ""]  # QRQ
    lines += ["bob\tegg", "ann\tfig", "ann\tgum", ""]  # QRR
    lines += ["x\that", "x\tice", "y\tjam", ""]  # QQR
    lines += ["x\tkit", "x\tlog", "x\tmat", ""]  # nobody answers
    recipe = Recipe("dialogue", PairOptions(max_seq_length=32, dupe_factor=40), is_dynamic=True)
    corpus = _corpus(tmp_path, lines, recipe)
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "tokenizer")
    seen = {}
    for index in range(len(corpus)):
        pair = corpus.pair(index)
        said = tokenizer.decode([code & ID_MASK for code in pair.ids[1:]], skip_special=False)
        turns = [turn.strip() for turn in said.split("[SEP]")][:3]
        ends = [place for place, code in enumerate(pair.ids) if code & ID_MASK == tokenizer.sep_token_id]
        form = "".join("QR"[pair.token_type_ids[end]] for end in ends)
        starts = [1, ends[0] + 1, ends[1] + 1]
        for start, end in zip(starts, ends):
            assert len(set(pair.token_type_ids[start : end + 1])) == 1
        assert pair.token_type_ids[0] == 0
        seen.setdefault(form, []).append((" ".join(turns), pair.is_random_next))
    assert set(seen) == {"QRQ", "QRR", "QQR"}
    for form, real in (("QRQ", "big cat dog"), ("QRR", "egg fig gum"), ("QQR", "hat ice jam")):
        assert len(seen[form]) == 40 and {turns for turns, is_fake in seen[form] if not is_fake} == {real}
        fakes = [turns.split() for turns, is_fake in seen[form] if is_fake]
        assert 8 < len(fakes) < 32
        assert all(sum(a != b for a, b in zip(turns, real.split())) == 1 for turns in fakes), "one turn is another's"
    task = BertPretraining(corpus, tokenizer, _small(tokenizer), batch_size=16)
    batch = task.batch(0)
    parts, _ = task.loss(task.model, batch)
    loss = sum(parts.values())
    loss.backward()
    assert torch.isfinite(loss) and set(batch.token_type_ids.unique().tolist()) == {0, 1}
    assert (batch.input_ids < tokenizer.vocab_size).all() and (batch.labels < tokenizer.vocab_size).all()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a\tx", "y", "a\tz", "", "b"], "a turn is 'y'; expected a speaker, a tab and text"),
        (["a\tx", "b\ty", "c\tz", "", "b"], "a dialogue has the speakers a, b, c; expected two at most"),
        (["x", "y", "", "z", "w"], "not one sequence of pairs 'dialogue'; expected documents of three turns"),
    ],
)
def test_bad_dialogues(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _corpus(tmp_path, lines, Recipe("dialogue", PairOptions(max_seq_length=32)))


# Any document


@pytest.mark.parametrize("kind", ["next", "order", "none", "dialogue"])
def test_sequences_of_any_documents(kind: str) -> None:
    """Whatever the documents: marks, lengths and types are right, and no token is made up."""
    vocabulary = Vocabulary(50, 2, 3, 4, frozenset(range(40, 50)))
    for seed in range(60):
        draw = random.Random(seed)
        length = draw.choice([16, 17, 32, 64])
        options = PairOptions(length, draw.choice([0.0, 0.5, 1.0]), draw.randint(1, 3), 0.15, draw.choice([1, 3, 20]))
        documents = []
        for _ in range(draw.randint(2, 8)):
            longest = draw.choice([1, 5, 90])
            document = [
                [draw.randint(5, 49) for _ in range(draw.randint(0, longest))] for _ in range(draw.randint(0, 9))
            ]
            for place, sentence in enumerate(document):
                if kind == "dialogue" and sentence and place % 2:
                    sentence[0] |= SPEAKER << FLAG_SHIFT
            documents.append(document)
        documents += [[[5, 6], [7], [8]], [[9], [10, 11, 12], [13]]]
        kept = [tuple(code & ID_MASK for code in s) for d in documents for s in d]
        made = Recipe(kind, options).make(documents, vocabulary, seed)
        assert made or kind == "dialogue"
        for pair, masked in made:
            ids = [code & ID_MASK for code in pair.ids]
            assert 3 <= len(ids) <= length and ids[0] == 2 and ids[-1] == 3 and ids[pair.first_length - 1] == 3
            assert len(pair.token_type_ids) == len(ids) == len(masked.ids)
            assert ids.count(3) == {"none": 1, "dialogue": 3}.get(kind, 2) and ids.count(2) == 1
            if kind == "dialogue":
                limit = (length - 4) // 3
                for turn in " ".join(map(str, ids[1:-1])).split(" 3 "):
                    assert any(list(map(int, turn.split())) == list(sentence[:limit]) for sentence in kept)
            restored = list(masked.ids)
            for place, label in zip(masked.positions, masked.labels):
                restored[place] = label
            assert restored == ids and masked.is_random_next == pair.is_random_next
            assert 1 <= len(masked.positions) <= options.max_predictions_per_seq
            assert not {masked.labels[k] for k in range(len(masked.labels))} & {2, 3}


# Spans through the command


def _small(tokenizer: BertTokenizer) -> BertConfig:
    return BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )


def _command(tmp_path: Path, lines: list[str], *more: object) -> BertCorpus:
    """Runs one step; the sequences it was trained on."""
    (tmp_path / "text").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}'
    )
    words = ["pretrain", "bert", tmp_path / "text", "-o", tmp_path / "run", "--train-vocab", 200, "--steps", 1]
    words += ["--config", tmp_path / "config.json", "--max-seq-length", 32, "--batch-size", 4, "--quiet"]
    assert cli.main([*map(str, words), "--device", "cpu", *map(str, more)]) == 0
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "run" / "data" / "tokenizer")
    return BertCorpus(tmp_path / "run" / "data" / "train", vocabulary_of(tokenizer), Recipe())


def _split_units(corpus: BertCorpus, units: list[str], tokenizer: BertTokenizer) -> tuple[int, int]:
    """How many occurrences of the units are masked as wholes, and how many in part."""
    wholes = [tokenizer.encode(unit).ids[1:-1] for unit in units]
    assert all(len(whole) > 1 for whole in wholes)
    full = partly = 0
    for index in range(len(corpus)):
        one, original = corpus.instance(index), [code & ID_MASK for code in corpus.pair(index).ids]
        for whole in wholes:
            for place in range(len(original) - len(whole) + 1):
                if original[place : place + len(whole)] == whole:
                    hit = sum(k in one.positions for k in range(place, place + len(whole)))
                    full += hit == len(whole)
                    partly += 0 < hit < len(whole)
    return full, partly


@pytest.mark.parametrize(
    ("more", "is_spaced", "is_whole"),
    [
        (["--masking", "word", "--jieba"], False, True),
        pytest.param(["--masking", "word", "--segmented"], True, True, marks=pytest.mark.slow),
        (["--masking", "phrase=2", "--jieba", "--mask-together", "--mask-count", "spans"], False, True),
        pytest.param(["--masking", "word"], False, False, marks=pytest.mark.slow),
        pytest.param(["--masking", "token", "--jieba"], False, False, marks=pytest.mark.slow),
    ],
)
def test_chinese_words_through_the_command(tmp_path: Path, more: list[str], is_spaced: bool, is_whole: bool) -> None:
    import jieba

    jieba.setLogLevel(60)
    lines = [" ".join(jieba.cut(line)) if is_spaced else line for line in CHINESE]
    corpus = _command(tmp_path, [*lines, "", *lines[::-1], ""] * 4, "--dupe-factor", 6, *more)
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "run" / "data" / "tokenizer")
    full, partly = _split_units(corpus, ["哈尔滨", "黑龙江", "省会"], tokenizer)
    assert full > 5 if is_whole else partly > 20
    # A pair may begin or end inside a word: what is left of it is no occurrence, so none is masked in part.
    assert partly == 0 if is_whole else full < partly


def test_the_text_that_has_one_document_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "held").write_text("a single document\n")
    with pytest.raises(AssertionError):
        _command(tmp_path, ["one", "line", "", "other"] * 9, "--train-vocab", 40, "--held-out", tmp_path / "held")
    said = capsys.readouterr().err
    assert "1 documents with text; expected at least 2" in said and f"shard 1 of {tmp_path / 'held'}." in said


@pytest.mark.parametrize("masking", ["token=1,word=1", "word=1,token=1e-9"])
def test_words_of_a_mix_need_no_source(tmp_path: Path, masking: str) -> None:
    """Without --segmented and the like, words are the tokenizer's."""
    lines = ["the river valley was green", "a tower and a bridge stand over it"]
    corpus = _command(
        tmp_path, [*lines, "", *lines[::-1], ""] * 8, "--train-vocab", 40, "--masking", masking, "--mask-rate", 0.4
    )
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "run" / "data" / "tokenizer")
    assert all(corpus.instance(index).positions for index in range(len(corpus)))
    full, partly = _split_units(corpus, ["tower", "bridge"], tokenizer)
    assert full > 10 and (partly > 10 if masking == "token=1,word=1" else partly == 0)


def test_spans_of_a_file_and_of_a_gazetteer_through_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["we saw the north sea today", "corn of the red river valley", "the north sea is a cold red sea"]
    rows = []
    for number, line in enumerate([*lines, "", *lines], 1):
        for name in ("north sea", "red river valley"):
            if name in line:
                at = line.index(name)
                rows.append(f"{number}\t{at}\t{at + len(name)}\tentity")
    (tmp_path / "spans").write_text("\n".join(rows) + "\n")
    names = tmp_path / "names.txt"
    names.write_text("north sea\nred river valley\n")
    made = []
    for number, source in enumerate((["--spans", tmp_path / "spans"], ["--gazetteer", names])):
        folder = tmp_path / str(number)
        folder.mkdir()
        corpus = _command(folder, [*lines, "", *lines], "--dupe-factor", 30, "--masking", "entity", *source)
        tokenizer = BertTokenizer.from_pretrained(folder / "run" / "data" / "tokenizer")
        full, partly = _split_units(corpus, ["north sea", "red river valley"], tokenizer)
        assert full > 10 and partly == 0
        made.append([corpus.instance(index) for index in range(len(corpus))])
    assert made[0] == made[1], "the same spans, so the same masks, whoever found them"
    (tmp_path / "held").write_text("a red river\n\nthe north sea\n")
    (tmp_path / "more").write_text("\n".join([*rows, "8\t2\t11\tphrase"]) + "\n")  # the held-out lines are counted on
    more = ["--masking", "phrase", "--spans", tmp_path / "more"]
    for name, held in (("judged", ["--held-out", tmp_path / "held"]), ("lone", [])):
        (tmp_path / name).mkdir()
        command = (tmp_path / name, [*lines, "", *lines], *more, *held)
        if held:
            _command(*command)
            assert (tmp_path / name / "run" / "final" / "model.safetensors").is_file()
        else:
            with pytest.raises(AssertionError):
                _command(*command)
            assert "row 7 is about line 8; expected at most 7" in capsys.readouterr().err


def test_held_out_masks_do_not_depend_on_the_strategy(tmp_path: Path) -> None:
    """Two ways of masking are judged on the same words; the loss on entities is that of all their tokens."""
    lines = ["we saw the north sea today", "corn of the red river valley", "the cold sea", "a red tower"] * 3
    names = tmp_path / "names.txt"
    names.write_text("north sea\nred river valley\n")
    (tmp_path / "held").write_text("the north sea is red\ncold corn\n\nin the red river valley we saw\nit today\n")
    judged = []
    for masking in ("token", "entity=1,token=1"):
        folder = tmp_path / masking
        folder.mkdir()
        more = ["--held-out", tmp_path / "held", "--gazetteer", names, "--masking", masking, "--dynamic"]
        _command(folder, [*lines, "", *lines], *more)
        data = folder / "run" / "data" / "held_out"
        judged.append({path.name: path.read_bytes() for path in sorted((data / "shard-00000").iterdir())})
    assert judged[0] == judged[1] and "positions.npy" in judged[0]
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "token" / "run" / "data" / "tokenizer")
    judged_by = Recipe(options=PairOptions(max_seq_length=32))
    held = BertCorpus(tmp_path / "token" / "run" / "data" / "held_out", vocabulary_of(tokenizer), judged_by)
    task = BertPretraining(held, tokenizer, _small(tokenizer), held_out=held, has_entities=True)
    task.model.eval()
    losses, right = [], []
    with torch.no_grad():
        figures = task.evaluate(task.model)
        for index in range(len(held)):
            one = entities_masked(
                held.pair(index), tokenizer.mask_token_id, held.vocabulary, 0.15, random.Random(index)
            )
            if not one.positions:
                continue
            assert [one.ids[place] for place in one.positions] == [tokenizer.mask_token_id] * len(one.positions)
            assert tokenizer.decode(one.labels) in ("north sea", "red river valley")
            found = task.model(
                torch.tensor([one.ids]), token_type_ids=torch.tensor([one.token_type_ids]), return_logits=True
            )
            logits = found.prediction_logits[0, one.positions]
            losses += torch.nn.functional.cross_entropy(logits, torch.tensor(one.labels), reduction="none").tolist()
            right += (logits.argmax(-1) == torch.tensor(one.labels)).tolist()
    assert losses and figures["entity_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert figures["entity_accuracy"] == pytest.approx(sum(right) / len(right))


def test_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("a b\nc d\n\ne f\ng h\n")
    (tmp_path / "spans").write_text("1\t0\t1\tword\n")
    base = ["pretrain", "bert", str(tmp_path / "text"), "-o", str(tmp_path / "run"), "--steps", "1"]
    base += ["--train-vocab", "100", "--size", "tiny"]
    spans = ["--spans", str(tmp_path / "spans")]
    for more, message in (
        (["--masking", "word,word=2"], "masking names 'word' twice"),
        (["--mask-together"], "--mask-together or --mask-count is given with BERT's own masks (--masking token)"),
        (["--masking", "word", "--mask-count", "each"], "(--masking word); expected phrases"),
        (["--max-predictions", "0"], "--max-predictions is 0; expected 1 or more"),
        ([*spans, "--split-sentences"], "--spans is given with --split-sentences"),
        ([*spans, "--pairs", "dialogue"], "--spans is given with --pairs dialogue"),
        (["--pairs", "dialogue"], "not one sequence of pairs 'dialogue'"),
        (["--masking", "word=-1"], "masking has 'word=-1'; expected a weight above 0"),
    ):
        assert cli.main([*base, *more]) == 2, more
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said, said


def test_prepared_shards_are_kept_from_other_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command with other settings is refused before it touches what the run prepared; so is a text that changed."""
    text, names = tmp_path / "text", tmp_path / "names"
    text.write_text("a b\nc d\n\ne f\ng h\n\ni j\nk l\n")
    names.write_text("a b\n")
    (tmp_path / "config.json").write_text('{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}')
    base = ["pretrain", "bert", str(text), "-o", str(tmp_path / "run"), "--train-vocab", "90", "--batch-size", "2"]
    base += ["--config", str(tmp_path / "config.json"), "--max-seq-length", "16", "--device", "cpu"]
    base += ["--gazetteer", str(names)]
    assert cli.main([*base, "--prepare-only"]) == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["data"]
    capsys.readouterr()
    assert cli.main([*base, "--steps", "2"]) == 0
    assert "shard 1" not in capsys.readouterr().err, "prepared before"

    def files() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (tmp_path / "run" / "data").rglob("*") if path.is_file()}

    before = files()
    for more, message in (
        (["--masking", "word"], "settings.recipe.options.do_whole_word_mask was False and is True now"),
        (["--masking", "entity"], "settings.recipe.knowledge"),
        (["--dupe-factor", "3"], "settings.recipe.options.dupe_factor was 10 and is 3 now"),
        (["--data-seed", "1"], "settings.recipe.seed was 12345 and is 1 now"),
    ):
        assert cli.main([*base, "--steps", "2", *more]) == 2
        assert message in capsys.readouterr().err
    names.write_text("c d\n")
    assert cli.main([*base, "--steps", "2"]) == 2
    assert "settings.sources.gazetteer" in capsys.readouterr().err
    assert files() == before
    names.write_text("a b\n")
    text.write_text(text.read_text().replace("i j", "j i"))  # as many sequences and tokens as before
    assert cli.main([*base, "--steps", "2"]) == 2
    assert f"settings.sha256.text.{text} was" in capsys.readouterr().err
    assert files() == before
    assert cli.main([*base, "--steps", "2", "--overwrite"]) == 0


def test_a_model_of_one_token_type_takes_no_pairs(tmp_path: Path) -> None:
    corpus = _corpus(tmp_path, ["a b", "c d", "", "e f"], Recipe(options=PairOptions(16)))
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "tokenizer")
    config = BertConfig(**{**vars(_small(tokenizer)), "type_vocab_size": 1})
    with pytest.raises(ValueError, match="the model has 1 token type; expected 2 for pairs"):
        BertPretraining(corpus, tokenizer, config)


def test_whole_words_of_a_vocabulary_that_has_none(tmp_path: Path) -> None:
    """Pieces of byte-level BPE do not say whether they go on with a word; words that a source finds do."""
    lines = ["the north sea", "a cold sea", "", "the old town", "a tower"]
    (tmp_path / "text").write_text("\n".join(lines))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    names = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        lines, tokenizers.trainers.BpeTrainer(vocab_size=270, special_tokens=names, initial_alphabet=alphabet)
    )
    tokenizer = BertTokenizer(
        backend, special_tokens={role: f"<{role}>" for role in ("pad", "unk", "mask")} | {"cls": "<s>", "sep": "</s>"}
    )
    whole = PairOptions(32, do_whole_word_mask=True)
    with pytest.raises(ValueError, match="do_whole_word_mask with a BPE vocabulary; expected WordPiece"):
        BertCorpus.prepare(tmp_path / "data", [tmp_path / "text"], tokenizer, Recipe(options=whole))
    recipe = Recipe("none", whole, KnowledgeMasking({"word": 1.0}, 0.6))
    corpus = BertCorpus.prepare(tmp_path / "data", [tmp_path / "text"], tokenizer, recipe, sources=[SegmentedText()])
    word = backend.encode(" north", add_special_tokens=False).ids[1:]  # the space is a piece of its own
    assert len(word) > 1
    full = 0
    for index in range(len(corpus)):
        one, original = corpus.instance(index), [code & ID_MASK for code in corpus.pair(index).ids]
        for place in range(len(original) - len(word) + 1):
            if original[place : place + len(word)] == word:
                hit = sum(k in one.positions for k in range(place, place + len(word)))
                assert hit in (0, len(word))
                full += hit > 0
    assert full


# Shards


def test_shards_of_killed_runs(tmp_path: Path) -> None:
    """Killed again and again while it writes stored masks, preparing leaves the bytes of a run that was not."""
    draw = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three", "up", "down"]
    lines = []
    for _ in range(120):
        lines += [" ".join(draw.choices(words, k=draw.randint(2, 12))) for _ in range(draw.randint(2, 6))] + [""]
    (tmp_path / "text").write_text("\n".join(lines))
    tokenizer = _tokenizer(tmp_path, words)
    recipe = Recipe(options=PairOptions(32, dupe_factor=3), shard_bytes=1200)
    BertCorpus.prepare(tmp_path / "whole", [tmp_path / "text"], tokenizer, recipe)
    count = len(list((tmp_path / "whole").glob("shard-*")))
    assert count > 8
    script = tmp_path / "prepare.py"
    script.write_text(
        "import sys\n"
        "from ctxfast.models.bert.tokenization import BertTokenizer\n"
        "from ctxfast.training.pretraining.bert_corpus import BertCorpus, Recipe\n"
        "from ctxfast.training.pretraining.bert_instances import PairOptions\n"
        "recipe = Recipe(options=PairOptions(32, dupe_factor=3), shard_bytes=1200)\n"
        "tokenizer = BertTokenizer.from_pretrained(sys.argv[2])\n"
        "BertCorpus.prepare(sys.argv[3], [sys.argv[1]], tokenizer, recipe)\n"
    )
    words = [tmp_path / "text", tmp_path / "tokenizer", tmp_path / "killed"]
    for sight in (1, 5):
        process = stopping.start(tmp_path / "killed" / f"shard-{sight:05d}", script, *words)
        stopping.await_sight(process)
        process.kill()
        process.wait()
        assert not (tmp_path / "killed" / "complete.json").exists()
    BertCorpus.prepare(tmp_path / "killed", [tmp_path / "text"], tokenizer, recipe)
    trees = [
        {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("whole", "killed")
    ]
    assert trees[0] == trees[1] and len(trees[0]) == 7 * count + 2


def test_many_shards_keep_no_file_open(tmp_path: Path) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    lines = [f"{a} {b} word" for a in "abcdef" for b in "abcdef"]
    text = [part for line in lines for part in (line, line, "")]
    before = len(os.listdir("/proc/self/fd"))
    corpus = _corpus(tmp_path, text, Recipe(options=PairOptions(16, dupe_factor=1), shard_bytes=1))
    assert len(corpus._shards) > 15 and len(os.listdir("/proc/self/fd")) == before
    assert all(corpus.instance(index).positions for index in range(len(corpus)))


def test_phrases_of_a_gazetteer_in_a_packed_file(tmp_path: Path) -> None:
    import lzma

    with lzma.open(tmp_path / "names.tsv.xz", "wt", encoding="utf-8") as file:
        file.write("north sea\t3\nold town\t1\n")
    found = Gazetteer.from_file(tmp_path / "names.tsv.xz", "phrase")
    assert found.size == 2 and [span[:2] for span in found.spans("The Old Town")] == [(4, 12)]
    assert bert_pairs.speakers(["a", "b", "c"]) == (["a", "b", "c"], [False, True, False])
