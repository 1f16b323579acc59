# SPDX-License-Identifier: Apache-2.0
"""Readers of labelled data: what they read, and what they say of files that are wrong."""

from __future__ import annotations

import gzip
import json
import lzma
import time

import pytest

from ctxfast.training.readers.conll import bioes_to_bio2, iob1_to_bio2, read_conll
from ctxfast.training.readers.squad import read_squad
from ctxfast.training.readers.tables import TableFormat, read_table


def write(path, text):
    openers = {".gz": gzip.open, ".xz": lzma.open}
    with openers.get(path.suffix, open)(path, "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    return path


def rows(examples):
    return [(example.text, example.pair, example.label) for example in examples]


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "a.tsv.xz"])
def test_tsv_takes_quote_signs_as_text(tmp_path, name) -> None:
    path = write(tmp_path / name, '\ufefftext\tlabel\r\nhe said "no\tx\r\n\r\n"yes\ty\r\n')
    found = read_table(path)
    assert rows(found) == [('he said "no', None, "x"), ('"yes', None, "y")]
    assert [example.line for example in found] == [2, 4]


def test_csv_takes_quote_signs_as_delimiters(tmp_path) -> None:
    path = write(tmp_path / "a.csv", 'text,category\n"one, ""two""\nthree",x\nfour,y\n')
    found = read_table(path)
    assert rows(found) == [('one, "two"\nthree', None, "x"), ("four", None, "y")]
    assert [example.line for example in found] == [2, 4]


def test_jsonl(tmp_path) -> None:
    text = '{"label": 1, "text": "a"}\n{"text": "b", "label": "x", "more": 2}\n'
    assert rows(read_table(write(tmp_path / "a.jsonl", text))) == [("a", None, "1"), ("b", None, "x")]


@pytest.mark.parametrize(
    ("text", "table", "expected"),
    [
        ("a\tb\tx\n", TableFormat(), ("a", "b", "x")),  # no usual names: no header
        ("index\tquestion\tsentence\tlabel\n0\tq\ts\tx\n", TableFormat(), ("q", "s", "x")),
        ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t2\t3\ta\tb\n", TableFormat(), ("a", "b", "1")),
        ("left\tright\tgold\na\tb\tx\n", TableFormat("left", "right", "gold"), ("a", "b", "x")),
        ("x\ta\tb\n", TableFormat(1, 2, 0), ("a", "b", "x")),
        ("sentence1\tsentence2\tscore\n", TableFormat(header=False), ("sentence1", "sentence2", "score")),
    ],
)
def test_columns_of_pairs(tmp_path, text, table, expected) -> None:
    assert rows(read_table(write(tmp_path / "a.tsv", text), table, is_pair=True)) == [expected]


def test_a_label_column_is_not_needed_to_predict(tmp_path) -> None:
    path = write(tmp_path / "a.tsv", "text\tother\na\tb\n")
    assert rows(read_table(path, needs_label=False)) == [("a", None, None)]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.tsv", "", "is empty"),
        ("a.tsv", "text\tlabel\n", "a header and no rows"),
        ("a.tsv", "text\tlabel\na\tx\nb\n", "line 3: 1 columns; expected 2"),
        ("a.tsv", "text\tlabel\na\tx\n \ty\n", "line 3: the text is empty"),
        ("a.tsv", "text\tlabel\na\tx\nb\t\n", "line 3: the label is empty"),
        ("a.tsv", "text\tfoo\na\tx\n", "no column for the label"),
        ("a.tsv", "why ?\tquestion\na\tx\n", "no column for the label; .* if this row names no columns, .*--no-header"),
        ("a.tsv", "text\tlabel\na\tx\n\xff".encode("latin-1"), "line 3: byte 0xff is not UTF-8"),
        ("a.csv", 'text,label\na,x\n"b,y\n', "line 3: a quotation mark opens a field"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text"\n', "line 2: is not JSON"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n[1]\n', "line 2: is a list"),
        ("a.jsonl", '{"text": ["a"], "label": "x"}\n', "line 1: holds a list"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', "line 2: has no column for the label"),
        ("a.doc", "text\tlabel\na\tx\n", "format is '.doc'"),
        ("a.tsv.gz", None, "is damaged, cut short or no .gz file"),
    ],
)
def test_tables_that_are_wrong(tmp_path, name, text, reason) -> None:
    path = tmp_path / name
    path.write_bytes(b"no archive") if text is None else write(path, text)
    with pytest.raises(ValueError, match="ctxfast.readers: .*" + reason.replace("'", ".")) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


