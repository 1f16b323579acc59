# SPDX-License-Identifier: Apache-2.0
"""The command line: exit codes, one-line errors, progress, and real kills."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import h5py
import numpy as np
import pytest
import torch
from support import stopping
from support.fake_encoder import FakeEncoder

import ctxfast
from ctxfast import cli
from ctxfast.commands import bench, embed as embed_command
from ctxfast.embedding import batch_encoder, embedder
from ctxfast.models.bert.config import BertConfig
from ctxfast.models.bert.modeling import Bert

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefgh")]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory) -> Path:
    """A random BERT small enough to run thousands of lines in a moment."""
    folder = tmp_path_factory.mktemp("tiny") / "bert-uncased"
    config = BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    Bert(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return folder


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("a b c\nabc def\nx\n")
    return path


@pytest.fixture
def fake(monkeypatch) -> FakeEncoder:
    """Every model is a fake one."""
    encoder = FakeEncoder()
    monkeypatch.setattr(batch_encoder, "open_encoder", lambda *args, **options: encoder)
    return encoder


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


# Calls


def test_embed(source, tiny_bert, tmp_path, capsys):
    target = tmp_path / "out.hdf5"
    assert run("embed", source, "-m", tiny_bert, "-o", target, "--layers", "-1,-2", "--device", "cpu") == 0
    output = capsys.readouterr()
    assert output.out == "" and f"ctxfast embed: {target}: 3 lines" in output.err
    expected = ctxfast.Embedder(tiny_bert, device="cpu")(["a b c", "abc def", "x"], layers=[-1, -2])
    with h5py.File(target) as file:
        for number, values in enumerate(expected):
            np.testing.assert_allclose(file[str(number)][...], values, atol=1e-6)
    assert run("embed", source, "-m", tiny_bert, "-o", target, "--quiet", "--overwrite") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "words, expected",
    [
        ((), dict(layers=None, empty="keep", words=False)),
        (("--all",), dict(layers="all")),
        (("--average",), dict(layers="average")),
        (("--top",), dict(layers="top")),
        (("--layers", "-1,-2"), dict(layers=[-1, -2])),
        (("--layers=0",), dict(layers=[0])),
        (("--tokens", "--word-pieces", "mean"), dict(words=True, word_pieces="mean")),
        (("--skip-empty", "--truncate"), dict(empty="skip", truncate=True)),
        (
            ("--level", "sentence", "--pooling", "cls", "--normalize"),
            dict(level="sentence", pooling="cls", normalize=True),
        ),
        (("--window", "7", "--overwrite"), dict(window=7, overwrite=True)),
        (("--forget-sentences",), dict(forget_sentences=True)),
        (("--use-sentence-keys",), dict(use_sentence_keys=True)),
    ],
)
def test_options_arrive(source, tmp_path, monkeypatch, fake, words, expected):
    got = {}

    def embed_file(self, input, output, **options):
        got.update(options, input=input, output=output)
        raise KeyboardInterrupt

    monkeypatch.setattr(embedder.Embedder, "embed_file", embed_file)
    assert run("embed", source, "-m", "m", "-o", tmp_path / "o.hdf5", *words) == 130
    assert {name: got[name] for name in expected} == expected
    assert (got["input"], got["output"]) == (str(source), str(tmp_path / "o.hdf5"))


def test_options_of_the_model_arrive(source, tmp_path, monkeypatch):
    got = {}

    def open_encoder(model, device, dtype, **options):
        got.update(options, model=model, device=device.type, dtype=dtype)
        raise KeyboardInterrupt

    monkeypatch.setattr(batch_encoder, "open_encoder", open_encoder)
    words = "--options-file o --weight-file w --state carry --device cpu --dtype bfloat16".split()
    assert run("embed", source, "-o", tmp_path / "o.npz", *words) == 130
    wanted = dict(model=None, device="cpu", dtype="bfloat16", state="carry", options_file="o", weight_file="w")
    assert got == {**wanted, "download": False, "split": None}


def test_elmo_as_allennlp_had_it(tmp_path, shared_data):
    folder = shared_data / "elmo" / "allennlp_tiny"
    sentences = json.loads((folder / "sentences.json").read_text())[0]
    source, target = tmp_path / "in.txt", tmp_path / "out.hdf5"
    source.write_text("\n".join(sentences))
    files = ("--options-file", folder / "options.json", "--weight-file", folder / "lm_weights.hdf5")
    assert run("embed", source, "-o", target, *files, "--all", "--state", "carry", "--batch-size", 1, "--quiet") == 0
    with h5py.File(target) as ours, h5py.File(folder / "lm_embeddings_0.hdf5") as theirs:
        for number in range(len(sentences)):
            top = np.concatenate(list(theirs[str(number)][...]), axis=1)
            np.testing.assert_allclose(ours[str(number)][-1], top, atol=1e-6)


# Errors


@pytest.mark.parametrize(
    "words, message",
    [
        ("embed no.txt -m m -o o.npz", "ctxfast.embed: input no.txt does not exist; expected a text file."),
        ("embed {in} -m m -o - --format jsonl", "ctxfast.embed: output is '-'; expected the name of a file"),
        ("embed {in} -m m -o o.doc", "ctxfast.embed: output o.doc ends in '.doc'; expected .hdf5"),
        ("embed {in} -m m -o {in}.npz --layers two", "ctxfast.embed: layers is 'two'; expected 'all'"),
        ("embed {in} -m no-such-model -o {in}.npz", "ctxfast.resolve_model: 'no-such-model' is not a model"),
        ("embed {in} -m {here} -o {in}.npz", "is not a model: expected config.json (BERT)"),
        ("embed {in} -o {in}.npz", "ctxfast.embed: -m (--model) is missing; expected a model's folder"),
        ("embed {in} -m {bert} -o {in}.npz --state carry", "state is 'carry'; expected an ELMo model"),
        ("embed {in} -m {bert} -o {in}.npz --state zero", "state is 'zero'; expected an ELMo model for it, not bert"),
        ("embed {in} -m {bert} -o {in}.npz --batch-size 7", "batch_size is 7; expected it with state 'carry' alone"),
        (
            "embed {in} -m {bert} -o {in}.npz --pooling max",
            "pooling is 'max' at token level; expected level 'sentence'",
        ),
        ("embed {in} -m {bert} -o {in}.npz --word-pieces mean", "(words=True, --tokens for a file)"),
        ("embed {in} -m {bert} -o {in}.npz --device cpu --impl cuda_step", "impl is 'cuda_step', but none of the ops"),
        ("embed {in} -m {bert} -o {in}.npz --level word", "level is 'word'"),
        ("embed {in} -m {bert} -o {in}.npz --empty drop", "empty is 'drop'"),
        ("embed {in} -m {bert} -o {in}.npz --impl fast", "impl is 'fast'"),
        ("embed {in} -m {bert} -o {in}.npz --use-sentence-keys", "use_sentence_keys is set; expected HDF5"),
        (
            "embed {long} -m {bert} -o {in}.npz",
            "line 2 of {long} has 42 tokens, special ones included; expected at most 32",
        ),
    ],
)
def test_wrong_use(source, tiny_bert, tmp_path, capsys, words, message):
    long = tmp_path / "long.txt"
    long.write_text("a\n" + "a " * 40)
    places = {"in": source, "bert": tiny_bert, "here": tmp_path, "long": long}
    before = sorted(tmp_path.iterdir())
    assert run(*words.format(**places).split()) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "words, message",
    [
        ("embed {in} -m {bert} -o {in} --format jsonl", "output {in} is input {in}; expected another place."),
        ("embed {in} -m {bert} -o {link} --format jsonl --overwrite", "output {link} is input {in}; expected"),
        ("embed {in}.npz.partial -m {bert} -o {in}.npz --overwrite", "the work directory {in}.npz.partial is input"),
        (
            "embed {in} -m {bert} -o {bert}/model.safetensors --overwrite",
            "output {bert}/model.safetensors is a file of the model, {bert}/model.safetensors; expected",
        ),
        ("embed {in} -m {bert} -o {bert}/vocab.txt --format npz --overwrite", "is a file of the model, {bert}/vocab"),
    ],
)
def test_an_output_replaces_no_input(source, tiny_bert, tmp_path, capsys, words, message):
    places = {"in": source, "bert": tiny_bert, "link": tmp_path / "link"}
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "in.txt.npz.partial").write_text("a b c\n")
    folders = (tmp_path, tiny_bert)
    before = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert run(*words.format(**places).split()) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error and error.count("\n") == 1
    assert [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders] == before
    with pytest.raises(ValueError, match="is input"):
        ctxfast.Embedder(tiny_bert, device="cpu").embed_file(source, source, format="jsonl", overwrite=True)


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "the following arguments are required: COMMAND"),
        ("embed", "the following arguments are required: INPUT, -o/--output"),
        ("embed a -o b --no-such", "unknown argument --no-such"),
        ("embed a -o b --all --top", "not allowed with argument"),
        ("embed a -o b --skip-empty --empty keep", "not allowed with argument"),
        ("embed a -o b --window many", "argument --window: invalid int value"),
        ("embed a -o b --over", "unknown argument --over"),
        ("train", "invalid choice"),
    ],
)
def test_wrong_words(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        run(*words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_unexpected_errors(source, tmp_path, fake, capsys):
    fake.encode = lambda batch, selection: 1 / 0
    assert run("embed", source, "-m", "m", "-o", tmp_path / "o.npz") == 1
    assert "ZeroDivisionError" in capsys.readouterr().err

    def no_space(batch, selection):
        raise OSError(28, "No space left on device", "o.npz")

    fake.encode = no_space
    assert run("embed", source, "-m", "m", "-o", tmp_path / "o.npz") == 1
    assert (
        capsys.readouterr().err
        == "ctxfast: o.npz: No space left on device. The same command goes on where this stopped.\n"
    )


def test_interrupted(source, tmp_path, fake, capsys):
    def interrupt(batch, selection):
        raise KeyboardInterrupt

    fake.encode = interrupt
    assert run("embed", source, "-m", "m", "-o", tmp_path / "o.npz") == 130
    assert "interrupted. The same command goes on where this stopped." in capsys.readouterr().err


# Progress


def test_progress_lines(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(embed_command.time, "monotonic", lambda: now[0])
    show = embed_command._Lines()
    for step in range(5):
        show(50_000 + 1000 * step, 10 * step, 0.5 + 0.1 * step)
        now[0] += 10
    # Every half minute; 50,000 tokens were an earlier run's, so 3,000 in 30 s.
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["ctxfast embed: 30 lines, 53,000 tokens, 100 tokens/s, 80.0 %, about 2 min left"]
    now[0] += 30
    show(60_000, 60, None)
    assert "%" not in capsys.readouterr().err


def test_progress_bar(capsys):
    bar = embed_command._Bar()
    for step in range(5):
        bar(1000 * step, 10 * step, 0.2 * step)
    bar.close()
    error = capsys.readouterr().err
    assert "80.0%" in error and "40 lines" in error and "tokens/s" in error


# Other commands


def test_info(capsys):
    assert run("info") == 0
    output = capsys.readouterr().out
    assert ctxfast.show_config() in output
    for op in ("lstm", "attention", "char_cnn"):
        assert f"ctxfast.{op}:" in output
    assert "used" in output


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "ctxfast", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"ctxfast {ctxfast.__version__}")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0 and capsys.readouterr().out.strip() == f"ctxfast {ctxfast.__version__}"


def test_completion(monkeypatch, tmp_path, capsys):
    """The shell's own answer, from what the command prints."""
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stop:
        run("--print-completion", "bash")
    assert stop.value.code == 0
    (tmp_path / "ctxfast.bash").write_text(capsys.readouterr().out)
    (tmp_path / "corpus.txt").write_text("")
    for line, expected in {
        "ctxfast pre": "pretrain",
        "ctxfast pretrain e": "elmo",
        "ctxfast finetune tag --sch": "--scheme --schedule",
        "ctxfast embed corp": "corpus.txt",
    }.items():
        words = line.split()
        script = f"source ctxfast.bash; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_ctxfast"
        script += "; echo ${COMPREPLY[@]}"
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.strip() == expected, (line, done.stderr)
    for word, missing, said in (
        ("csh", False, "--print-completion is 'csh'; expected one of bash, "),
        ("bash", True, "needs shtab, which is not installed; pip install 'ctxfast[completion]'"),
    ):
        if missing:
            monkeypatch.setitem(sys.modules, "shtab", None)
        with pytest.raises(SystemExit) as stop:
            run("--print-completion", word)
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_bench(monkeypatch, capsys, tmp_path):
    assert run("bench", "--list", "--op", "scalar_mix") == 0
    assert capsys.readouterr().out.startswith("scalar_mix/")
    given = []
    monkeypatch.setattr("benchmarks.__main__.main", lambda words: given.append(words) or 3)
    assert run("bench") == 3 and given == [["--models", "--page", "ctxfast-bench.html", "--overwrite"]]
    monkeypatch.setattr(bench, "_PACKAGE", tmp_path / "ctxfast")
    assert run("bench") == 2
    assert "neither in the installed package nor beside it" in capsys.readouterr().err


