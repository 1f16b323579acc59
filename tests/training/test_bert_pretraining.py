# SPDX-License-Identifier: Apache-2.0
"""Pretraining of BERT: shards, sequences, masks, the task and the command."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import google_bert_data
from support import stopping

import ctxfast
from ctxfast import cli
from ctxfast.models.bert.config import BertConfig
from ctxfast.training.loop.train import LoopConfig, train
from ctxfast.training.pretraining import bert_pairs
from ctxfast.training.pretraining.bert_corpus import BertCorpus, Recipe, text_documents, vocabulary_of
from ctxfast.training.pretraining.bert_instances import PairOptions
from ctxfast.training.pretraining.bert_task import BertPretraining, entities_masked, sized_config
from ctxfast.training.pretraining.knowledge_masking import KnowledgeMasking
from ctxfast.training.pretraining.knowledge_spans import ID_MASK, Gazetteer, SpanFile
from ctxfast.training.pretraining.vocabulary import train_wordpiece

ENTITIES = ["north sea", "red river valley", "old town"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Documents about one subject each: what follows what can be learnt."""
    draw = random.Random(0)
    subjects = [
        ["the fish of the north sea swim", "a cold wave meets the ship", "salt water and wind"],
        ["corn grows in the red river valley", "the farmer cuts green corn", "rain falls on the field"],
        ["the old town has a high tower", "bells ring in the square", "people walk over the bridge"],
    ]
    documents = []
    for _ in range(60):
        lines = draw.choice(subjects)
        documents.append("\n".join(draw.choice(lines) for _ in range(draw.randint(3, 8))))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(documents) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizer(text):
    return train_wordpiece(text.parent / "tokenizer", [text], 120)


def recipe(**options) -> Recipe:
    own = {"max_seq_length": 32, "dupe_factor": 2, "max_predictions_per_seq": 5}
    sizes = {name: options.pop(name) for name in list(options) if name in PairOptions.__dataclass_fields__}
    return Recipe(options=PairOptions(**own | sizes), **options)


def prepare(text, tokenizer, directory, how: Recipe, **options) -> BertCorpus:
    return BertCorpus.prepare(directory, [text], tokenizer, how, **options)


