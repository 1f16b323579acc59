# SPDX-License-Identifier: Apache-2.0
"""Prepared data: whose it is, who may make it, what killed commands leave, what many processes see of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.kills import run_until

from ctxfast import cli
from ctxfast.training.pretraining.bilm_corpus import BiLmCorpus
from ctxfast.training.pretraining.prepared import hold, read_note

HERE = Path(__file__).parent
TEXT = "the river valley was green\na tower stands over it\n\nthe farmer cuts corn\nrain falls on the field\n\n" * 4


def _words(kind: str, folder: Path, *more: object) -> list[str]:
    if not (folder / "text").exists():
        (folder / "text").write_text(TEXT)
    own: dict[str, list[object]] = {
        "bert": ["--train-vocab", 60, "--size", "tiny", "--max-seq-length", 32, "--dupe-factor", 1, "--prepare-only"],
        "elmo": ["--steps", 1, "--batch-size", 1000, "--negatives", 0, "--size", "small"],  # a text too short for it
    }
    return ["pretrain", kind, *map(str, [folder / "text", "-o", folder / "run", *own[kind], "--quiet", *more])]


@pytest.mark.parametrize(("kind", "name"), [("bert", "train"), ("bert", "tokenizer"), ("elmo", "train")])
def test_data_of_somebody_else_is_left_alone(tmp_path: Path, capsys, kind: str, name: str) -> None:
    theirs = tmp_path / "run" / "data" / name
    theirs.mkdir(parents=True)
    (theirs / "images.tar").write_text("precious")
    for more in ([], ["--overwrite"]):
        assert cli.main(_words(kind, tmp_path, *more)) == 2
        assert f"{theirs} holds images.tar and no m" in capsys.readouterr().err
        assert (theirs / "images.tar").read_text() == "precious"


@pytest.mark.parametrize("text", ["", "[]", '{"other": 1}'])
def test_a_note_that_is_none_of_ours(tmp_path: Path, text: str) -> None:
    assert read_note(tmp_path / "nothing", "meta.json") is None and read_note(tmp_path, "meta.json") is None
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ValueError, match="holds meta.json and no meta.json that says"):
        read_note(tmp_path, "meta.json")
    (tmp_path / "meta.json").write_text('{"files": []}')
    assert read_note(tmp_path, "meta.json") == {"files": []}


@pytest.mark.parametrize("kind", ["bert", "elmo"])
def test_two_commands_do_not_prepare_in_one_directory(tmp_path: Path, capsys, kind: str) -> None:
    lock = hold(tmp_path / "run" / "data")
    assert cli.main(_words(kind, tmp_path)) == 2
    assert "another process works in" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run" / "data").iterdir()) == ["lock"]
    lock.release()
    cli.main(_words(kind, tmp_path))
    assert "another process" not in capsys.readouterr().err and (tmp_path / "run" / "data" / "train").is_dir()


def test_what_killed_commands_leave_is_removed(tmp_path: Path) -> None:
    data = tmp_path / "run" / "data"
    for name in (".train.ctxfast/new", ".tokenizer.ctxfast/old", ".train.mine", ".git"):
        (data / name).mkdir(parents=True)
    (data / ".train.ctxfast" / "lock").write_text("")
    assert cli.main(_words("bert", tmp_path, "--overwrite")) == 0
    assert sorted(path.name for path in data.iterdir()) == [".git", ".train.mine", "lock", "tokenizer", "train"]
    for name in (".meta.json.ctxfast", ".complete.json.ctxfast", ".shard-00000.ctxfast/new"):
        (data / "train" / name).mkdir(parents=True)
    assert cli.main(_words("bert", tmp_path)) == 0
    assert not list((data / "train").glob(".*"))


@pytest.mark.parametrize("kind", ["bert", "elmo"])
def test_killed_at_every_step_of_preparing(tmp_path: Path, kind: str) -> None:
    """Where data of other settings stand, which are replaced. Killed anywhere, the command goes on and leaves
    nothing."""

    def prepare(folder: Path, other: bool) -> None:
        words = _words(kind, folder, *(["--data-seed", 7] if other else []))
        if kind == "bert":
            assert cli.main(words) == 0
            return
        with hold(folder / "run" / "data"):
            BiLmCorpus.prepare(folder / "run" / "data" / "train", [folder / "text"], tokenize=other)

    def found(folder: Path) -> dict[str, bytes]:
        data = folder / "run" / "data"
        return {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*") if path.is_file()}

    prepare(tmp_path, True)
    whole = found(tmp_path)
    assert len(whole) > 5
    step, seen = 0, []
    while seen is not None:
        shutil.rmtree(tmp_path / "run")
        prepare(tmp_path, False)
        seen = run_until(step, lambda: prepare(tmp_path, True))
        if seen is not None:
            prepare(tmp_path, True)
        assert found(tmp_path) == whole, (step, seen)
        step += 1
    assert step > 8


def test_all_processes_hear_what_the_first_one_made_or_why_it_failed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(HERE / "first_process.py"), str(tmp_path / "file")],
        capture_output=True,
        text=True,
        timeout=600,
        # Not the installed package, which may be another checkout.
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert said == ["ctxfast.training: line 7 is not UTF-8"] * 2
