# SPDX-License-Identifier: Apache-2.0
"""Tasks of fine-tuning: inputs, windows, heads, what is predicted."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.tiny_models import labels_of, tiny_bert, tiny_roberta

from ctxfast.embedding.embedder import Embedder
from ctxfast.models.bert.tokenization import BertTokenizer
from ctxfast.models.lstm_heads import LstmClassifier, LstmSpanFinder, LstmTagger
from ctxfast.models.token_vectors import Sources
from ctxfast.nn.crf import Crf, bio_rules
from ctxfast.training.readers.conll import Sentence
from ctxfast.training.readers.squad import Answer, Question
from ctxfast.training.readers.tables import read_table
from ctxfast.training.tasks import bert_inputs, features
from ctxfast.training.tasks.bert_inputs import Frame, windows, word_pieces
from ctxfast.training.tasks.build import Choice, build
from ctxfast.training.tasks.classify import check_labels
from ctxfast.training.tasks.features import FrozenLayers, split_words
from ctxfast.training.tasks.predictor import IGNORE, FineTune
from ctxfast.training.tasks.tag import check_tags, tag_names

# CRF


def brute_score(crf, emissions, tags):
    score = crf.start[tags[0]] + crf._begins[tags[0]] + crf.end[tags[-1]] + emissions[0, tags[0]]
    for t in range(1, len(tags)):
        score = score + (crf.transitions + crf._follows)[tags[t - 1], tags[t]] + emissions[t, tags[t]]
    return score


@pytest.mark.parametrize("has_rules", [False, True])
def test_crf_against_all_sequences(has_rules) -> None:
    names = ("O", "B-a", "I-a")
    crf = Crf(3, bio_rules(names) if has_rules else None).double()
    for parameter in crf.parameters():
        torch.nn.init.normal_(parameter)
    lengths = torch.tensor([4, 1, 2, 0])
    emissions = torch.randn(4, 4, 3, dtype=torch.float64)
    tags = torch.tensor([[0, 1, 2, 2], [1, IGNORE, IGNORE, IGNORE], [1, 0, IGNORE, IGNORE], [IGNORE] * 4])
    expected, best = torch.zeros((), dtype=torch.float64), []
    for row, length in enumerate(lengths.tolist()):
        if not length:
            best.append([])
            continue
        scores = {s: brute_score(crf, emissions[row], s) for s in itertools.product(range(3), repeat=length)}
        total = torch.logsumexp(torch.stack(list(scores.values())), 0)
        expected = expected + total - scores[tuple(tags[row, :length].tolist())]
        best.append(list(max(scores, key=scores.get)))
    found = crf(emissions, tags, lengths)
    # The module computes in float32.
    assert torch.allclose(found.double(), expected / 7, rtol=1e-5)
    assert crf.decode(emissions, lengths) == best
    found.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in crf.parameters())


def test_crf_never_breaks_the_rules() -> None:
    names = ("O", "B-a", "I-a", "B-b", "I-b")
    crf = Crf(5, bio_rules(names))
    for row in crf.decode(5 * torch.randn(50, 9, 5), torch.full((50,), 9)):
        for before, after in zip(["O", *(names[k] for k in row)], (names[k] for k in row)):
            assert not after.startswith("I-") or before[2:] == after[2:], (before, after)


# Heads


def test_lstm_heads_do_not_see_padding() -> None:
    torch.manual_seed(0)
    tagger = LstmTagger(Sources(3, 6), ("O", "B-a", "I-a"), hidden_size=4, marks_predicate=True).eval()
    classifier = LstmClassifier(Sources(3, 6), 2, hidden_size=4).eval()
    layers, lengths = torch.randn(2, 3, 5, 6), torch.tensor([5, 3])
    predicate = torch.tensor([[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    alone = tagger(layers[1:, :, :3], lengths[1:], predicate[1:, :3]).logits
    together = tagger(layers, lengths, predicate).logits
    text = classifier(layers[1:, :, :3], lengths[1:]).logits
    assert torch.allclose(classifier(layers, lengths).logits[1:], text, atol=1e-6)
    assert torch.allclose(together[1:, :3], alone, atol=1e-6)
    other = tagger(layers, lengths, 1 - predicate).logits
    assert not torch.allclose(other, together, atol=1e-3)
    finder = LstmSpanFinder(Sources(3, 6), hidden_size=4).eval()
    layers, lengths = torch.randn(4, 3, 5, 6), torch.tensor([5, 3, 2, 4])  # two texts, then their two questions
    both, one = finder(layers, lengths), finder(layers[1::2], lengths[1::2])
    for padded, alone in ((both.start_logits, one.start_logits), (both.end_logits, one.end_logits)):
        assert torch.allclose(padded[1, :4], alone[0, :4], atol=1e-6) and (padded[1, 4:] < -1e30).all()


# Windows


@pytest.mark.parametrize("sizes", [[1] * 5, [1] * 23, [3, 1, 4, 1, 5, 2, 6, 5, 3, 5], [10] * 7, [1, 9, 1, 9, 9, 1]])
def test_windows_own_every_word_once(sizes) -> None:
    found = windows(sizes, 10)
    assert all(sum(sizes[window.start : window.end]) <= 10 for window in found)
    owned = [word for window in found for word in range(window.own_start, window.own_end)]
    assert owned == list(range(len(sizes)))
    for window in found:
        assert window.start <= window.own_start <= window.own_end <= window.end


def test_long_sentences_in_windows(bert) -> None:
    """A word's tag does not depend on how the sentence is cut into windows when the model sees one word."""
    words = ["anna", "went", "to", "paris"] * 30
    predictor = build("tag", bert, ("O", "B-PER", "I-PER"), Choice(max_length=16))
    sentence = Sentence(words, ["B-PER", "O", "O", "O"] * 30, None, 1)
    rows = predictor.items([sentence])
    assert len(rows) > 5 and max(row.length for row in rows) <= 16
    labelled = [label for row in rows for label in row.labels if label != IGNORE]
    assert len(labelled) == len(words) and labelled.count(1) == 30
    (tags,) = predictor.predict([sentence])
    assert len(tags) == len(words) and "" not in tags