def test_vocabulary(text, tokenizer, tmp_path) -> None:
    assert [tokenizer.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    assert tokenizer.tokenize("The NORTH sea") == ["the", "north", "sea"]
    made = [(tmp_path / name / "vocab.txt") for name in ("a", "b")]
    for path in made:
        train_wordpiece(path.parent, [text], 120)
    assert made[0].read_bytes() == made[1].read_bytes()
    said: list[str] = []
    train_wordpiece(made[0].parent, [text], 120, say=said.append)
    assert said == []
    assert train_wordpiece(made[0].parent, [text], 110, is_cased=True, say=said.append).vocab_size <= 110 and said
    # Words that are always [UNK] teach nothing and cost nothing; Chinese lines without spaces count in full.
    lines = text.read_text().splitlines()
    (tmp_path / "more").write_text("\n".join([*lines, "xy" * 30_000, "省会" * 60]) + "\n", encoding="utf-8")
    start = time.process_time()
    more = train_wordpiece(tmp_path / "d", [tmp_path / "more"], 120)
    assert time.process_time() - start < 10
    assert more.tokenize("xyxy")[0] != "xyxy" and more.tokenize("省会") == ["省", "会"]
    with pytest.raises(ValueError, match="vocabulary size is 3; expected 10 or more"):
        train_wordpiece(tmp_path / "c", [text], 3)


def test_one_shard_is_googles_data(text, tokenizer, tmp_path) -> None:
    """Text file to shards: instance for instance what the stated algorithm makes of the tokenised text."""
    how = recipe()
    corpus = prepare(text, tokenizer, tmp_path / "data", how)
    words = sorted(tokenizer.vocab, key=tokenizer.vocab.get)
    documents = [[tokenizer.tokenize(line) for line in document] for document in text_documents([text])]
    stated = google_bert_data.create(
        documents, words, seq=32, short=0.1, dupe=2, prob=0.15, most=5, whole=False, seed=12345
    )
    assert len(corpus) == len(stated) > 100
    for index, (tokens, kinds, positions, labels, random_next) in enumerate(stated):
        one = corpus.instance(index)
        assert [words[token] for token in one.ids] == tokens and one.token_type_ids == kinds
        assert one.positions == positions and [words[token] for token in one.labels] == labels
        assert one.is_random_next == random_next
    assert corpus.lengths.tolist() == [len(tokens) for tokens, *_ in stated]


def test_marks_in_a_text_are_text(tokenizer, tmp_path) -> None:
    """[SEP] and the like are split as punctuation, as Google's tokeniser does: a sequence's marks are ours alone."""
    (tmp_path / "text").write_text("the [SEP] ship [MASK]\nthe [CLS] sea\n\nthe field [PAD]\n[UNK] corn\n")
    for more in ({}, {"knowledge": KnowledgeMasking({"word": 1.0})}):
        corpus = prepare(tmp_path / "text", tokenizer, tmp_path / str(len(more)), recipe(is_dynamic=True, **more))
        for index in range(len(corpus)):
            ids = [code & ID_MASK for code in corpus.pair(index).ids]
            assert ids.count(2) == 1 and ids.count(3) == 2 and not {0, 4} & set(ids)
    assert tokenizer.tokenize("a [SEP] b")[1] == "[SEP]", "the tokenizer is as before"


@pytest.mark.slow
def test_shards_are_made_once_and_go_on(text, tokenizer, tmp_path) -> None:
    how = recipe(shard_bytes=1500)
    said: list[str] = []
    whole = prepare(text, tokenizer, tmp_path / "whole", how, say=said.append)
    assert len(said) == len(whole._shards) > 3
    prepare(text, tokenizer, tmp_path / "whole", how, say=said.append)
    assert len(said) == len(whole._shards), "nothing is made twice"

    def dies(line: str) -> None:
        if line.startswith("shard 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(text, tokenizer, tmp_path / "broken", how, say=dies)
    (tmp_path / "broken" / ".shard-00003.half").mkdir()
    rest: list[str] = []
    prepare(text, tokenizer, tmp_path / "broken", how, say=rest.append)
    assert len(rest) == len(said) - 3
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "broken") for p in (tmp_path / "broken").rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "broken" / file).read_bytes(), file
    spread: list[str] = []
    prepare(text, tokenizer, tmp_path / "spread", how, say=spread.append, workers=2)
    assert sorted(spread) == sorted(said)
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "spread" / file).read_bytes(), file
    other = prepare(text, tokenizer, tmp_path / "whole", recipe(shard_bytes=1500, dupe_factor=1))
    assert len(other) < len(whole)


def test_dynamic_masks(text, tokenizer, tmp_path) -> None:
    corpus = prepare(text, tokenizer, tmp_path / "data", recipe(is_dynamic=True))
    first, again, second = corpus.instance(7), corpus.instance(7), corpus.instance(7, epoch=1)
    assert first == again and first.positions and first != second
    pair = corpus.pair(7)
    for one in (first, second):
        restored = list(one.ids)
        for place, token in zip(one.positions, one.labels):
            restored[place] = token
        assert restored == [code & ID_MASK for code in pair.ids]


