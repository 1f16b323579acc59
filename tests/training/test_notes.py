# SPDX-License-Identifier: Apache-2.0
"""What is read is said: rows left out, labels, columns and answers that look odd, what a model does not see."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
from support.tiny_models import questions, tagged, tiny_bert

from ctxfast.cli import main
from ctxfast.training.readers.conll import read_conll
from ctxfast.training.readers.notes import class_notes
from ctxfast.training.readers.squad import read_squad
from ctxfast.training.readers.tables import TableFormat, read_table


def write(folder, name, text):
    path = folder / name
    path.write_text(text if isinstance(text, str) else "".join(json.dumps(row) + "\n" for row in text))
    return path


def table(*rows: str, names: str = "text\tlabel") -> str:
    return "\n".join((names, *rows)) + "\n"


SNLI = "gold_label\tsentence1\tsentence2"
GOLD = [{"gold_label": label, "sentence1": "a", "sentence2": "b"} for label in ("x", "-", "y", "-")]
MANY = [f"text {k}\t{label}" for k, label in enumerate("ab" * 5)]


@pytest.mark.parametrize(
    ("name", "text", "note"),
    [
        ("a.tsv", table("x\ta\tb", "-\ta\tb", "y\ta\tb", names=SNLI), "^1 rows left out: their gold_label is '-'"),
        ("a.csv", "gold_label,sentence1,sentence2\nx,a,b\n-,a,b\n", "^1 rows left out"),
        ("a.jsonl", GOLD, "^2 rows left out"),
        ("a.tsv", table("a\tx", "b\t-"), "^label '-' stands on line 3; it is a label like any other"),
        ("a.tsv", table("a\tx", "b\tNaN", "c\tNaN"), "^label 'NaN' stands on 2 lines, the first of them 3"),
        ("a.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "None"}], "label 'None'"),
        ("a.tsv", table("a\tPositive", "b\tpositive"), r"^labels 'Positive' \(line 2\) and 'positive' \(line 3\)"),
        ("a.tsv", table("a\tnot good", "b\tnot_good"), "differ in case or punctuation alone; they are 2 labels"),
        (
            "a.tsv",
            table("a\tx\ty", names="text\tlabel\tcategory"),
            "^the label is read from 'label'; not from 'category'",
        ),
        (
            "a.tsv",
            table("a\tx\ty", names="text\tlabel\tsentence"),
            "^the text is read from 'text'; not from 'sentence'",
        ),
        ("a.tsv", table('"a ""b"" c"\tx', "b\ty"), "^1 texts stand in quotation marks, which are kept"),
        ("a.tsv", table(*MANY, names="review_body\tstars"), "^line 1 is read as data, and its label 'stars' stands no"),
    ],
)
def test_tables(tmp_path, name, text, note) -> None:
    said: list[str] = []
    path = write(tmp_path, name, text)
    is_pair = "sentence1" in path.read_text()
    found = read_table(path, is_pair=is_pair, say=said.append)
    assert len(said) == 1 and said[0].startswith(f"{path}: ")
    with pytest.warns(UserWarning, match=note.replace("^", r"^ctxfast\.readers: .*: ")):
        assert read_table(path, is_pair=is_pair) == found
    assert not [example for example in found if example.label == "-"] or name != "a.jsonl"


def test_undecided_rows(tmp_path) -> None:
    """Left out where labels are needed; else all are predicted. Without any other there is nothing to learn from."""
    path = write(tmp_path, "a.jsonl", GOLD)
    lines = [(example.line, example.label) for example in read_table(path, is_pair=True, say=lambda note: None)]
    assert lines == [(1, "x"), (3, "y")]
    said: list[str] = []
    found = read_table(path, is_pair=True, needs_label=False, say=said.append)
    assert [example.label for example in found] == ["x", None, "y", None] and not said
    path = write(tmp_path, "b.jsonl", [row for row in GOLD if row["gold_label"] == "-"])
    with pytest.raises(ValueError, match="no row has a gold label"):
        read_table(path, is_pair=True, say=said.append)


@pytest.mark.parametrize(
    ("name", "text", "options", "reason"),
    [
        ("a.tsv", table("a\tx\ty", names="text\tlabel\tlabel"), {}, "line 1: has several columns 'label'"),
        ("a.tsv", table("a\tx\ty", names="text\tLabel\tlabel"), {}, "has several columns 'Label'"),
        ("a.tsv", table("a\tx\ty", names="text\tz\tz"), {"label": "z"}, "has several columns 'z'"),
        ("a.jsonl", '{"text": "a", "label": "x", "label": "y"}\n', {}, "line 1: has the key 'label' twice"),
        ("a.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "class": "y"}], {}, r"line 2: is read from .*'class'"),
        ("a.tsv", table("a\0b\tx"), {}, "line 2: holds a NUL character"),
        ("a.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}\n", {}, "line 1: has a number of thousands"),
        ("a.jsonl", '{"text": "a", "label": "b"}\n{"text": ' + "[" * 99_999 + "\n", {}, "line 2: is nested too deep"),
    ],
)
def test_tables_that_cannot_be_meant(tmp_path, name, text, options, reason) -> None:
    with pytest.raises(ValueError, match=rf"^ctxfast\.readers: .*{name}, .*{reason}"):
        read_table(write(tmp_path, name, text), TableFormat(**options), say=lambda note: None)


def test_columns_that_differ_in_case_go_by_their_own_names(tmp_path) -> None:
    path = write(tmp_path, "a.tsv", table("a\tx\ty", names="text\tLabel\tlabel"))
    assert read_table(path, TableFormat(label="label"), say=print)[0].label == "y"
    assert read_table(path, TableFormat(label=1), say=print)[0].label == "x"


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (["1.5", "2", "3"], "all labels are numbers, 1 with fractions; .* --regression"),
        (["1", "1.0", "2"], r"labels '1' \(line 0\) and '1.0' \(line 1\) differ in how a number is written alone"),
        ([f"text {k}" for k in range(60)], "60 different labels on 60 rows; is the right column read"),
        (
            ["-1", "0", "2", "1"],
            "label '-1' stands on line 0; Hugging Face's datasets write it where there is no label",
        ),
        (["-1", "-2", "1"], None),
        (["0", "1", "0"], None),
        (["a", "1.5"], None),
    ],
)
def test_classes(labels, note) -> None:
    lines: dict[str, list[int]] = {}
    for line, label in enumerate(labels):
        lines.setdefault(label, []).append(line)
    found = list(class_notes(lines))
    assert len(found) == (note is not None)
    if note is not None:
        with pytest.warns(UserWarning, match=note):
            warnings.warn(found[0], stacklevel=1)


@pytest.mark.parametrize(
    ("text", "options", "note"),
    [
        ("a B-PER\nb O\n\nc B-per\n", {}, r"labels 'PER' \(line 1\) and 'per' \(line 4\) differ"),
        ("a x O\nb x O\n\nc O\n", {}, r"different numbers of columns, 3 \(line 1\) and 2 \(line 4\)"),
        ("a O\n" * 1001, {}, "the sentence of line 1 has 1,001 words; is a blank line missing"),
        ("a NaN\nb x\n", {"scheme": "none"}, "label 'NaN' stands on line 1"),
    ],
)
def test_conll(tmp_path, text, options, note) -> None:
    path = write(tmp_path, "a.txt", text)
    with pytest.warns(UserWarning, match=rf"^ctxfast\.readers: {path}: .*{note}"):
        read_conll(path, **options)


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("a x O\nb O\n", {}, "line 2: 2 columns; expected 3, as in the line before in the same sentence"),
        ("a,O\nb,O\n", {}, r"line 1: 1 columns, separated by spaces \(commas do not separate here\)"),
        ("a " + "x" * 5000 + "\n", {}, "line 1: tag 'x{99}...; expected"),
    ],
)
def test_conll_that_cannot_be_meant(tmp_path, text, options, reason) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        read_conll(write(tmp_path, "a.txt", text), say=print, **options)
    assert len(str(caught.value)) < 800


def test_squad(tmp_path) -> None:
    data = questions(9)
    entries = [entry for paragraph in data["data"][0]["paragraphs"] for entry in paragraph["qas"]]
    answered = [entry for entry in entries if entry["answers"]]
    answered[0]["is_impossible"] = True
    path = write(tmp_path, "a.json", json.dumps(data))
    found, notes = read_squad(path)
    assert notes == [f"{path}: 1 questions are is_impossible and have answers, which are left out"]
    assert [question.answers for question in found if question.id == str(answered[0]["id"])] == [()]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_nothing_is_said_of_good_data(tmp_path, name) -> None:
    rows = [{"text": f'a "{k}" b', "label": "xy"[k % 2]} for k in range(20)]
    separator = "," if name == "a.csv" else "\t"
    lines = [
        f'"a ""{k}"" b"{separator}{row["label"]}' if name == "a.csv" else f"{row['text']}{separator}{row['label']}"
        for k, row in enumerate(rows)
    ]
    text = rows if name == "a.jsonl" else f"text{separator}label\n" + "\n".join(lines) + "\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [example.text for example in read_table(write(tmp_path, name, text))] == [row["text"] for row in rows]
        assert read_conll(write(tmp_path, "b.tsv", tagged(5)))


# Commands


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("models") / "bert", layers=1)


def finetune(task, bert, folder, *more: object) -> int:
    words = ["-m", bert, "-o", folder / "run", "--steps", 1, "--batch-size", 2, "--device", "cpu", *more]
    return main(["finetune", task, *map(str, words)])


def test_finetune_says_it_on_stderr_and_in_the_log_once(tmp_path, bert, capsys) -> None:
    path = write(tmp_path, "a.jsonl", [*GOLD, {"gold_label": "Y", "sentence1": "a b", "sentence2": "c"}])
    for _ in range(2):
        assert finetune("pair", bert, tmp_path, "--train", path, "--test", path, "--max-length", 5) == 0
    said = capsys.readouterr().err
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    notes = [entry["note"] for entry in log if entry["kind"] == "note"]
    assert len(notes) == 3 and all(note in said for note in notes)
    for note, start in zip(
        notes, ["2 rows left out", "labels 'y' (line 3) and 'Y' (line 5) differ", "train: 1 texts of"]
    ):
        assert start in note
    assert "test: 1 texts of more than 5 tokens, cut (--max-length)" in said


def test_finetune_counts_labels_that_training_lacks(tmp_path, bert, capsys) -> None:
    train = write(tmp_path, "a.tsv", table("a\tx", "b\ty"))
    dev = write(tmp_path, "b.tsv", table("a\tz", "b\tz", "c\tx"))
    assert finetune("classify", bert, tmp_path, "--train", train, "--dev", dev) == 2
    assert "label 'z' does not occur in the training data, which has 'x', 'y'" in capsys.readouterr().err
    assert finetune("classify", bert, tmp_path, "--train", train, "--dev", dev, "--unseen", "keep") == 0
    assert f"{dev}: 2 labels that training lacks, 'z'; they count as wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (["--max-query", 2, "--doc-stride", 4], "questions of more than 2 tokens, cut"),
        (["--max-answer", 1, "--max-query", 8, "--doc-stride", 4], "answers of more than 1 tokens, never found"),
        (
            ["--max-length", 11, "--max-query", 4, "--doc-stride", 1],
            "answers that no window holds whole, learned as no",
        ),
    ],
)
def test_finetune_counts_answers_that_cannot_be_learned(tmp_path, bert, capsys, options, note) -> None:
    context = "the boat went to paris and saw bob with anna"
    answer = "to paris and saw bob"
    entry = {
        "id": "1",
        "question": "the boat went ?",
        "answers": [{"text": answer, "answer_start": context.index(answer)}],
    }
    data = {"data": [{"paragraphs": [{"context": context, "qas": [entry]}]}]}
    assert finetune("span", bert, tmp_path, "--train", write(tmp_path, "a.json", json.dumps(data)), *options) == 0
    assert f"train: 1 {note}" in capsys.readouterr().err


def test_finetune_counts_words_that_are_cut(tmp_path, bert, capsys) -> None:
    path = write(tmp_path, "a.tsv", "boat\tB-x\n" + "ca" + "rla" * 8 + "\tO\n\na\tO\n")
    assert finetune("tag", bert, tmp_path, "--train", path, "--max-length", 16) == 0
    err = capsys.readouterr().err
    assert "train: 1 words of more than 3 tokens, cut" in err


@pytest.mark.parametrize(
    ("task", "library"), [("classify", "torchmetrics"), ("pair", "torchmetrics"), ("tag", "nervaluate")]
)
def test_finetune_looks_for_its_libraries_before_it_trains(tmp_path, bert, monkeypatch, capsys, task, library) -> None:
    for name in [library, *(name for name in sys.modules if name.startswith(f"{library}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    path = write(tmp_path, "a.tsv", "a\tO\n")
    assert finetune(task, bert, tmp_path, "--train", path, "--dev", path) == 2
    assert f"{library} is not installed" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_tensorboard_is_looked_for_before_anything_is_read(tmp_path, bert, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    path = write(tmp_path, "a.tsv", "no table")
    assert finetune("classify", bert, tmp_path, "--train", path, "--tensorboard") == 2
    assert "tensorboard is not installed" in capsys.readouterr().err and not (tmp_path / "run").exists()