def test_conll(tmp_path) -> None:
    text = "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\n\nPeter NNP I-NP I-PER\nB. NNP I-NP I-PER"
    found = read_conll(write(tmp_path / "a.txt.gz", text), scheme="iob1")
    assert [sentence.words for sentence in found] == [["EU", "rejects"], ["Peter", "B."]]
    assert [sentence.tags for sentence in found] == [["B-ORG", "O"], ["B-PER", "I-PER"]]
    assert [sentence.line for sentence in found] == [3, 7]
    found = read_conll(tmp_path / "a.txt.gz", tag_column=1, scheme="none")
    assert found[0].tags == ["NNP", "VBZ"]


def test_conll_with_tabs_keeps_spaces_and_signs(tmp_path) -> None:
    text = "# text = 1 000 #\n1 000\tB-N\t-\n#\tO\tV\n"
    (found,) = read_conll(write(tmp_path / "a.tsv", text), tag_column=1, predicate_column=2)
    assert found.words == ["1 000", "#"] and found.predicate == [False, True]


def test_only_spaces_and_tabs_part_columns(tmp_path) -> None:
    (found,) = read_conll(write(tmp_path / "a.txt", "10\u00a0000 X  B-N\n\u3000x Y O\n"))
    assert found.words == ["10\u00a0000", "x"] and found.tags == ["B-N", "O"]


def test_ranges_and_empty_words_of_conllu_are_no_words(tmp_path) -> None:
    rows = [
        "# sent_id = 1",
        *(
            f"{n}\t{w}\t_\t{t}\t_\t_\t0\t_\t_\t_"
            for n, w, t in (
                ("1-2", "don't", "_"),
                ("1", "do", "AUX"),
                ("2", "n't", "PART"),
                ("2.1", "go", "VERB"),
                ("3", "1.5", "NUM"),
            )
        ),
    ]
    (found,) = read_conll(write(tmp_path / "a.conllu", "\n".join(rows)), word_column=1, tag_column=3, scheme="none")
    assert found.words == ["do", "n't", "1.5"] and found.tags == ["AUX", "PART", "NUM"]
    assert [found.line_of(word) for word in range(3)] == [3, 4, 6]


def test_bioes_and_bilou(tmp_path) -> None:
    tags = ["S-A", "S-A", "B-A", "I-A", "E-A", "E-A", "B-B", "E-A", "O", "I-A", "E-A", "I-A"]
    expected = ["B-A", "B-A", "B-A", "I-A", "I-A", "B-A", "B-B", "B-A", "O", "B-A", "I-A", "B-A"]
    assert bioes_to_bio2(tags) == expected
    swap = str.maketrans("SE", "UL")
    assert bioes_to_bio2([tag.translate(swap) for tag in tags]) == expected
    (found,) = read_conll(write(tmp_path / "a.tsv", "a\tS-x\nb\tO\n"), scheme="bioes")
    assert found.tags == ["B-x", "O"]


def test_iob1() -> None:
    assert iob1_to_bio2(["I-A", "I-A", "B-A", "O", "I-B", "I-A"]) == ["B-A", "I-A", "B-A", "O", "B-B", "B-A"]


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("", {}, "is empty"),
        ("-DOCSTART- O\n\n", {}, "holds no sentences"),
        ("a\tO\nb\n", {"tag_column": 1}, "line 2: 1 columns, separated by tabs .*; expected 2"),
        ("a\tO\nb\n", {}, "line 2: 1 columns, separated by tabs .*: the word's is the tag's; expected one for each"),
        ("a O\n\nb\n", {"scheme": "none"}, "line 3: 1 columns, separated by spaces: the word's is the tag's"),
        ("a\tO\nb O\n", {"scheme": "none"}, "line 2: 1 columns, separated by tabs"),
        ("a\tO\n\tO\n", {}, "line 2: the word is empty"),
        ("a\tO\nb\tPER\n", {}, "line 2: tag 'PER'; expected O, B-x or I-x"),
        ("a\tO\nb\tB-\n", {}, "line 2: tag 'B-'"),
        ("a\tB-x\nb\tI-y\n", {}, "line 2: tag 'I-y' goes on with nothing, as 'B-x' comes before .* scheme 'iob1'"),
        ("a\tO\n\nb\tI-y\n", {}, "line 3: tag 'I-y' goes on with nothing"),
        ("a\tS-x\n", {}, "line 1: tag 'S-x'; expected O, B-x or I-x. E-x and S-x: scheme 'bioes'; other tags:"),
        ("a\tM-x\n", {"scheme": "bioes"}, "line 1: tag 'M-x'; expected O, B-x, I-x, .* or U-x"),
        ("a\tO\t-\nb\tO\t_\n", {"tag_column": 1, "predicate_column": 2}, "line 1: .* no predicate"),
        ("a\tO\tV\n", {"predicate_column": 2, "scheme": "none"}, "line 1: .* the tag's is the predicate's"),
    ],
)
def test_conll_that_is_wrong(tmp_path, text, options, reason) -> None:
    path = write(tmp_path / "a.tsv", text)
    with pytest.raises(ValueError, match=reason) as caught:
        read_conll(path, **options)
    assert str(path) in str(caught.value)