def test_words_without_pieces_are_unknown(bert) -> None:
    tokenizer = BertTokenizer.from_pretrained(bert)
    (pieces,) = word_pieces(tokenizer, [["\u200b\u0000", "anna", "\x01"]])
    assert pieces[0] == pieces[2] == [tokenizer.unk_token_id] and len(pieces[1]) == 2


# Inputs of BERT


def test_tags_stand_at_first_pieces(bert) -> None:
    predictor = build("tag", bert, ("O", "B-PER", "I-PER"))
    (row,) = predictor.items([Sentence(["anna", "saw", "carla"], ["B-PER", "O", "B-PER"], None, 1)])
    assert predictor.tokenizer.tokens(row.ids) == ["[CLS]", "an", "##na", "saw", "ca", "##rla", "[SEP]"]
    assert row.labels == [IGNORE, 1, IGNORE, 0, 1, IGNORE, IGNORE]


@pytest.mark.parametrize("how", ["type", "sep"])
def test_predicate_is_marked(bert, how) -> None:
    predictor = build("tag", bert, ("O", "B-V"), Choice(predicate=how))
    sentence = Sentence(["bob", "saw", "carla"], ["O", "B-V", "O"], [False, False, True], 1)
    (row,) = predictor.items([sentence])
    tokens = predictor.tokenizer.tokens(row.ids)
    if how == "type":
        assert tokens == ["[CLS]", "bob", "saw", "ca", "##rla", "[SEP]"] and row.types == [0, 0, 0, 1, 1, 0]
    else:
        assert tokens == ["[CLS]", "bob", "saw", "ca", "##rla", "[SEP]", "ca", "##rla", "[SEP]"]
        assert row.types == [0] * 6 + [1] * 3
    assert row.labels[:4] == [IGNORE, 0, 1, 0] and set(row.labels[4:]) == {IGNORE}


