# SPDX-License-Identifier: Apache-2.0
"""Fine-tuned models in files: read back here, read by Hugging Face, and Hugging Face's read here."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import labels_of, tiny_bert, tiny_roberta

from ctxfast.models.bert.tokenization import BertTokenizer
from ctxfast.training.readers.tables import Example
from ctxfast.training.tasks.build import Choice, build, load, word_table
from ctxfast.training.tasks.predictor import FineTune


@pytest.mark.parametrize(
    ("task", "model", "choice"),
    [
        ("tag", "bert", Choice()),
        ("tag", "bert", Choice(features="concat4", crf=True, hidden_size=8)),
        ("tag", "elmo", Choice(features="mix", hidden_size=8)),
        ("tag", "elmo", Choice(crf=True, hidden_size=8)),
        ("tag", None, Choice(words="chars", crf=True, hidden_size=8)),
        ("tag", "bert", Choice(features="mix", words="chars,learned", mix_norm=True, mix_l2=0.1, hidden_size=8)),
        ("classify", None, Choice(words="learned", word_dim=5, hidden_size=8)),
        ("pair", "bert", Choice(features="sum4", words="chars", hidden_size=8)),
        ("span", None, Choice(words="chars,learned", hidden_size=8, lstm_layers=1)),
        ("tag", None, Choice(words="chars", head="highway", lstm_layers=3, hidden_size=8)),
        ("classify", "bert", Choice(features="mix", head="bcn", output_mix=True, hidden_size=8)),
        ("classify", "elmo", Choice(head="bcn", output_mix=True, hidden_size=8)),
        ("pair", None, Choice(words="learned", head="esim", hidden_size=8)),
        ("span", "bert", Choice(features="mix", head="bidaf", output_mix=True, hidden_size=8)),
        ("classify", "bert", Choice(max_length=32)),
        ("classify", "elmo", Choice(hidden_size=8)),
        ("pair", "bert", Choice()),
        ("pair", "bert", Choice(features="sum4", hidden_size=8)),
        ("pair", "elmo", Choice(hidden_size=8)),
        ("span", "bert", Choice(max_length=48, doc_stride=8, max_query=8)),
        ("span", "bert", Choice(features="mix", hidden_size=8, lstm_layers=1)),
        ("span", "elmo", Choice(hidden_size=8, lstm_layers=1, null_threshold=None)),
    ],
    ids=lambda value: value if isinstance(value, str | None) else (value.features or value.words or "all"),
)
def test_a_stored_model_predicts_the_same(task, model, choice, data, request, tmp_path) -> None:
    examples = data[task]
    encoder = None if model is None else request.getfixturevalue(model)
    table = word_table(task, examples, choice)
    predictor = build(task, encoder, labels_of(task, examples), choice, table=table)
    fine_tune = FineTune(predictor, examples, batch_size=5)
    loss, _ = fine_tune.loss(predictor.model, fine_tune.batch(0, 0, 1))
    loss.backward()
    with torch.no_grad():  # so that what is stored is not what was built
        for parameter in predictor.model.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-0.5)
    fine_tune.save(tmp_path)
    again = load(tmp_path)
    assert (again.task, again.form, again.options) == (predictor.task, predictor.form, predictor.options)
    first, second = predictor.predict(examples), again.predict(examples)
    if model == "elmo":  # a forget bias returns within 6e-8
        assert predictor.scores(examples, first) == again.scores(examples, second)
    else:
        assert first == second
    paths = again.write_predictions(tmp_path / "out" / "predictions.txt", examples, second)
    assert all(path.stat().st_size > 0 for path in paths)


@pytest.mark.parametrize("make", [tiny_bert, tiny_roberta])
@pytest.mark.parametrize("task", ["tag", "classify", "pair", "span"])
def test_hugging_face_reads_what_was_stored(task, make, data, tmp_path) -> None:
    """The Auto classes open it and give the same logits, from ids that their tokenizer gives, too."""
    import transformers

    choice = Choice(max_length=60, doc_stride=8, max_query=16) if task == "span" else Choice()
    predictor = build(task, make(tmp_path / "model"), labels_of(task, data[task]), choice)
    predictor.save(tmp_path / "out")
    kind = {"tag": "TokenClassification", "span": "QuestionAnswering"}.get(task, "SequenceClassification")
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "out").eval()
    if task != "span":
        assert model.config.id2label == dict(enumerate(predictor.labels))
    rows = predictor.items(data[task][:1])
    batch = predictor.collate(rows[:1])
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "token_type_ids")}
    with torch.no_grad():
        theirs, ours = model(**inputs), predictor.model.eval()(**inputs)
    for name in ("start_logits", "end_logits") if task == "span" else ("logits",):
        assert torch.allclose(getattr(theirs, name), getattr(ours, name), atol=1e-5), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    example = data[task][0]
    if task == "span":
        ids = tokenizer(example.question, example.context, truncation="only_second", max_length=60)["input_ids"]
    elif task == "tag":  # RoBERTa's needs to be told of the spaces between words
        ids = tokenizer(" " + " ".join(example.words))["input_ids"]
    else:
        ids = tokenizer(example.text, example.pair)["input_ids"]
    assert ids == rows[0].ids


def test_a_cased_model_stays_cased(tmp_path) -> None:
    """Hugging Face lower-cases unless tokenizer_config.json says no, whatever tokenizer.json has."""
    import transformers

    build("classify", tiny_bert(tmp_path / "tiny-cased"), ("x", "y")).save(tmp_path / "out")
    words = ["Bob", "bob", "Paris"]
    tokenizer = BertTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize(" ".join(words)) == ["[UNK]", "bob", "[UNK]"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.tokenize(" ".join(words)) == ["[UNK]", "bob", "[UNK]"]


@pytest.mark.parametrize("task", ["tag", "classify", "pair", "span"])
def test_a_model_that_hugging_face_fine_tuned_predicts(task, bert, data, tmp_path) -> None:
    """Labels in its own order; what it gives is what Hugging Face's model and tokenizer give."""
    import transformers

    names = list(reversed(labels_of(task, data[task])))
    kind = {"tag": "TokenClassification", "span": "QuestionAnswering"}.get(task, "SequenceClassification")
    torch.manual_seed(0)
    options = (
        {} if task == "span" else {"id2label": dict(enumerate(names)), "label2id": {n: k for k, n in enumerate(names)}}
    )
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(bert, **options).eval()
    model.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    tokenizer.save_pretrained(tmp_path)
    changes = {"max_length": 60, "doc_stride": 8, "max_query": 8} if task == "span" else {}
    predictor = load(tmp_path, task=task, changes=changes)
    assert (predictor.task, predictor.labels) == (task, tuple(names))
    found = predictor.predict(data[task])
    for example, one in zip(data[task], found, strict=True):
        if task == "tag":
            encoded = tokenizer(example.words, is_split_into_words=True, return_tensors="pt")
            first = [encoded.word_ids().index(k) for k in range(len(example.words))]
            assert one == [names[k] for k in model(**encoded).logits[0, first].argmax(-1).tolist()]
        elif task == "span":
            encoded = tokenizer(example.question, example.context, return_tensors="pt")
            output, size = model(**encoded), encoded["input_ids"].shape[1]
            begin = encoded.sequence_ids().index(1)
            start, end = output.start_logits[0].detach(), output.end_logits[0].detach()
            pairs = [(float(start[a] + end[b]), a, b) for a in range(begin, size - 1) for b in range(a, size - 1)]
            score, a, b = max(pairs)
            assert one.spans[0].score == pytest.approx(score, abs=1e-4) and one.answer == one.spans[0].text
            assert one.null_score == pytest.approx(float(start[0] + end[0]), abs=1e-4)
            text = example.context[encoded.token_to_chars(a).start : encoded.token_to_chars(b).end]
            assert one.answer == text
        else:
            logits = model(**tokenizer(example.text, example.pair, return_tensors="pt")).logits[0].detach()
            assert one.label == names[int(logits.argmax())]
            assert one.probability == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
    predictor.save(tmp_path / "again")
    assert load(tmp_path / "again").predict(data[task]) == found