def squad(*answers, context="the cat sat", **more):
    answers = [{"text": text, "answer_start": start} for text, start in answers]
    entry = {"id": "q1", "question": "who?", "answers": answers, **more}
    return {"data": [{"paragraphs": [{"context": context, "qas": [entry]}]}]}


def test_squad(tmp_path) -> None:
    found, notes = read_squad(write(tmp_path / "a.json", json.dumps(squad(("cat", 4), ("the cat", 0)))))
    assert [(a.text, a.start) for a in found[0].answers] == [("cat", 4), ("the cat", 0)] and not notes
    found, _ = read_squad(write(tmp_path / "b.json", json.dumps(squad(is_impossible=True))))
    assert found[0].is_impossible and found[0].answers == ()


def test_squad_leaves_out_answers_that_do_not_align(tmp_path) -> None:
    data = squad(("dog", 4))
    data["data"][0]["paragraphs"][0]["qas"].append({"id": "q2", "question": "?", "answers": [], "is_impossible": True})
    path = write(tmp_path / "a.json", json.dumps(data))
    found, notes = read_squad(path, misaligned="skip")
    assert [question.id for question in found] == ["q2"]
    assert len(notes) == 1 and "q1" in notes[0] and "'dog'" in notes[0] and "'cat'" in notes[0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ('{"data": [\n1,]', "line 2: is not JSON"),
        ({"version": 1}, "the file: has no 'data'"),
        ({"data": []}, "holds no questions"),
        ({"data": [{"paragraphs": [{"context": 3}]}]}, "'context' is of type int; expected str"),
        (squad(("dog", 4)), r"qas\[0\] \(id q1, line 1\): answer 0 is 'dog', but .* is 'cat'"),
        (squad(("cat", 40)), "answer 0 is 'cat'"),
        (squad(("cat", -1)), "answer 0 is 'cat'"),
        (squad(), "has no answer and is not marked is_impossible"),
        (squad(("", 0)), "answer 0 is empty"),
        (squad(("cat", 4), is_impossible="false"), "'is_impossible' is of type str; expected bool"),
    ],
)
def test_squad_that_is_wrong(tmp_path, data, reason) -> None:
    path = write(tmp_path / "a.json", data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(ValueError, match=reason):
        read_squad(path)


@pytest.mark.parametrize("id", ["q2", 2, "\u4f60"])
def test_the_line_of_a_question(tmp_path, id) -> None:
    """The second place of an id that comes twice; ids are text or numbers."""
    data = squad(("cat", 4))
    entries = data["data"][0]["paragraphs"][0]["qas"]
    entries += [{**entries[0], "id": id}, {**entries[0], "id": id}]
    for ascii in (True, False):
        text = json.dumps(data, indent=1, ensure_ascii=ascii)
        lines = [number for number, line in enumerate(text.splitlines(), 1) if line.strip().startswith('"id"')]
        with pytest.raises(ValueError, match=rf"qas\[2\] \(id {id}, line {lines[2]}\): the id came before"):
            read_squad(write(tmp_path / "a.json", text))


def test_the_time_of_squad_grows_with_its_size(tmp_path) -> None:
    """Places are looked up where something is wrong only: once for each question, 20,000 of them took a minute."""
    entries = [
        {"id": f"{k:024}", "question": "who?", "answers": [{"text": "cat", "answer_start": 4}]} for k in range(20000)
    ]
    paragraphs = [{"context": "the cat sat " * 80, "qas": entries[k : k + 5]} for k in range(0, 20000, 5)]
    path = write(tmp_path / "a.json", json.dumps({"data": [{"paragraphs": paragraphs}]}))
    start = time.process_time()
    found, _ = read_squad(path)
    assert len(found) == 20000 and time.process_time() - start < 8


def test_real_files(shared_data) -> None:
    counts = {
        "ner/wnut17_train.tsv": 3394,
        "ner/wikigold.tsv": 1696,
    }
    for name, count in counts.items():
        assert len(read_conll(shared_data / name)) == count
    assert len(read_table(shared_data / "cls/banking77_test.csv")) == 3080
    assert len(read_table(shared_data / "pair/qnli_small_dev.tsv.xz", is_pair=True)) == 820
    found, notes = read_squad(shared_data / "qa/squad2_part_dev.json.xz")
    assert len(found) == 1388 and sum(bool(question.answers) for question in found) == 672 and not notes