def test_sentence_order(text, tokenizer, tmp_path) -> None:
    corpus = prepare(text, tokenizer, tmp_path / "data", recipe(pairs="order", is_dynamic=True, short_seq_prob=0.0))
    swapped = 0
    for index in range(len(corpus)):
        pair = corpus.pair(index)
        assert len(pair.ids) <= 32 and pair.ids[0] == 2 and pair.ids[-1] == 3 and pair.ids[pair.first_length - 1] == 3
        assert pair.first_length > 2 and len(pair.ids) - pair.first_length > 1
        swapped += pair.is_random_next
    assert 0.4 < swapped / len(corpus) < 0.6
    draw = random.Random(1)
    document = [[10, 11], [12], [13, 14, 15]]
    options = PairOptions(max_seq_length=32, short_seq_prob=0.0)
    for _ in range(20):
        (pair,) = bert_pairs.order_pairs(document, vocabulary_of(tokenizer), options, draw)
        first, second = pair.ids[1 : pair.first_length - 1], pair.ids[pair.first_length : -1]
        joined = second + first if pair.is_random_next else first + second
        assert joined == [10, 11, 12, 13, 14, 15]
    (pair,) = bert_pairs.order_pairs([[10, 11, 12]], vocabulary_of(tokenizer), options, draw)
    assert sorted(pair.ids[1 : pair.first_length - 1] + pair.ids[pair.first_length : -1]) == [10, 11, 12]


def test_single_segments(text, tokenizer, tmp_path) -> None:
    corpus = prepare(text, tokenizer, tmp_path / "data", recipe(pairs="none", dupe_factor=1, short_seq_prob=0.0))
    for index in range(len(corpus)):
        one = corpus.instance(index)
        assert one.first_length == len(one.ids) <= 32 and set(one.token_type_ids) == {0}
    assert int(corpus.lengths.max()) == 32
    # No token is lost, however long a line is: what does not fit begins the next sequence.
    document, draw = [list(range(100, 175)), [200, 201], list(range(300, 330))], random.Random(0)
    for short in (0.0, 1.0):
        options = PairOptions(max_seq_length=32, short_seq_prob=short)
        made = list(bert_pairs.segments(document, vocabulary_of(tokenizer), options, draw))
        assert [token for pair in made for token in pair.ids[1:-1]] == sum(document, [])
        assert all(2 < len(pair.ids) <= 32 and pair.first_length == len(pair.ids) for pair in made)


def test_dialogues(text, tokenizer, tmp_path) -> None:
    corpus = prepare(text, tokenizer, tmp_path / "data", recipe(pairs="dialogue", is_dynamic=True, max_seq_length=40))
    documents = [[tokenizer.encode(line).ids[1:-1][:12] for line in document] for document in text_documents([text])]
    neighbours = {tuple(map(tuple, document[k : k + 3])) for document in documents for k in range(len(document) - 2)}
    fake = 0
    for index in range(len(corpus)):
        pair = corpus.pair(index)
        turns, kinds = [[]], []
        for token, kind in zip(pair.ids[1:], pair.token_type_ids[1:]):
            if token == 3:
                turns.append([])
                kinds.append(kind)
            else:
                turns[-1].append(token & ID_MASK)
        assert len(turns) == 4 and turns[3] == [] and kinds == [0, 1, 0]
        fake += pair.is_random_next
        if not pair.is_random_next:
            assert tuple(map(tuple, turns[:3])) in neighbours
    assert 0.35 < fake / len(corpus) < 0.65
    assert corpus.instance(3).token_type_ids == corpus.pair(3).token_type_ids


def test_phrases_are_masked_as_wholes(text, tokenizer, tmp_path) -> None:
    sources = [Gazetteer(ENTITIES, "phrase"), Gazetteer(ENTITIES, "entity")]
    how = recipe(knowledge=KnowledgeMasking({"entity": 1.0}, max_predictions_per_seq=8), is_dynamic=True)
    corpus = prepare(text, tokenizer, tmp_path / "data", how, sources=sources)
    wholes = [tokenizer.encode(name).ids[1:-1] for name in ENTITIES]
    seen = 0
    for index in range(len(corpus)):
        one, original = corpus.instance(index), [code & ID_MASK for code in corpus.pair(index).ids]
        for whole in wholes:
            for place in range(len(original) - len(whole) + 1):
                if original[place : place + len(whole)] == whole:
                    masked = [k in one.positions for k in range(place, place + len(whole))]
                    assert len(set(masked)) == 1
                    seen += masked[0]
        marked = entities_masked(corpus.pair(index), 4, corpus.vocabulary, 0.15, random.Random(0))
        for place, label in zip(marked.positions, marked.labels):
            assert marked.ids[place] == 4 and any(label in whole for whole in wholes)
    assert seen > 20