# Real kills


@pytest.mark.slow
def test_kill_9_and_go_on(tiny_bert, tmp_path):
    """Killed in the middle, again later, and while the output is written: the file is the one of a quiet run."""
    source = tmp_path / "in.txt"
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    source.write_text("\n".join(" ".join(rng.choice(letters, rng.integers(1, 13))) for _ in range(2000)))
    options = ("-m", tiny_bert, "--layers", "all", "--window", "128", "--device", "cpu")
    whole, target = tmp_path / "whole.hdf5", tmp_path / "out.hdf5"
    assert run("embed", source, "-o", whole, *options) == 0
    work = tmp_path / "out.hdf5.partial"
    for sight in ("00000002.index", "00000011.index", "output.tmp"):
        process = stopping.start(work / sight, "ctxfast.cli", "embed", source, "-o", target, *options)
        stopping.await_sight(process)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not target.exists() and work.is_dir()
    last = stopping.start(None, "ctxfast.cli", "embed", source, "-o", target, *options, stderr=PIPE, text=True)
    _, error = last.communicate(timeout=stopping.PATIENCE_S)
    assert last.returncode == 0 and "2,000 lines (2,000 of them by an earlier run)" in error
    assert target.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.hdf5", "whole.hdf5"]


@pytest.mark.slow
def test_ctrl_c_and_stdin(tiny_bert, tmp_path):
    target, work = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    words = ("embed", "-", "-m", tiny_bert, "-o", target, "--window", "64", "--level", "sentence")
    lines = "".join(f"{'abcdefgh'[i % 8]} {'xyz'[i % 3]}\n" for i in range(600))

    def start(sight: Path | None) -> Popen:
        return stopping.start(sight, "ctxfast.cli", *words, stdin=PIPE, stderr=PIPE, text=True)

    process = start(work / "00000003.index")
    process.stdin.write(lines)
    process.stdin.close()
    stopping.await_sight(process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    error = process.stderr.read()
    assert process.wait() == 130 and "The same command goes on" in error and "Traceback" not in error
    process = start(None)
    _, error = process.communicate(lines, timeout=stopping.PATIENCE_S)
    assert process.returncode == 0 and "of them by an earlier run" in error
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(600)) and rows[5]["text"] == "f z"