@pytest.mark.parametrize(
    "choice", [Choice(predicate="type"), Choice(predicate="sep"), Choice("last", predicate="type")]
)
def test_a_predicate_is_needed_where_it_is_marked(bert, choice) -> None:
    predictor = build("tag", bert, ("O", "B-V"), choice)
    with pytest.raises(ValueError, match="expected --predicate-column"):
        predictor.items([Sentence(["bob"], None, None, 1)])


@pytest.mark.parametrize("make", [tiny_bert, tiny_roberta])
def test_frames_are_those_of_the_tokenizer(tmp_path, make) -> None:
    tokenizer = BertTokenizer.from_pretrained(make(tmp_path / "model"))
    frame = Frame(tokenizer)
    first, second = tokenizer.encode("bob saw"), tokenizer.encode("the sea")
    both = tokenizer.encode("bob saw", "the sea")
    row = frame.row(first.ids[1:-1], second.ids[1:-1])
    assert (row.ids, row.types) == (both.ids, both.type_ids)
    assert frame.row(first.ids[1:-1]).ids == first.ids
    assert frame.room(len(both), True) == len(first.ids[1:-1]) + len(second.ids[1:-1])


def test_roberta(tmp_path) -> None:
    """Words have a space before them, two separators stand between texts, there is one token type."""
    folder = tiny_roberta(tmp_path / "model")
    predictor = build("tag", folder, ("O", "B-x", "I-x"), Choice(predicate="sep"))
    (row,) = predictor.items([Sentence(["a", "at"], ["B-x", "O"], [True, False], 1)])
    assert predictor.tokenizer.tokens(row.ids) == ["<s>", "Ġa", "Ġa", "t", "</s>", "</s>", "Ġa", "</s>"]
    assert set(row.types) == {0} and row.labels == [IGNORE, 1, 0, *[IGNORE] * 5]
    with pytest.raises(ValueError, match="the model has one token type; expected 'sep'"):
        build("tag", folder, ("O", "B-x", "I-x"), Choice(predicate="type"))


@pytest.mark.parametrize("task", ["tag", "classify", "pair", "span"])
def test_texts_are_encoded_in_parts(bert, data, task, monkeypatch) -> None:
    """Encodings of a large file must not exist all at once; what comes of them is the same."""
    choice = Choice(max_length=48, doc_stride=8, max_query=8) if task == "span" else Choice()
    predictor = build(task, bert, labels_of(task, data[task]), choice)
    whole = predictor.items(data[task])
    sizes = []
    encode = BertTokenizer._encode
    monkeypatch.setattr(
        BertTokenizer, "_encode", lambda own, texts, *a, **k: sizes.append(len(texts)) or encode(own, texts, *a, **k)
    )
    monkeypatch.setattr(bert_inputs, "_ENCODED_TEXTS", 5)
    parts = predictor.items(data[task])
    assert [(row.ids, row.types, row.labels) for row in parts] == [(row.ids, row.types, row.labels) for row in whole]
    assert max(sizes) == 5 and sum(sizes) >= len(data[task])


# Answers


def test_windows_of_a_text_and_the_place_of_the_answer(bert) -> None:
    context = " ".join(["the", "sea"] * 40 + ["anna"] + ["boat"] * 20)
    finder = build("span", bert, (), Choice(max_length=32, doc_stride=8, max_query=8))
    question = Question("q", "who ?", context, (Answer("anna", context.index("anna")),), False)
    rows = finder.items([question])
    assert max(row.length for row in rows) == 32
    hits = [row for row in rows if row.labels != (0, 0)]
    assert len(hits) >= 2
    for row in hits:
        first, last = row.labels
        assert finder.tokenizer.tokens(row.ids[first : last + 1]) == ["an", "##na"]
    covered = {row.data.start + k for row in rows for k in range(row.data.size)}
    assert covered == set(range(102))