def test_spans_of_a_file(text, tmp_path) -> None:
    lines = ["", "  the old town sleeps", "the north sea"]
    (tmp_path / "text").write_text("\n".join(lines) + "\n")
    (tmp_path / "spans").write_text("2\t6\t14\tentity\n3\t4\t13\tphrase\n")
    found = SpanFile(tmp_path / "spans", [tmp_path / "text"])
    (span,) = found.spans("the old town sleeps")
    assert "the old town sleeps"[span.start : span.end] == "old town" and span.kind == "entity"
    assert found.spans("the north sea")[0].kind == "phrase" and found.spans("something else") == []
    for row, message in (
        ("2\tx\t4\tentity", "row 1 is '2.*expected line, start, end, kind"),
        ("2\t1\t4\tverb", "kind 'verb'; expected a line from 1 and one of word, phrase, entity"),
        ("2\t10\t99\tentity", "row 1 has characters 10 to 99; expected some of line 2, which has 21"),
        ("9\t0\t1\tentity", "row 1 is about line 9; expected at most 3"),
    ):
        (tmp_path / "spans").write_text(row + "\n")
        with pytest.raises(ValueError, match=message):
            SpanFile(tmp_path / "spans", [tmp_path / "text"])


def test_recipes_and_corpora_that_cannot_be(text, tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="pairs is 'both'; expected one of next, order, none, dialogue"):
        Recipe(pairs="both")
    (tmp_path / "one").write_text("a single document\nof two lines\n")
    with pytest.raises(ValueError, match="1 documents with text; expected at least 2"):
        prepare(tmp_path / "one", tokenizer, tmp_path / "d", recipe())
    (tmp_path / "empty").write_text("\n\n \n")
    with pytest.raises(ValueError, match="no text; expected lines of it"):
        prepare(tmp_path / "empty", tokenizer, tmp_path / "e", recipe())
    corpus = prepare(text, tokenizer, tmp_path / "data", recipe())
    small = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(ValueError, match="vocabulary has .* tokens and the model's word table 50 rows"):
        BertPretraining(corpus, tokenizer, small)
    short = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=20)
    with pytest.raises(ValueError, match="max_seq_length is 32; expected at most the model's 20 positions"):
        BertPretraining(corpus, tokenizer, short)
    with pytest.raises(ValueError, match="size is 'huge'; expected one of tiny"):
        sized_config("huge", 100)
    with pytest.raises(ValueError, match="expected one of them"):
        BertPretraining(corpus, tokenizer)


def tiny(tokenizer) -> BertConfig:
    return BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )


@pytest.mark.parametrize("pairs", ["next", pytest.param("none", marks=pytest.mark.slow)])
def test_it_learns(text, tokenizer, tmp_path, pairs: str) -> None:
    sources = [Gazetteer(ENTITIES, "entity")]
    corpus = prepare(text, tokenizer, tmp_path / "data", recipe(pairs=pairs, is_dynamic=True), sources=sources)
    held_out = prepare(text, tokenizer, tmp_path / "held", recipe(pairs=pairs, dupe_factor=1), sources=sources)
    task = BertPretraining(corpus, tokenizer, tiny(tokenizer), held_out=held_out, has_entities=True, batch_size=16)
    loop = LoopConfig(
        steps=240, learning_rate=5e-3, warmup_steps=20, eval_every=40, best="-loss", parallel="no", device="cpu"
    )
    report = train(task, loop, tmp_path / "run")
    curve = [line for line in report.log if line["kind"] == "eval"]
    knows_nothing = np.log(tokenizer.vocab_size)
    assert curve[-1]["masked_loss"] < curve[0]["masked_loss"] and curve[-1]["masked_loss"] < 0.75 * knows_nothing
    assert curve[-1]["entity_loss"] < curve[0]["entity_loss"] and curve[-1]["masked_accuracy"] > 0.1
    assert ("relation_accuracy" in curve[-1]) == (pairs == "next")
    model = ctxfast.Bert.from_pretrained(tmp_path / "run" / "final")
    assert model.config.hidden_size == 32
    again = ctxfast.BertTokenizer.from_pretrained(tmp_path / "run" / "final")
    assert again.encode("the north sea").ids == tokenizer.encode("the north sea").ids
    further = BertPretraining(corpus, tokenizer, init_from=tmp_path / "run" / "final", held_out=held_out)
    further.model.eval()
    with torch.no_grad():
        assert further.evaluate(further.model)["loss"] == pytest.approx(report.figures["loss"], rel=1e-4)


