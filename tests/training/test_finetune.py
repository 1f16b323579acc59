# SPDX-License-Identifier: Apache-2.0
"""``ctxfast finetune`` from end to end on tiny models."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import classified, paired, questions, tagged, tiny_bert, tiny_elmo

from benchmarks import finetune_peers
from ctxfast.cli import main
from ctxfast.training.loop.train import _Run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models and data of every task: folder / bert, elmo, tag.tsv, tag-dev.tsv, ..."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny_bert(folder / "bert", layers=2)
    tiny_elmo(folder / "elmo")
    for kind, seed, count in (("", 0, 60), ("-dev", 1, 20)):
        (folder / f"tag{kind}.tsv").write_text(tagged(count, seed))
        (folder / f"classify{kind}.tsv").write_text(classified(count, seed))
        (folder / f"pair{kind}.tsv").write_text(paired(count, seed))
        (folder / f"span{kind}.json").write_text(json.dumps(questions(count, seed)))
    return folder


def data(files, task, suffix="tsv"):
    return ["--train", str(files / f"{task}.{suffix}"), "--dev", str(files / f"{task}-dev.{suffix}")]


def finetune(*argv) -> int:
    return main(["finetune", *map(str, argv), "--device", "cpu", "--quiet"])


def scores(folder, name="dev"):
    return json.loads((folder / f"scores-{name}.json").read_text())


@pytest.mark.parametrize(
    ("task", "model", "options", "figure", "least"),
    [
        ("tag", "bert", ["--epochs", 6, "--lr", 3e-3, "--batch-size", 8], "f1", 0.9),
        (
            "tag",
            "bert",
            ["--features", "mix", "--crf", "--lstm-hidden", 16, "--epochs", 14, "--lr", 1e-2, "--batch-size", 8],
            "f1",
            0.9,
        ),
        ("tag", "elmo", ["--lstm-hidden", 16, "--epochs", 24, "--lr", 1e-2, "--batch-size", 8], "f1", 0.8),
        ("classify", "bert", ["--epochs", 6, "--lr", 3e-3, "--batch-size", 8], "accuracy", 0.9),
        (
            "pair",
            "bert",
            ["--features", "mix", "--lstm-hidden", 16, "--epochs", 20, "--lr", 1e-2, "--batch-size", 4],
            "accuracy",
            0.9,
        ),
        (
            "tag",
            None,
            ["--words", "chars", "--crf", "--lstm-hidden", 16, "--epochs", 8, "--lr", 1e-2, "--batch-size", 8],
            "f1",
            0.9,
        ),
        (
            "pair",
            None,
            [
                "--words",
                "learned",
                "--head",
                "esim",
                "--lstm-hidden",
                16,
                "--epochs",
                12,
                "--lr",
                1e-2,
                "--batch-size",
                4,
            ],
            "accuracy",
            0.9,
        ),
    ],
    ids=["tag-bert", "tag-features", "tag-elmo", "classify-bert", "pair-features", "tag-characters", "pair-esim"],
)
def test_it_learns(files, tmp_path, task, model, options, figure, least) -> None:
    run = tmp_path / "run"
    encoder = [] if model is None else ["-m", files / model]
    assert finetune(task, *encoder, *data(files, task), "-o", run, *options) == 0
    assert scores(run / "best")[figure] >= least
    assert (run / "final" / "ctxfast_task.json").is_file()
    # The finished model does the same again, read from its files.
    again = tmp_path / "again"
    test = files / f"{task}-dev.tsv"
    assert finetune(task, "-m", run / "best", "--evaluate-only", "--test", test, "-o", again) == 0
    assert scores(again, "test")[figure] == pytest.approx(scores(run / "best")[figure], abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        ["--max-length", 32, "--doc-stride", 8, "--max-query", 8, "--lr", 3e-3],
        pytest.param(["--features", "mix", "--lstm-hidden", 16, "--lr", 1e-2], marks=pytest.mark.slow),
    ],
    ids=["bert", "features"],
)
def test_span(files, tmp_path, options) -> None:
    run = tmp_path / "run"
    argv = ["-m", files / "bert", *data(files, "span", "json"), "--epochs", 20, "--batch-size", 8]
    assert finetune("span", *argv, *options, "-o", run) == 0
    assert scores(run / "best")["f1"] >= 0.6
    found = json.loads((run / "best" / "predictions-dev.json").read_text())
    assert set(found) == {f"q{number}" for number in range(20)}
    again = tmp_path / "again"
    dev = files / "span-dev.json"
    assert finetune("span", "-m", run / "best", "--predict-only", "--test", dev, "-o", again) == 0
    assert json.loads((again / "predictions-test.json").read_text()) == found


@pytest.mark.parametrize("task", ["tag", "pair"])
def test_beside_hugging_face(files, task) -> None:
    """The same weights, data and schedule, no dropout: losses agree step by step."""
    argv = [task, "-m", files / "bert", *data(files, task), "--epochs", 4, "--stop", 2, "--batch-size", 4]
    argv += ["--lr", 1e-3, "--exact", "--log-every", 5]
    ours, theirs = finetune_peers.main([*map(str, argv)])
    assert [one["side"] for one in (ours, theirs)] == ["ctxfast", "transformers"]
    assert ours["examples"] == 60 and len(ours["by_epoch"]) == 2 and len(ours["loss"]) >= 5
    for (_, one), (_, other) in zip(ours["loss"], theirs["loss"], strict=True):
        assert one == pytest.approx(other, abs=2e-3)


def test_predictions_of_files_without_labels(files, tmp_path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    argv = ["-m", files / "bert", "--train", files / "classify.tsv", "--steps", 2, "-o", run]
    assert finetune("classify", *argv) == 0
    new = tmp_path / "new.tsv"
    new.write_text("text\ngood film\nbad film\n")
    assert finetune("classify", "-m", run / "final", "--predict-only", "--test", new, "-o", out) == 0
    lines = [json.loads(line) for line in (out / "predictions-test.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [2, 3]
    assert all(line["prediction"] in ("positive", "negative") and 0.5 <= line["probability"] <= 1 for line in lines)


def test_how_answers_are_decided_may_change_later(files, tmp_path) -> None:
    """The best threshold found on the development part, given back, gives the figures that it promised."""
    run, dev = tmp_path / "run", files / "span-dev.json"
    argv = ["-m", files / "bert", *data(files, "span", "json"), "--steps", 60, "--batch-size", 8, "--lr", 3e-3]
    argv += ["--max-length", 32, "--doc-stride", 8, "--max-query", 8]
    assert finetune("span", *argv, "-o", run) == 0
    figures = scores(run / "best")
    argv = ["span", "-m", run / "best", "--evaluate-only", "--test", dev, "--null-threshold"]
    assert finetune(*argv, figures["best_f1_threshold"], "-o", tmp_path / "f1") == 0
    assert scores(tmp_path / "f1", "test")["f1"] == pytest.approx(figures["best_f1"], abs=1e-9)
    assert figures["best_f1"] >= figures["f1"]
    assert finetune(*argv, 1e6, "--max-answer", 1, "--n-best", 3, "-o", tmp_path / "all") == 0
    found = json.loads((tmp_path / "all" / "predictions-test.json").read_text())
    assert any(found.values()) and all(" " not in answer for answer in found.values())
    nbest = json.loads((tmp_path / "all" / "predictions-test-nbest.json").read_text())
    assert 1 <= max(map(len, nbest.values())) <= 3


def test_texts_that_are_cut_are_counted(files, tmp_path, capsys) -> None:
    argv = ["-m", files / "bert", "--train", files / "classify.tsv", "--steps", 1, "--max-length", 5]
    assert finetune("classify", *argv, "-o", tmp_path / "run") == 0
    argv = ["classify", "-m", tmp_path / "run" / "final", "--predict-only", "--test", files / "classify.tsv"]
    assert main(["finetune", *map(str, argv), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert re.search(r"test: \d+ texts of more than 5 tokens, cut", capsys.readouterr().err)


def test_a_tagger_of_hugging_face_marks_predicates_as_told(files, tmp_path) -> None:
    import transformers

    names = {0: "O", 1: "B-A0", 2: "I-A0"}
    model = transformers.AutoModelForTokenClassification.from_pretrained(files / "bert", id2label=names)
    model.save_pretrained(tmp_path / "model")
    shutil.copy(files / "bert" / "vocab.txt", tmp_path / "model")
    (tmp_path / "srl.tsv").write_text("bob\t-\tB-A0\nsaw\tV\tO\n")
    argv = ["-m", tmp_path / "model", "--evaluate-only", "--test", tmp_path / "srl.tsv", "--predicate-column", 1]
    for how in ("type", "sep"):
        assert finetune("tag", *argv, "--predicate", how, "-o", tmp_path / how) == 0
        assert set(scores(tmp_path / how, "test")) >= {"f1", "accuracy"}


@pytest.mark.slow
def test_predicate_marked_tagging(files, tmp_path) -> None:
    """The tag of a word is whether it stands before or after the predicate, which only the mark tells."""
    lines = []
    for place in [0, 1, 2, 3] * 8:
        words = ["bob", "saw", "the", "boat"]
        for k, word in enumerate(words):
            tag = "B-V" if k == place else "B-A0" if k < place else "B-A1"
            lines.append(f"{word}\t{'V' if k == place else '-'}\t{tag}")
        lines.append("")
    path = tmp_path / "srl.tsv"
    path.write_text("\n".join(lines) + "\n")
    for how, options in (
        ("type", []),
        ("sep", ["--predicate", "sep"]),
        ("lstm", ["--features", "embeddings", "--lstm-hidden", 16, "--lr", 1e-2]),
    ):
        run = tmp_path / how
        argv = ["--predicate-column", 1, "--train", path, "--dev", path, "--batch-size", 8, "--epochs", 25]
        assert finetune("tag", "-m", files / "bert", *argv, "--lr", 3e-3, *options, "-o", run) == 0
        assert scores(run / "best")["f1"] >= 0.95, how


def test_a_killed_run_goes_on_bit_for_bit(files, tmp_path, monkeypatch) -> None:
    argv = ["tag", "-m", files / "bert", *data(files, "tag"), "--steps", 7, "--lr", 1e-3, "--batch-size", 8]
    argv += ["--save-every", 3, "--eval-every", 2]
    assert finetune(*argv, "-o", tmp_path / "whole") == 0
    one_step = _Run._one_step

    def killed(run, micro):
        if run.step == 5:
            raise KeyboardInterrupt
        one_step(run, micro)

    monkeypatch.setattr(_Run, "_one_step", killed)
    assert finetune(*argv, "-o", tmp_path / "killed") == 130
    monkeypatch.undo()
    assert finetune(*argv, "-o", tmp_path / "killed") == 0
    for part in ("final/model.safetensors", "best/model.safetensors", "best/predictions-dev.tsv"):
        assert (tmp_path / "whole" / part).read_bytes() == (tmp_path / "killed" / part).read_bytes(), part
    # A run of other choices does not go on with it.
    assert finetune(*argv, "--max-length", 32, "-o", tmp_path / "killed") == 2


def test_data_that_changed_under_its_name_is_another_configuration(files, tmp_path, capsys) -> None:
    path = tmp_path / "tag.tsv"
    path.write_text((files / "tag.tsv").read_text())
    argv = ["tag", "-m", files / "bert", "--train", path, "--steps", 2, "-o", tmp_path / "run"]
    assert finetune(*argv) == 0
    assert finetune(*argv) == 0, "nothing changed"
    assert finetune(*argv, "--tag-column", 1) == 2
    assert "another configuration: settings.reading.tag_column was -1 and is 1 now" in capsys.readouterr().err
    path.write_text(path.read_text().replace("boat", "sea"))
    assert finetune(*argv) == 2
    assert f"another configuration: settings.sha256.train.{path} was" in capsys.readouterr().err


def _without_dropout(model: Path, folder: Path) -> Path:
    """A copy of a model in a folder, its dropout off."""
    shutil.copytree(model, folder)
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_accumulated_batches_are_one_large_batch(files, tmp_path) -> None:
    """With dropout off, two micro-batches of 4 give what one of 8 gives: losses are weighted by labelled words."""
    model = _without_dropout(files / "bert", tmp_path / "model")
    states = []
    for name, options in (("one", ["--batch-size", 8]), ("two", ["--batch-size", 4, "--accumulate", 2])):
        argv = ["-m", model, "--train", files / "tag.tsv", "--steps", 3, "--lr", 1e-3, "--warmup", 0]
        assert finetune("tag", *argv, *options, "-o", tmp_path / name) == 0
        states.append(load_file(tmp_path / name / "final" / "model.safetensors"))
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], atol=2e-5), name


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["tag", "-m", "bert", "--train", "none.tsv"], "--train .*none.tsv does not exist"),
        (["tag", "-m", "bert"], "--train is missing"),
        (["tag", "-m", "none", "--train", "tag.tsv"], "is not a model on this machine"),
        (["tag", "-m", "bert", "--predict-only"], "take --test alone"),
        (["tag", "-m", "bert", "--train", "tag.tsv", "--predicate", "sep"], "without --predicate-column"),
        (["tag", "-m", "bert", "--train", "tag.tsv", "--dev", "wrong.tsv"], "wrong.tsv, line 2: tag 'X'"),
        (
            ["tag", "-m", "bert", "--train", "tag.tsv", "--dev", "unseen.tsv"],
            "unseen.tsv, line 1: label 'B-NEW' .*--unseen keep",
        ),
        (["tag", "-m", "bert", "--train", "tag.tsv", "--crf"], "crf is asked for with all of BERT trained"),
        (["tag", "-m", "bert", "--train", "tag.tsv", "--order", "long"], "order is 'long'"),
        (["tag", "-m", "bert", "--train", "tag.tsv", "--epochs", "0"], "--epochs is 0.0"),
        (["tag", "-m", "bert", "--train", "tag.tsv", "--steps", "0"], "--steps is 0"),
        (["tag", "-m", "bert", "--train", "tag.tsv", "--seed", "-1"], "seed is -1; expected 0"),
        (["tag", "-m", "bert", "--train", "."], "--train . is a directory; expected a file"),
        (["tag", "-m", "bert", "--train", "tag.tsv", "--features", "mix", "--dropout", "1"], "dropout is 1.0"),
        (["tag", "-m", "bert", "--train", "tag.tsv", "--features", "mix", "--lstm-hidden", "0"], "hidden_size is 0"),
        (["tag", "-m", "bert", "--train", "tag.tsv", "--weight-decay", "-1"], "weight_decay is -1.0"),
        (["tag", "-m", "other-words", "--train", "tag.tsv"], "has 37 tokens and the model's word table 36 rows"),
        (["classify", "-m", "other-words", "--train", "classify.tsv"], "has 37 tokens and the model's word table 36"),
        (["span", "-m", "other-words", "--train", "span.json"], "has 37 tokens and the model's word table 36 rows"),
        (["classify", "-m", "bert", "--train", "classify.tsv", "--quotes", "odd"], "--quotes is 'odd'"),
        (
            ["classify", "-m", "bert", "--train", "classify.tsv", "--regression"],
            "line 2: label '.*'; expected a finite num",
        ),
        (["classify", "-m", "bert", "--train", "nan.tsv", "--regression"], "nan.tsv, line 3: label 'nan'; expected"),
        (["classify", "-m", "bert", "--test", "classify.tsv", "--evaluate-only"], "has no ctxfast_task.json"),
        (["span", "-m", "bert", "--train", "span.json", "--doc-stride", "60"], "doc_stride is 60"),
        (["tag", "-m", "bert", "--train", "tag.tsv", "--lstm-hidden", "8"], "--lstm-hidden is given, but all of BERT"),
        (
            ["span", "-m", "bert", "--features", "mix", "--train", "span.json", "--doc-stride", "8"],
            "--doc-stride is given, but an LSTM reads texts whole",
        ),
        (["tag", "-m", "bert", "--predict-only", "--test", "tag.tsv", "--crf"], "--crf is given for a finished model"),
        (["tag", "-m", "bert", "--train", "tag.tsv", "-o", "bert"], "-o bert is --model bert; expected another place"),
        (
            ["tag", "-m", "run/best", "--train", "tag.tsv", "-o", "run", "--overwrite"],
            "-o run holds --model run/best; expected another place",
        ),
        (["tag", "-m", "bert", "--train", "tag.tsv", "--dev", "run/dev.tsv", "-o", "run"], "holds --dev run/dev.tsv"),
        (
            ["classify", "-m", "bert", "--predict-only", "--test", "run/predictions-test.jsonl", "-o", "run"],
            "the output run/predictions-test.jsonl is --test run/predictions-test.jsonl",
        ),
        (
            ["tag", "-m", "bert", "--train", "tag.tsv", "--device", "cpu", "--impl", "cuda_step"],
            "finetune tag: --impl is 'cuda_step', but no op has an implementation 'cuda_step' for cpu; expected ref",
        ),
        (
            ["tag", "-m", "bert", "--predict-only", "--test", "tag.tsv", "--epochs", "2"],
            "--epochs is given and nothing is",
        ),
        (
            ["tag", "-m", "bert", "--evaluate-only", "--test", "tag.tsv", "--lr", "1"],
            "--lr is given and nothing is train",
        ),
        (["classify", "-m", "bert", "--train", "one.tsv"], "labels is 'x' alone; expected two or more"),
        (
            ["classify", "-m", "bert", "--train", "classify.tsv", "--max-length", "65"],
            "max_length is 65; expected 4 to 64",
        ),
        (
            ["classify", "-m", "bert", "--train", "classify.tsv", "--max-length", "1"],
            "max_length is 1; expected 4 to 64",
        ),
        (["classify", "-m", "bert", "--train", "classify.tsv", "-o", "-"], "-o is '-'; expected a directory"),
        (
            ["classify", "-m", "bert", "--train", "wide.tsv", "--header"],
            "has no column for the text; its columns are 'c0', .*more",
        ),
    ],
)
def test_what_is_refused(files, tmp_path, capsys, monkeypatch, argv, reason) -> None:
    monkeypatch.chdir(files)
    (files / "wrong.tsv").write_text("bob\tO\nsaw\tX\n")
    (files / "unseen.tsv").write_text("bob\tB-NEW\n")
    (files / "wide.tsv").write_text("\t".join(f"c{number}" for number in range(500)) + "\nbob\tx\n")
    (files / "one.tsv").write_text("text\tlabel\nbob\tx\nanna\tx\n")
    (files / "nan.tsv").write_text("text\tscore\nbob\t1.5\nanna\tnan\n")
    other = tiny_bert(files / "other-words", layers=1)
    (other / "vocab.txt").write_text((other / "vocab.txt").read_text() + "more\n")
    (files / "run").mkdir(exist_ok=True)
    for name in ("dev.tsv", "predictions-test.jsonl"):
        (files / "run" / name).write_text("bob\tO\n")
    assert finetune(argv[0], "-o", tmp_path / "run", *argv[1:]) == 2
    captured = capsys.readouterr().err
    assert re.search(reason, captured) and captured.count("\n") == 1
    assert not (tmp_path / "run" / "final").exists()


def test_unseen_labels_may_be_kept(files, tmp_path) -> None:
    unseen = tmp_path / "unseen.tsv"
    unseen.write_text("bob\tB-NEW\nsaw\tO\n")
    argv = ["-m", files / "bert", "--train", files / "tag.tsv", "--steps", 1, "--unseen", "keep"]
    assert finetune("tag", *argv, "--test", unseen, "-o", tmp_path / "run") == 0
    assert scores(tmp_path / "run" / "final", "test")["recall"] == 0.0


def test_a_model_of_another_task_is_refused(files, tmp_path, capsys) -> None:
    argv = ["-m", files / "bert", "--train", files / "tag.tsv", "--steps", 1, "-o", tmp_path / "run"]
    assert finetune("tag", *argv) == 0
    argv = [
        "-m",
        tmp_path / "run" / "final",
        "--predict-only",
        "--test",
        files / "classify.tsv",
        "-o",
        tmp_path / "out",
    ]
    assert finetune("classify", *argv) == 2
    assert "is one for 'tag'; expected one for 'classify'" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_with_a_sharded_model(files, tmp_path) -> None:
    """FSDP2 keeps parameters whose names in files are others (query, key, value); two processes do what one does."""
    model = _without_dropout(files / "bert", tmp_path / "model")
    argv = ["tag", "-m", model, "--train", files / "tag.tsv", "--steps", 4, "--lr", 1e-3, "--save-every", 2]
    argv = [*map(str, argv), "--device", "cpu", "--quiet"]
    assert main(["finetune", *argv, "--batch-size", "4", "--accumulate", "2", "-o", str(tmp_path / "one")]) == 0
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    start += ["-m", "ctxfast.cli", "finetune", *argv, "--batch-size", "4", "--parallel", "fsdp2"]
    done = subprocess.run(
        [*start, "-o", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=2e-5), name