class _Fixed(torch.nn.Module):
    """Logits that say: this span, in every window that holds it."""

    def __init__(self, ids, null=0.0):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1))
        self.ids, self.null = ids, null

    def forward(self, input_ids, **_):
        from ctxfast.models.bert.heads import SpanOutput

        start, end = torch.zeros(input_ids.shape), torch.zeros(input_ids.shape)
        start[input_ids == self.ids[0]] = 5.0
        end[input_ids == self.ids[1]] = 4.0
        start[:, 0] = self.null
        return SpanOutput(None, start, end, None)


def test_decoding_of_answers(bert) -> None:
    context = " ".join(["the", "Sea"] * 20 + ["anna"] + ["boat"] * 20)
    finder = build("span", bert, (), Choice(max_length=32, doc_stride=8, max_query=8, n_best=5))
    question = Question("q", "who ?", context, (Answer("anna", context.index("anna")),), False)
    ids = [finder.tokenizer.token_to_id(token) for token in ("an", "##na")]
    finder.model = _Fixed(ids)
    (finding,) = finder.predict([question])
    assert finding.answer == "anna" and finding.spans[0].score == 9.0
    assert sum(span.probability for span in finding.spans) == pytest.approx(1.0) and len(finding.spans) <= 5
    assert len({span.text for span in finding.spans}) == len(finding.spans)
    assert finder.scores([question], [finding])["exact"] == 1.0
    finder.model = _Fixed(ids, null=9.5)
    (finding,) = finder.predict([question])
    assert finding.answer == "" and finding.null_odds == pytest.approx(0.5) and finding.spans[0].text == "anna"
    finder.null_threshold = None
    assert finder.predict([question])[0].answer == "anna"
    # The text of an answer is the context's own, with its capitals.
    question = Question("q", "who ?", "The Sea saw anna", (), False)
    finder.model = _Fixed([finder.tokenizer.token_to_id("sea"), finder.tokenizer.token_to_id("saw")])
    assert finder.predict([question])[0].answer == "Sea saw"


def test_an_answer_keeps_its_accents(bert) -> None:
    """Also a last one that is a character of its own, which the tokenizer strips."""
    finder = build("span", bert, (), Choice(max_length=32, doc_stride=8, max_query=8))
    finder.model = _Fixed([finder.tokenizer.token_to_id("saw")] * 2)
    question = Question("q", "who ?", "the sa\u0301w\u0301 bob", (), False)
    assert finder.predict([question])[0].answer == "sa\u0301w\u0301"


def test_an_answer_has_no_space_around_it(bert) -> None:
    """SentencePiece's tokens begin with the space before a word."""
    finder = build("span", bert, (), Choice(max_length=32, doc_stride=8, max_query=8))
    finder.model = _Fixed([finder.tokenizer.token_to_id(token) for token in ("sea", "saw")])
    question = Question("q", "who ?", "the sea saw bob", (), False)
    (row,) = finder.items([question])
    row.data.offsets = [(0, 3), (3, 7), (7, 11), (11, 15)]
    assert finder.predict([question], [row])[0].answer == "sea saw"


def test_no_answer_is_longer_than_allowed(bert) -> None:
    context = "anna " + "the " * 8 + "boat"
    finder = build("span", bert, (), Choice(max_length=32, doc_stride=8, max_query=8, max_answer=3))
    finder.model = _Fixed([finder.tokenizer.token_to_id("an"), finder.tokenizer.token_to_id("boat")])
    (finding,) = finder.predict([Question("q", "who ?", context, (), False)])
    tokens = [len(finder.tokenizer.tokenize(span.text)) for span in finding.spans]
    assert tokens and max(tokens) <= 3


# Frozen layers


@pytest.mark.parametrize("which", ["last", "second-to-last", "sum4", "concat4", "embeddings", "mix4", "mix"])
def test_features_of_bert(bert, which) -> None:
    embedder = Embedder(bert)
    words = ["anna", "saw", "the", "sea"]
    (everything,) = embedder([words], layers="all")
    expected = {
        "last": everything[-1:],
        "second-to-last": everything[-2:-1],
        "sum4": everything[-4:].sum(0, keepdims=True),
        "concat4": everything[-4:].transpose(1, 0, 2).reshape(1, 4, -1),
        "embeddings": everything[:1],
        "mix4": everything[-4:],
        "mix": everything,
    }[which]
    frozen = FrozenLayers(embedder, which)
    found, other = frozen([words, ["bob"]])
    assert found.shape == (frozen.num_layers, 4, frozen.dim) and other.shape[1] == 1
    assert abs(found - expected).max() < 1e-6