def test_evaluation_is_the_loss_of_all_masked_tokens(text, tokenizer, tmp_path, monkeypatch) -> None:
    held_out = prepare(text, tokenizer, tmp_path / "held", recipe(dupe_factor=1))
    task = BertPretraining(held_out, tokenizer, tiny(tokenizer), held_out=held_out)
    task.model.eval()
    with torch.no_grad():
        figures = task.evaluate(task.model)
        monkeypatch.setattr("ctxfast.training.pretraining.bert_task._LOGIT_BYTES", 1)  # a sequence at a time
        alone = task.evaluate(task.model)
    assert figures == pytest.approx(alone, rel=1e-4)
    batch = task._batch([held_out.instance(index) for index in range(len(held_out))])
    with torch.no_grad():
        found = task.model(
            batch.input_ids, None, batch.token_type_ids, labels=batch.labels, lengths=batch.lengths, return_logits=True
        )
    is_masked = batch.labels != -100
    logits, labels = found.prediction_logits[is_masked], batch.labels[is_masked]
    assert figures["masked_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert figures["masked_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


def test_accumulated_batches_of_unlike_length_are_one_large_batch(text, tokenizer, tmp_path) -> None:
    """Masked words count by words, relations by sequences, however micro-batches share them out."""
    corpus = prepare(text, tokenizer, tmp_path / "data", recipe(short_seq_prob=0.5))
    order = sorted(range(48), key=lambda index: corpus.lengths[index])

    class Fixed(BertPretraining):
        def batch(self, step: int, rank: int = 0, ranks: int = 1):
            size = 48 // accumulate
            start = step % accumulate * size
            return self._batch([self.corpus.instance(index) for index in order[start : start + size]])

    options = {**vars(tiny(tokenizer)), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    curves, weights = [], []
    for accumulate in (1, 6):
        task = Fixed(corpus, tokenizer, BertConfig(**options))
        loop = LoopConfig(
            steps=4, learning_rate=0.05, optimizer="adagrad", weight_decay=0.0, max_grad_norm=None, log_every=1,
            accumulate=accumulate, parallel="no", device="cpu",
        )  # fmt: skip
        report = train(task, loop, tmp_path / str(accumulate))
        curves.append([(line["loss"], line["masked_loss"], line["relation_loss"]) for line in report.log])
        weights.append(task.model.cls.seq_relationship.weight.detach())
    assert curves[0] == [pytest.approx(figures, rel=1e-4) for figures in curves[1]]
    assert all(loss == pytest.approx(masked + relation) for loss, masked, relation in curves[0])
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


def test_relation_sign(text, tokenizer, tmp_path) -> None:
    corpus = prepare(text, tokenizer, tmp_path / "data", recipe())
    task = BertPretraining(corpus, tokenizer, tiny(tokenizer))
    google = task.batch(0)
    assert task.size(google) == int((google.input_ids != tokenizer.pad_token_id).sum())
    ernie = BertPretraining(corpus, tokenizer, tiny(tokenizer), relation_sign="ernie").batch(0)
    assert torch.equal(google.relation, 1 - ernie.relation) and torch.equal(google.input_ids, ernie.input_ids)


@pytest.mark.slow
def test_loss_curve_beside_the_reference(text, tokenizer, tmp_path) -> None:
    """200 steps without dropout: kernels beside plain PyTorch."""
    corpus = prepare(text, tokenizer, tmp_path / "data", recipe(is_dynamic=True))
    curves = []
    for impl in (None, "reference"):
        config = BertConfig(
            **{**vars(tiny(tokenizer)), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        )
        task = BertPretraining(corpus, tokenizer, config, batch_size=8, impl=impl)
        optimizer = torch.optim.AdamW(task.model.parameters(), lr=2e-3)
        task.model.train()
        losses = []
        for step in range(200):
            parts, _ = task.loss(task.model, task.batch(step))
            loss = sum(parts.values())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-20:].mean() < 0.87 * curves[0][:20].mean()
    torch.testing.assert_close(curves[0], curves[1], rtol=5e-3, atol=5e-3)


@pytest.mark.slow
def test_command_killed_and_resumed(text, tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    )
    (tmp_path / "names.txt").write_text("\n".join(ENTITIES) + "\n")
    arguments = [text, "--held-out", text, "--train-vocab", 120, "--config", tmp_path / "config.json"]
    arguments += [
        "--max-seq-length",
        32,
        "--dupe-factor",
        2,
        "--shard-mb",
        0.002,
        "--gazetteer",
        tmp_path / "names.txt",
    ]
    arguments += ["--masking", "token=1,entity=2", "--dynamic", "--batch-size", 8, "--steps", 60, "--device", "cpu"]
    arguments += ["--save-every", 4, "--log-every", 20]
    assert cli.main(["pretrain", "bert", *map(str, arguments), "-o", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().err
    assert "making a vocabulary" in said and "shard 2" in said and "entity_loss" in said, said
    run = tmp_path / "killed"
    for sight in ("data/train/shard-00001", "checkpoint-*"):  # killed while preparing, and while training
        words = ["pretrain", "bert", *arguments, "-o", run]
        process = stopping.start(run / sight, "ctxfast.cli", *words, stderr=subprocess.DEVNULL)
        stopping.await_sight(process)
        process.kill()
        process.wait()
    assert not (run / "final").exists()
    assert cli.main(["pretrain", "bert", *map(str, arguments), "-o", str(run)]) == 0
    assert "(from step" in capsys.readouterr().err
    whole, killed = (torch.load(sorted(path.glob("checkpoint-*"))[-1]) for path in (tmp_path / "whole", run))
    assert all(torch.equal(whole["model"][name], killed["model"][name]) for name in whole["model"])
    arrays = sorted((tmp_path / "whole" / "data").rglob("*.npy"))
    for array in arrays:
        other = run / array.relative_to(tmp_path / "whole")
        assert np.array_equal(np.load(array), np.load(other))
    second = [text, "--init-from", run / "final", "--steps", 2, "--max-seq-length", 32, "--dupe-factor", 1]
    assert cli.main(["pretrain", "bert", *map(str, second), "-o", str(tmp_path / "second"), "--quiet"]) == 0


def test_command_errors(text, tmp_path, capsys) -> None:
    base = [str(text), "-o", str(tmp_path / "run"), "--steps", "1"]
    (tmp_path / "c.json").write_text('{"max_position_embeddings": 64}')
    for more, message in (
        ([], "nothing gives the vocabulary"),
        (["--train-vocab", "100", "--vocab", "v.txt"], "--vocab and --train-vocab gives the vocabulary"),
        (["--train-vocab", "100", "--masking", "phrase"], "nothing finds phrase spans; pass --gazetteer"),
        (["--train-vocab", "100", "--masking", "verb"], "masking has 'verb'"),
        (["--train-vocab", "100", "--masking", "token=x"], "masking has 'token=x'; expected LEVEL=WEIGHT"),
        (["--train-vocab", "100", "--size", "huge"], "size is 'huge'"),
        (["--train-vocab", "100", "--pairs", "both"], "pairs is 'both'"),
        (["--train-vocab", "100", "--held-out", "nowhere"], "--held-out nowhere does not exist"),
        (["--train-vocab", "100", "--held-out", str(tmp_path)], "is a directory; expected a file"),
        (["--train-vocab", "100", "--lr", "0"], "learning_rate is 0.0"),
        (["--train-vocab", "100", "--max-seq-length", "3"], "max_seq_length is 3"),
        (["--train-vocab", "100", "--warmup", "nan"], "--warmup is nan; expected steps, 0 or more, or a share"),
        (["--train-vocab", "100", "--warmup", "inf"], "--warmup is inf"),
        (["--train-vocab", "100", "--seed", "-1"], "seed is -1; expected 0 to 2**63 - 1"),
        (["--train-vocab", "100", "--data-seed", "-1"], "--data-seed is -1; expected 0 or more"),
        (["--train-vocab", "100", "--shard-mb", "nan"], "--shard-mb is nan; expected a number above 0"),
        (["--train-vocab", "100", "--workers", "0"], "--workers is 0; expected 1 or more"),
        (["--train-vocab", "100", "--shard-mb", "-1"], "--shard-mb is -1.0"),
        (["--train-vocab", "100", "--mask-rate", "nan"], "--mask-rate is nan; expected above 0, at most 1"),
        (["--train-vocab", "100", "--mask-rate", "0"], "--mask-rate is 0.0"),
        (["--train-vocab", "100", "--short-seq-prob", "nan"], "short_seq_prob is nan; expected 0.0 to 1.0"),
        (["--train-vocab", "100", "--amp", "fp16", "--device", "cpu"], "amp is 'fp16' on a CPU"),
        (["--train-vocab", "100", "--impl", "nope"], "impl is 'nope'"),
        (["--train-vocab", "100", "--impl", "cuda", "--device", "cpu"], "--impl is 'cuda', but no op has"),
        (["--train-vocab", "100", "--config", str(tmp_path / "c.json"), "--max-seq-length", "65"], "the 64 positions"),
        (["--init-from", "nowhere", "--size", "tiny"], "--size or --config is given with --init-from"),
        (["--init-from", "nowhere"], "is not a model on this machine"),
        (["--vocab", str(tmp_path / "run" / "data"), "--overwrite"], "run holds --vocab"),
        (["--train-vocab", "100", "-o", str(text.parent), "--overwrite"], "holds text "),
    ):
        assert cli.main(["pretrain", "bert", *base, *more]) == 2, more
        said = capsys.readouterr().err
        assert message in said.replace("LEVEL or ", ""), said
        assert "shard 1" not in said, f"text was prepared before {more} was refused"


@pytest.mark.slow
def test_many_processes(text, tmp_path) -> None:
    """The command in two processes, sharded or not: tied weights, dropout and all, they come to the same."""
    (tmp_path / "config.json").write_text(
        json.dumps(dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64))
    )
    arguments = [text, "--held-out", text, "--train-vocab", 120, "--config", tmp_path / "config.json", "--quiet"]
    arguments += ["--max-seq-length", 32, "--dupe-factor", 1, "--batch-size", 8, "--steps", 12, "--device", "cpu"]
    for kind in ("ddp", "fsdp2"):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            + ["-m", "ctxfast.cli", "pretrain", "bert", *map(str, arguments)]
            + ["--parallel", kind, "-o", str(tmp_path / kind)],
            capture_output=True,
            text=True,
            timeout=stopping.PATIENCE_S,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, other = (ctxfast.BertForPreTraining.from_pretrained(tmp_path / kind / "final") for kind in ("ddp", "fsdp2"))
    for (name, value), twin in zip(one.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(value, twin, rtol=1e-3, atol=1e-5, msg=name)
    figures = [
        json.loads((tmp_path / kind / "final" / "training.json").read_text())["figures"] for kind in ("ddp", "fsdp2")
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)
    # The same directory with another number of processes is another run.
    assert cli.main(["pretrain", "bert", *map(str, arguments), "-o", str(tmp_path / "ddp")]) == 2
