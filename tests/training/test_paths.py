# SPDX-License-Identifier: Apache-2.0
"""Options that take a path: every form that their help names works, every other is told by its option."""

from __future__ import annotations

import shutil

import pytest
from support.tiny_models import classified, tagged, tiny_bert, tiny_elmo

from ctxfast.cli import main
from ctxfast.models.bert.tokenization import BertTokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """bert, elmo, text, tag.tsv, cls.tsv; dir (empty), file (a text), none (is not there)."""
    folder = tmp_path_factory.mktemp("paths")
    tiny_bert(folder / "bert", layers=1)
    tiny_elmo(folder / "elmo")
    (folder / "text").write_text("the boat went to paris\nanna saw bob\n" * 8)
    (folder / "tag.tsv").write_text(tagged(5))
    (folder / "cls.tsv").write_text(classified(5))
    (folder / "dir").mkdir()
    (folder / "file").write_text("some text\n")
    (folder / "words").mkdir()
    shutil.copy(folder / "bert" / "vocab.txt", folder / "words" / "mine.txt")
    (folder / "json").mkdir()
    BertTokenizer.from_pretrained(folder / "bert").save(folder / "json")
    (folder / "json" / "vocab.txt").unlink(missing_ok=True)
    return folder


BASES = {
    "embed": "embed {0}/text -m {0}/bert -o {1}/o.npz",
    "bert": "pretrain bert {0}/text --vocab {0}/bert --size tiny --pairs none --steps 1 --batch-size 2 "
    "--max-seq-length 16 --dupe-factor 1 --workers 1 --device cpu -o {1}/run",
    "elmo": "pretrain elmo {0}/text --options {0}/elmo/options.json --steps 1 --batch-size 1 --unroll 2 --negatives 0 "
    "--device cpu -o {1}/run",
    "tag": "finetune tag -m {0}/bert --train {0}/tag.tsv --steps 1 --device cpu -o {1}/run",
    "classify": "finetune classify -m {0}/bert --train {0}/cls.tsv --steps 1 --device cpu -o {1}/run",
    "probe": "probe -m {0}/bert --train {0}/tag.tsv --dev {0}/tag.tsv --epochs 1 --device cpu",
}


def words(base: str, place, tmp_path, option: str, value: str) -> list[str]:
    """The command with one option changed."""
    found = [word.format(place, tmp_path) for word in BASES[base].split()]
    value = value.format(place, tmp_path)
    if option == "text":
        found[1 if base == "embed" else 2] = value
    elif option in found:
        found[found.index(option) + 1] = value
    else:
        found += [option, value]
    if base == "bert" and option in ("--init-from", "--config"):  # these have their sizes, and the first its vocabulary
        for other in ("--size", *(["--vocab"] if option == "--init-from" else [])):
            at = found.index(other)
            del found[at : at + 2]
    return [*found, "--quiet"]


@pytest.mark.parametrize(
    ("base", "option", "value"),
    [
        ("bert", "--vocab", "{0}/bert"),
        ("bert", "--vocab", "{0}/bert/vocab.txt"),
        ("bert", "--vocab", "{0}/words/mine.txt"),
        ("bert", "--vocab", "{0}/json"),
        ("bert", "--vocab", "{0}/json/tokenizer.json"),
        ("bert", "--init-from", "{0}/bert"),
        ("bert", "--init-from", "{0}/bert/model.safetensors"),
        ("bert", "--held-out", "{0}/text"),
        ("elmo", "--init-from", "{0}/elmo"),
        ("probe", "-o", "{1}/new/probe.json"),
        ("probe", "--plot", "{1}/new/probe.png"),
    ],
)
def test_what_the_help_names_works(place, tmp_path, capsys, base, option, value) -> None:
    assert main(words(base, place, tmp_path, option, value)) == 0, capsys.readouterr().err
    assert "new" not in value or (tmp_path / "new").is_dir()
    if base == "bert":  # and again: nothing has changed
        assert main(words(base, place, tmp_path, option, value)) == 0, capsys.readouterr().err


FILES = {
    "embed": ["text"],
    "bert": ["text", "--held-out", "--config", "--gazetteer", "--spans"],
    "elmo": ["text", "--held-out", "--options", "--vocab"],
    "tag": ["--train", "--dev", "--test"],
    "classify": ["--train", "--dev", "--test"],
    "probe": ["--train", "--dev"],
}
WRONG = [(base, option, value) for base, options in FILES.items() for option in options for value in ("dir", "none")]
WRONG += [(base, "-m", value) for base in ("embed", "tag", "classify", "probe") for value in ("dir", "file", "none")]
WRONG += [("bert", option, value) for option in ("--vocab", "--init-from") for value in ("dir", "file", "none")]
WRONG += [("elmo", "--init-from", value) for value in ("dir", "file", "none")]
WRONG += [(base, "-o", "file") for base in ("bert", "elmo", "tag", "classify")]
WRONG += [("embed", "-o", "dir"), ("probe", "-o", "dir"), ("probe", "--plot", "dir")]


@pytest.mark.parametrize(("base", "option", "value"), WRONG)
def test_what_is_wrong_is_a_sentence_that_names_it(place, tmp_path, capsys, base, option, value) -> None:
    assert main(words(base, place, tmp_path, option, f"{{0}}/{value}")) == 2
    error = capsys.readouterr().err
    assert error.startswith("ctxfast.") and error.count("\n") == 1 and f"{place}/{value}" in error
    assert "Errno" not in error and "expected" in error or "is not a model" in error or "has no" in error, error
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_changed_vocabulary_is_another_run(place, tmp_path, capsys) -> None:
    shutil.copytree(place / "bert", tmp_path / "vocabulary")
    command = words("bert", place, tmp_path, "--vocab", "{1}/vocabulary")
    assert main(command) == 0
    with open(tmp_path / "vocabulary" / "vocab.txt", "a") as file:
        file.write("more\n")
    assert main(command) == 2
    assert "settings.sha256.vocab.vocab.txt was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ("embed x -o y --leval z", "ctxfast embed: unknown argument --leval, did you mean --level?"),
        (
            "finetune tag --schme=x -m a -o b",
            "ctxfast finetune tag: unknown argument --schme=x, did you mean --scheme?",
        ),
        (
            "pretrain bert x -o y --zzzzzz",
            "ctxfast pretrain bert: unknown argument --zzzzzz (see ctxfast pretrain bert",
        ),
    ],
)
def test_unknown_arguments(capsys, argv, error) -> None:
    with pytest.raises(SystemExit):
        main(argv.split())
    assert capsys.readouterr().err.startswith(error)