def test_features_of_sentences_longer_than_the_model(bert) -> None:
    frozen = FrozenLayers(Embedder(bert), "last")
    (found,) = frozen([["anna", "saw"] * 100])
    assert found.shape == (1, 200, 32) and (abs(found).sum(-1) > 0).all()


def test_layers_are_computed_in_parts(bert, data, monkeypatch) -> None:
    """Where only the sum of four layers is kept, the four of all texts must not exist at once."""
    texts = [sentence.words for sentence in data["tag"]]
    frozen = FrozenLayers(Embedder(bert), "sum4")
    whole, sizes = frozen(texts), []
    some = FrozenLayers._some
    monkeypatch.setattr(FrozenLayers, "_some", lambda own, part: sizes.append(len(part)) or some(own, part))
    monkeypatch.setattr(features, "_EMBEDDED_TEXTS", 5)
    for one, other in zip(frozen(texts), whole, strict=True):
        assert abs(one - other).max() < 1e-5
    assert sizes == [5, 5, 2]


def test_words_of_texts() -> None:
    text = "It's \u4f60\u597d\uff0c\u30c6x 3.5 \u0939\u093f\u0928\u094d cafe\u0301! \ud800\u3000z"
    words = split_words(text)
    assert [word for word, _ in words][:5] == ["It's", "\u4f60", "\u597d", "\uff0c", "\u30c6"]
    assert [word for word, _ in words][5:] == ["x", "3.5", "\u0939\u093f\u0928\u094d", "cafe\u0301!", "\ufffd", "z"]
    signs = split_words(text, at_signs=True)
    assert [word for word, _ in signs][:3] == ["It", "'", "s"] and ("cafe\u0301", (20, 25)) in signs
    for word, (start, end) in (*words, *signs):
        assert text[start:end] in (word, "\ud800")
    assert split_words(" \t") == []


@pytest.mark.parametrize("choice", [Choice("last", hidden_size=8), Choice(max_length=32, doc_stride=8, max_query=8)])
def test_an_answer_in_chinese_is_a_part_of_its_sentence(bert, choice) -> None:
    """Words without spaces are no single word, which no part could be the answer of."""
    context = "\u5317\u4eac\u662f\u4e2d\u56fd\u7684\u9996\u90fd\u3002"
    answer = context[3:5]
    finder = build("span", bert, (), choice)
    (item,) = finder.items([Question("q", "\u54ea\u91cc\uff1f", context, (Answer(answer, 3),), False)])
    place = item.data.place
    start, end = item.labels[0] - place, item.labels[1] - place
    assert context[item.data.offsets[start][0] : item.data.offsets[end][1]] == answer


# Labels and choices


def test_tag_names() -> None:
    sentences = [Sentence(["a", "b"], ["B-x", "O"], None, 1), Sentence(["a"], ["I-y"], None, 4)]
    assert tag_names(sentences) == ("O", "B-x", "I-x", "B-y", "I-y")
    assert tag_names([Sentence(["a", "b"], ["VERB", "NOUN"], None, 1)]) == ("NOUN", "VERB")


def test_unseen_labels_are_named_with_their_line(data) -> None:
    with pytest.raises(ValueError, match="dev.tsv, line 8: label 'B-z' does not occur in the training data"):
        check_tags("dev.tsv", [Sentence(["a", "b"], ["O", "B-z"], None, 7)], ("O", "B-x", "I-x"))
    with pytest.raises(ValueError, match="dev.tsv, line 2: label '(positive|negative)'; expected a finite number"):
        check_labels("dev.tsv", data["classify"], ())