def test_models_of_other_kinds_are_refused(bert, tmp_path) -> None:
    build("tag", bert, ("O", "B-a", "I-a")).save(tmp_path)
    with pytest.raises(ValueError, match="is one for 'tag'; expected one for 'classify'"):
        load(tmp_path, task="classify")
    (tmp_path / "ctxfast_task.json").unlink()
    with pytest.raises(ValueError, match="is one for 'tag'; expected one for 'pair'"):
        load(tmp_path, task="pair")
    build("classify", bert, ("x", "y")).save(tmp_path / "several")
    (tmp_path / "several" / "ctxfast_task.json").unlink()
    config = json.loads((tmp_path / "several" / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (tmp_path / "several" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="gives a text several labels"):
        load(tmp_path / "several")
    # To train on from it is another matter: the labels are those of the data.
    again = build("classify", tmp_path / "several", ("x", "y"))
    batch = again.collate(again.items([Example("bob", None, "y", 1)]))
    assert math.isfinite(again.model(**batch).loss.item())
    assert again.model.config.to_dict()["problem_type"] == "single_label_classification"


def test_a_classifier_of_the_same_names_is_kept_in_their_order(bert, tmp_path) -> None:
    first = build("classify", bert, ("no", "maybe", "yes"))
    first.save(tmp_path)
    old = first.model.classifier.weight
    assert torch.equal(build("classify", tmp_path, ("maybe", "no", "yes")).model.classifier.weight, old[[1, 0, 2]])
    other = build("classify", tmp_path, ("a", "b", "c")).model.classifier.weight
    assert not torch.allclose(other, old, atol=1e-3), "a classifier of other labels starts anew"


@pytest.mark.parametrize("task", ["classify", "pair", "tag"])
@pytest.mark.parametrize("choice", [Choice(), Choice("last", hidden_size=8)], ids=["bert", "features"])
def test_one_label_is_nothing_to_learn(task, choice, bert) -> None:
    """With a single class BERT's head would fit numbers in silence."""
    with pytest.raises(ValueError, match="labels is 'x' alone; expected two or more"):
        build(task, bert, ("x",), choice)


def test_an_lstm_head_is_not_trained_on(bert, tmp_path) -> None:
    build("tag", bert, ("O", "B-a", "I-a"), Choice("last", hidden_size=8)).save(tmp_path)
    with pytest.raises(ValueError, match="is a finished one with an LSTM over its encoder.*encoder"):
        build("tag", tmp_path, ("O", "B-a", "I-a"))
    assert build("tag", tmp_path / "encoder", ("O", "B-a", "I-a")).form == "bert"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"format": 1,', "is damaged"),
        ("[1]", "holds a JSON list; expected an object"),
        ("{}", "has format None; expected 1"),
        ('{"format": 2}', "has format 2; expected 1"),
        ('{"format": 1, "task": "tag", "form": "bert"}', "has no labels, options"),
    ],
)
def test_settings_that_are_wrong(bert, tmp_path, text, reason) -> None:
    build("tag", bert, ("O", "B-a", "I-a")).save(tmp_path)
    (tmp_path / "ctxfast_task.json").write_text(text)
    with pytest.raises(ValueError, match=f"ctxfast_task.json {reason}"):
        load(tmp_path)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A stored model of each form, to be copied."""
    folder = tmp_path_factory.mktemp("stored")
    build("tag", tiny_bert(folder / "b"), ("O", "B-a", "I-a")).save(folder / "bert")
    build("tag", folder / "b", ("O", "B-a", "I-a"), Choice("last", hidden_size=8)).save(folder / "features")
    return folder


_OWN = [  # form, changes of the settings, changes of the head's sizes, what is said
    ("bert", {"task": 3}, {}, "task in .* is 3; expected one of classify"),
    ("bert", {"task": "x" * 9000}, {}, "task in .* is 'xxx"),
    ("bert", {"form": []}, {}, r"form in .* is \[\]; expected one of bert"),
    ("bert", {"labels": 3}, {}, "labels in .* is 3; expected a list of different names"),
    ("bert", {"labels": ["O", ["B-a"]]}, {}, "labels in .* expected a list of different names"),
    ("bert", {"labels": ["O", "O", "B-a"]}, {}, "labels in .* expected a list of different names"),
    ("bert", {"labels": ["O", "B-b", "I-b"]}, {}, "no trained head for 'tag' and labels O, B-b, I-b"),
    ("bert", {"labels": ["O", "B-a"]}, {}, "no trained head for 'tag'"),
    ("bert", {"task": "span", "labels": []}, {}, "no trained head for 'span'"),
    ("bert", {"options": "x"}, {}, "options in .* is 'x'; expected an object"),
    ("bert", {"options": {"max_length": 64.5}}, {}, "max_length in .* is 64.5; expected a whole number"),
    ("bert", {"options": {"max_length": 10**30}}, {}, "max_length is 1000.*expected 16 to"),
    ("bert", {"options": {"is_spans": 1}}, {}, "is_spans in .* is 1; expected true or false"),
    ("bert", {"options": {"predicate": "x"}}, {}, "predicate is 'x'; expected one of"),
    ("bert", {"options": {"colour": 1}}, {}, "colour in .* is 1; expected no such option"),
    ("bert", {"options": {"head": {}}}, {}, "head in .* expected the head's sizes"),
    ("features", {"options": {"features": "last"}}, {}, "head in .* is None; expected the head's sizes"),
    ("features", {"options": {"features": "x", "head": {}}}, {}, "features in .* is 'x'; expected one of last"),
    ("features", {}, {"hidden_size": 10**9}, "recurrent weights of .*hidden_size 1000000000"),
    ("features", {}, {"hidden_size": True}, "hidden_size in .* is True; expected a whole number"),
    ("features", {}, {"lstm_layers": 10**9}, "has 2 LSTM layers .* lstm_layers 1000000000"),
    ("features", {}, {"lstm_layers": -1}, "lstm_layers is -1; expected 1 or more"),
    ("features", {}, {"dropout": float("nan")}, "dropout is nan; expected a probability"),
    ("features", {}, {"crf": True}, "head.safetensors has no .*; expected the head that ctxfast_task.json"),
    ("features", {}, {"marks_predicate": True}, r"reader.lstm.weight_ih_l0 in .*\(32, 32\); expected .*\(32, 132\)"),
    ("features", {"task": "classify"}, {}, "head.safetensors has no dense.bias"),
    ("features", {"labels": ["O", "B-a"]}, {}, r"classifier.bias in .*\(3,\); expected .*\(2,\)"),
]


@pytest.mark.parametrize(("form", "changes", "sizes", "said"), _OWN)
def test_settings_are_held_against_the_files(stored, tmp_path, form, changes, sizes, said) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stored / form, folder)
    file = folder / "ctxfast_task.json"
    settings = {**json.loads(file.read_text()), **changes}
    if sizes:
        settings["options"]["head"].update(sizes)
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=said) as caught:
        load(folder)
    assert str(caught.value).startswith("ctxfast.") and str(file) in str(caught.value) and len(str(caught.value)) < 900


def test_a_head_that_is_damaged_or_absent(stored, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stored / "features", folder)
    file = folder / "head.safetensors"
    whole = file.read_bytes()
    tensors = {name: value.clone() for name, value in load_file(file).items()}  # not in a map of the file
    for data in (b"", whole[:7], whole[:200], whole[:-1], b"\xff" * 300):
        file.write_bytes(data)
        with pytest.raises(ValueError, match="ctxfast.finetune: .*head.safetensors is damaged, cut short or no"):
            load(folder)
    for change, said in (
        ({"x": torch.zeros(1)}, "also holds x"),
        ({"classifier.bias": torch.zeros(4)}, r"classifier.bias in .*\(4,\); expected"),
        ({"classifier.bias": torch.zeros(3, dtype=torch.int64)}, "classifier.bias in .* is torch.int64"),
    ):
        save_file({**tensors, **change}, file)
        with pytest.raises(ValueError, match=said):
            load(folder)
    save_file({**tensors, "classifier.bias": torch.full((3,), float("nan"))}, file)
    with pytest.warns(UserWarning, match="classifier.bias in .* holds NaN"):
        load(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="head.safetensors does not exist"):
        load(folder)


def test_loading_names_what_is_missing(bert, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="has no ctxfast_task.json"):
        load(tmp_path)
    build("tag", bert, ("O", "B-a", "I-a")).save(tmp_path / "best")
    with pytest.raises(FileNotFoundError, match="Did you mean .*best"):
        load(tmp_path)
