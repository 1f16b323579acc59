# SPDX-License-Identifier: Apache-2.0
"""Readers of corpora as they are released, and what they say of lines that are wrong."""

from __future__ import annotations

import json

import pytest

from ctxfast.cli import main
from ctxfast.training.readers.conll import Sentence, read_conll
from ctxfast.training.readers.conll_brackets import read_coreference, read_roles
from ctxfast.training.readers.corpora import read_sst, read_stsb, read_trec
from ctxfast.training.readers.tables import read_table
from ctxfast.training.tasks.build import Choice, build

SST = "(3 (2 It) (4 (2 's) (4 good)))\n(2 (2 So) (2 so))\n(0 Bad)\n"
STSB = 'main-news\tMSRpar\t2012test\t1\t4.4\tHe said "no.\tHe said no.\tsource\nmain\tx\t2013\t2\t0\tA\tB\n'
# A word, its sense, then the roles of each predicate.
SRL_2005 = "Bob - (A0* (A0*)\nhimself - *) *\nsaw see (V*) *\nme - (A1*) *\nrun run * (V*)\n\nOh -\n"


def row_2012(word, *roles, mentions="-"):
    return " ".join(["bc/x", "0", "0", word, "NN", "*", "-", "-", "-", "ann", "*", *roles, mentions])


COREF = "\n".join(
    [
        "#begin document (bc/x); part 000",
        row_2012("Bob", "(A0*)", mentions="(0"),
        row_2012("Smith", "(V*)", mentions="0)|(1)"),
        "",
        row_2012("he", mentions="(0)"),
        row_2012("it", mentions="(1)"),
        "",
        "#end document",
        "#begin document (bc/x); part 001",
        row_2012("he", mentions="(0)"),
        "#end document",
        "",
    ]
)


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(examples):
    return [(example.text, example.label, example.line) for example in examples]


def test_sst(tmp_path) -> None:
    path = write(tmp_path / "train.txt", SST)
    assert rows(read_sst(path)) == [("It 's good", "3", 1), ("So so", "2", 2), ("Bad", "0", 3)]
    notes = []
    assert rows(read_sst(path, is_binary=True, say=notes.append)) == [
        ("It 's good", "positive", 1),
        ("Bad", "negative", 3),
    ]
    assert notes == [f"{path}: 1 neutral sentences left out (label 2)"]
    found = read_sst(path, has_phrases=True)
    assert [(one.text, one.label) for one in found if one.line == 1] == [
        ("It", "2"),
        ("'s", "2"),
        ("good", "4"),
        ("'s good", "4"),
        ("It 's good", "3"),
    ]


def test_trec_and_stsb(tmp_path) -> None:
    path = write(tmp_path / "trec.label", "LOC:city What is the sister\xf0city ?\nNUM:date When ?\n".encode("latin-1"))
    notes = []
    assert rows(read_trec(path, say=notes.append)) == [
        ("What is the sister\xf0city ?", "LOC", 1),
        ("When ?", "NUM", 2),
    ]
    assert "Latin-1" in notes[0] and read_trec(path, is_fine=True, say=notes.append)[0].label == "LOC:city"
    one, other = read_stsb(write(tmp_path / "sts-train.csv", STSB))
    assert (one.text, one.pair, one.label) == ('He said "no.', "He said no.", "4.4") and other.line == 2