def test_an_unseen_tag_is_not_learned_and_counts_as_wrong(bert) -> None:
    predictor = build("tag", bert, ("O", "B-x", "I-x"))
    sentence = Sentence(["bob", "saw"], ["B-new", "O"], None, 1)
    (row,) = predictor.items([sentence])
    assert row.labels == [IGNORE, IGNORE, 0, IGNORE]
    assert predictor.scores([sentence], [["O", "O"]])["recall"] == 0.0


def test_regression(bert, tmp_path) -> None:
    (tmp_path / "a.tsv").write_text("text\tscore\nbob\t1.5\nthe sea\t3\na boat\t0\n")
    examples = read_table(tmp_path / "a.tsv")
    predictor = build("classify", bert)
    batch = predictor.collate(predictor.items(examples))
    assert batch["labels"].tolist() == [1.5, 3.0, 0.0]
    assert math.isfinite(predictor.model(**batch).loss.item())
    scores = predictor.scores(examples, predictor.predict(examples))
    assert set(scores) == {"pearson", "spearman", "mse"}


@pytest.mark.parametrize(
    ("task", "model", "choice", "reason"),
    [
        ("tag", "bert", Choice(crf=True), "crf is asked for with all of BERT trained"),
        ("classify", "bert", Choice(crf=True, features="mix"), "crf is asked for with task 'classify'"),
        ("span", "elmo", Choice(crf=True), "crf is asked for with task 'span'"),
        ("tag", "elmo", Choice(features="concat4"), "has 3 layers; expected 4 or more"),
        ("tag", "bert", Choice(features="first"), "features is 'first'"),
        ("tag", "bert", Choice(max_length=65), "max_length is 65; expected 16 to 64"),
        ("span", "bert", Choice(max_length=48, max_query=44), "doc_stride is 128"),
        ("span", "bert", Choice(max_length=65), "max_length is 65; expected 4 to 64, the model's limit"),
        ("classify", "bert", Choice(max_length=65), "max_length is 65; expected 4 to 64, the model's limit"),
        ("tag", "elmo", Choice(max_length=64), "max_length is given with features, ELMo or words alone"),
        ("parse", "bert", Choice(), "task is 'parse'"),
        ("pair", "bert", Choice(features="mix", head="bcn"), "head is 'bcn'; expected one of lstm, esim"),
        ("tag", "bert", Choice(features="mix", head="highway", crf=True), "crf is asked for with head 'highway'"),
        ("tag", "bert", Choice(head="highway"), "head is 'highway' with all of BERT trained"),
        ("tag", "bert", Choice(words="chars"), "words are chosen with all of BERT trained"),
    ],
)
def test_choices_that_cannot_be(task, model, choice, reason, request) -> None:
    with pytest.raises(ValueError, match=reason):
        build(task, request.getfixturevalue(model), ("O", "B-a", "I-a"), choice)


def test_vectors_that_do_not_fit_are_computed_for_each_batch(bert, data, monkeypatch) -> None:
    batches = []
    for most in (1 << 30, 0):
        monkeypatch.setattr(features, "_KEPT_BYTES", most)
        predictor = build("tag", bert, tag_names(data["tag"]), Choice("mix", hidden_size=8))
        task = FineTune(predictor, data["tag"], batch_size=5)
        assert all((item.vectors is None) == (most == 0) for item in task.items)
        batches.append(task.batch(0, 0, 1))
    for name, value in batches[0].items():
        assert torch.allclose(value, batches[1][name], atol=1e-6), name


@pytest.mark.parametrize("task", ["tag", "classify", "pair", "span"])
def test_evaluation_is_that_of_predictions(bert, data, task) -> None:
    """Twice, as the second time the examples are not read again; the model is left in training mode."""
    choice = Choice(max_length=48, doc_stride=8, max_query=8) if task == "span" else Choice()
    predictor = build(task, bert, labels_of(task, data[task]), choice)
    fine_tune = FineTune(predictor, data[task], data[task][::2], batch_size=4, order="length")
    expected = predictor.scores(data[task][::2], predictor.predict(data[task][::2]))
    predictor.model.train()
    assert fine_tune.evaluate(predictor.model) == fine_tune.evaluate(predictor.model) == expected
    assert predictor.model.training