def test_snli_leaves_out_what_is_undecided(tmp_path) -> None:
    keys = {"annotator_labels": ["neutral"], "captionID": "1", "pairID": "1r"}
    lines = [{**keys, "gold_label": g, "sentence1": "a b", "sentence2": "c"} for g in ("neutral", "-", "entailment")]
    path = write(tmp_path / "snli.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    notes = []
    found = read_table(path, is_pair=True, say=notes.append)
    assert [(one.text, one.pair, one.label) for one in found] == [("a b", "c", "neutral"), ("a b", "c", "entailment")]
    assert "1 rows left out" in notes[0]


def test_conll_2003(tmp_path) -> None:
    text = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP I-ORG\nFrench JJ B-NP I-MISC\nUK NNP B-NP B-MISC\n"
    (found,) = read_conll(write(tmp_path / "eng.train", text), scheme="iob1")
    assert found.words == ["EU", "French", "UK"] and found.tags == ["B-ORG", "B-MISC", "B-MISC"]


def test_roles(tmp_path) -> None:
    notes = []
    one, other = read_roles(write(tmp_path / "props", SRL_2005), "conll2005", say=notes.append)
    assert one.words == other.words == ["Bob", "himself", "saw", "me", "run"]
    assert one.tags == ["B-A0", "I-A0", "B-V", "B-A1", "O"] and one.predicate == [False, False, True, False, False]
    assert other.tags == ["B-A0", "O", "O", "O", "B-V"]
    assert "1 sentences without a predicate" in notes[0]
    (found,) = read_roles(write(tmp_path / "x_conll", COREF), "conll2012", say=notes.append)
    assert found.words == ["Bob", "Smith"] and found.tags == ["B-A0", "B-V"]


def test_coreference(tmp_path) -> None:
    one, other = read_coreference(write(tmp_path / "x_conll", COREF))
    assert one.sentences == [["Bob", "Smith"], ["he", "it"]] and one.words == ["Bob", "Smith", "he", "it"]
    assert sorted(one.clusters) == [[(0, 1), (2, 2)], [(1, 1), (3, 3)]] and one.speakers == ["ann", "ann"]
    assert (other.name, other.clusters, other.line) == ("(bc/x); part 001", [[(0, 0)]], 10)


@pytest.mark.parametrize(
    ("read", "text", "reason"),
    [
        (read_sst, "(3 (2 It) (4 good)\n", "line 1: ends within a tree"),
        (read_sst, SST + "(3 (2 a) (9 b))\n", "line 4: '9' is a label at column 11; expected 0 to 4"),
        (read_sst, "(3 a) (2 b)\n", "line 1: .*at column 7 does not fit"),
        (read_sst, "good\n", "line 1: 'good' at column 1 does not fit"),
        (read_trec, "LOC:city Where ?\nLOC What ?\n", "line 2: begins with 'LOC'; expected COARSE:fine"),
        (read_trec, "LOC:city\n", "line 1: has a label and no question"),
        (read_stsb, STSB + "a\tb\tc\td\t1\te\n", "line 3: 6 columns"),
        (read_stsb, STSB.replace("4.4", "5.5"), "line 1: the score is '5.5'; expected a number from 0 to 5"),
        (read_stsb, STSB.replace("\tA\t", "\t \t"), "line 2: sentence 1 is empty"),
        (lambda path: read_roles(path, "conll2005"), SRL_2005.replace("*) *\n", "* *\n", 1), "begins within A0"),
        (lambda path: read_roles(path, "conll2005"), SRL_2005.replace("(V*) *", "* *"), "column 2 .* has no"),
        (lambda path: read_roles(path, "conll2005"), SRL_2005.replace("saw see", "saw -"), "line 1: .* has 1 predic"),
        (lambda path: read_roles(path, "conll2005"), SRL_2005.replace("(A1*) *", "A1 *"), "line 4: column 2 is 'A1'"),
        (lambda path: read_roles(path, "conll2005"), SRL_2005.replace("(A1*) *", "*"), "line 4: 3 columns; expected 4"),
        (read_coreference, COREF.replace("0)|(1)", "(1)"), "line 2: a mention of cluster 0 begins here"),
        (read_coreference, COREF.replace("0)|", "0)|7)|"), r"line 3: '7\)' ends a mention that did not begin"),
        (read_coreference, COREF.replace("(0)\n", "0\n", 1), "line 5: the last column has '0'"),
        (read_coreference, COREF.replace("(0)\n", "(0)|(1)\n", 1), "line 5: .* of cluster 1 is one of cluster 0 too"),
        (read_coreference, "a b c d -\n", "line 1: stands outside a document"),
    ],
)
def test_what_is_wrong_is_named_by_its_line(read, text, reason, tmp_path) -> None:
    with pytest.raises(ValueError, match=reason):
        read(write(tmp_path / "file", text))


def test_the_predicate_itself_does_not_count() -> None:
    """Spans of kind V are known from the mark."""
    tagger = build("tag", None, ("O", "B-A0", "I-A0", "B-V", "I-V"), Choice(words="chars", predicate="type"))
    gold = [Sentence(["a", "b", "c"], ["B-A0", "B-V", "B-A0"], [False, True, False], 1)]
    found = tagger.scores(gold, [["B-A0", "O", "B-V"]])
    assert (found["precision"], found["recall"]) == (1.0, 0.5) and "f1_V" not in found


@pytest.mark.parametrize(
    ("task", "text", "options", "examples"),
    [
        ("classify", SST, ["--format", "sst2", "--phrases"], 4),
        ("classify", "LOC:city Where ?\nNUM:date When ?\n", ["--format", "trec"], 2),
        ("pair", STSB, ["--format", "stsb", "--regression"], 2),
        ("tag", COREF, ["--roles", "conll2012"], 1),
    ],
)
def test_the_command_reads_them(task, text, options, examples, tmp_path, capsys) -> None:
    path = str(write(tmp_path / "data", text))
    argv = ["finetune", task, "--words", "chars", "--lstm-hidden", "4", "--device", "cpu", *options]
    assert main([*argv, "--train", path, "--steps", "1", "-o", str(tmp_path / "run")]) == 0
    assert f"{examples} examples" in capsys.readouterr().err


def test_a_corpus_of_another_task_is_refused(tmp_path, capsys) -> None:
    path = str(write(tmp_path / "data", SST))
    argv = ["finetune", "pair", "--words", "chars", "--format", "sst", "--train", path, "-o", str(tmp_path / "run")]
    assert main(argv) != 0
    assert "--format is 'sst'; expected stsb for 'pair'" in capsys.readouterr().err
